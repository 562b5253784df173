"""Training shards that are flipped, cut or gone: a run stops with the path or, where asked, goes on without their rows.

Then no other row moves, no wrong token is read, and every row that is left out is recorded with its shard.
"""

from __future__ import annotations

import random
import shutil
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.build import build
from data_pipeline.loader import BatchLoader, LeftOut, open_training
from data_pipeline.manifest import read_manifest
from data_pipeline.packing import PADDING, PackedSplit, open_rows
from launch.batches import RankBatches
from launch.exit_codes import ExitCode
from moe_dist.config import Config, parse_config
from moe_dist.errors import ShardError
from tests.data_pipeline.conftest import _write_texts
from tests.faults.test_signals import TREE, finish, start
from tests.launch.conftest import events

S, BATCH = 32, 6


def configure(folder: Path, target: Path, packing: str, damaged: str) -> Config:
    sources = {name: {"input": str(folder / name)} for name in ("a", "b")}
    data = {"sources": sources, "dir": str(target), "shard_bytes": 10_000, "sequence_length_tokens": S}
    data |= {"holdout_fraction": 0.2, "packing": packing, "damaged_shards": damaged}
    train = {"global_batch_sequences": BATCH}
    return parse_config(
        {"seed": 3, "run": {"dir": str(target / "run")}, "data": data, "train": train, "model": {"vocab_size": 300}}
    )


@pytest.fixture(scope="module", params=["concatenate", "best_fit"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration that quarantines, the build, and a copy of which a shard of each kind of damage is."""
    folder = tmp_path_factory.mktemp("damaged")
    texts = _write_texts(folder / "texts", 60)
    for number, path in enumerate(sorted(texts.iterdir())):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        shutil.copy(path, folder / "ab"[number % 2])
    config = configure(folder, folder / "out", request.param, "quarantine")
    built = build(config, use_ray=False)
    copy = folder / "copy"
    shutil.copytree(built, copy)
    shards = [shard.file for shard in read_manifest(copy).splits["train"]]
    assert len(shards) >= 8
    flipped, cut, gone = (copy / shards[place] for place in (0, 3, len(shards) - 2))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    return SimpleNamespace(config=config, built=built, copy=copy, damaged={flipped.name, cut.name, gone.name})


def shards_of_row(split: Any, row: int) -> set[str]:
    """The files that a row has tokens of, worked out from the manifest's counts alone."""
    shards = split.split.shards if isinstance(split, PackedSplit) else split.shards
    if isinstance(split, PackedSplit):
        return {shards[bisect_right(split._row_ends(S), row)].file}
    ends = list(accumulate(shard.tokens for shard in shards))
    return {shards[bisect_right(ends, token)].file for token in range(row * S, row * S + S + 1)}


def test_quarantine_leaves_out_the_rows_of_damaged_shards_and_moves_no_other(whole: Any) -> None:
    good, bad = open_training(whole.config, whole.built), open_training(whole.config, whole.copy)
    assert bad.identity == good.identity
    total = sum(split.num_rows(S) for split in good.sources.values())
    left_out, shards = {}, set()
    for batch in (bad.batch(first, min(first + 50, total + 40)) for first in range(0, total + 40, 50)):
        for row in batch.left_out:
            left_out[row.sample] = row
            shards.add(row.shard)
    assert shards == whole.damaged and 0 < len(left_out) < total / 2
    for sample in range(total + 40):
        source, number = good.locate(sample)
        touched = shards_of_row(good.sources[source], number) & whole.damaged
        (row,) = bad.rows(sample, sample + 1)
        assert (sample in left_out) == bool(touched)
        if touched:
            assert (row == PADDING).all()
            told = left_out[sample]
            assert (told.source, told.row) == (source, number) and told.shard in touched and told.reason
        else:
            assert np.array_equal(row, good.rows(sample, sample + 1)[0])


def test_quarantine_is_the_same_for_any_ranks_and_ends_where_the_shard_is_back(whole: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.copy, copy)
    alone, state = BatchLoader(open_training(whole.config, copy), BATCH), None
    for ranks in (1, 2, 3):
        group = [BatchLoader(open_training(whole.config, copy), BATCH, rank, ranks) for rank in range(ranks)]
        for loader in group:
            loader.load_state_dict(state or loader.state_dict())
        for _ in range(40):
            parts, batch = [next(loader) for loader in group], next(alone)
            assert np.array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
            assert sum((part.left_out for part in parts), ()) == batch.left_out
        state = group[0].state_dict()
    for name in whole.damaged:
        shutil.copy(whole.built / name, copy / name)
    good = BatchLoader(open_training(whole.config, whole.built), BATCH)
    back = BatchLoader(open_training(whole.config, copy), BATCH)
    for loader in (good, back):
        loader.load_state_dict(state)
    for _ in range(40):
        batch = next(back)
        assert np.array_equal(batch.rows, next(good).rows) and not batch.left_out


def test_damage_stops_where_no_quarantine_is_asked_for_and_in_held_out_text_always(whole: Any, tmp_path: Path) -> None:
    strict = whole.config.data.model_copy(update={"damaged_shards": "stop"})
    stopping = whole.config.model_copy(update={"data": strict})
    with pytest.raises(ShardError, match=r"train-.*\.arrow(.|\n)*data\.damaged_shards=quarantine"):
        open_training(stopping, whole.copy)
    copy = tmp_path / "copy"
    shutil.copytree(whole.built, copy)
    flipped = copy / next(iter(read_manifest(copy).splits["train"])).file
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    training = open_training(stopping, copy)
    with pytest.raises(ShardError, match=flipped.name):
        training.rows(0, sum(split.num_rows(S) for split in training.sources.values()))
    heldout = copy / read_manifest(copy).splits["heldout"][0].file
    heldout.unlink()
    with pytest.raises(ShardError, match=heldout.name) as caught:
        open_rows(whole.config, copy, "heldout")
    assert "quarantine" not in caught.value.fix


def test_ranks_record_the_rows_they_left_out_once_each(whole: Any, tmp_path: Path) -> None:
    run = whole.config.run.model_copy(update={"dir": str(tmp_path)})
    config = whole.config.model_copy(update={"run": run})
    wanted: list[LeftOut] = []
    batches = BatchLoader(open_training(config, whole.copy), BATCH)
    for _ in range(30):
        wanted += next(batches).left_out
    for rank, tensor in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mesh = SimpleNamespace(data_place=rank, tensor_place=tensor, layout=SimpleNamespace(data=2))
        batches_of_rank = RankBatches(config, whole.copy, mesh)  # type: ignore[arg-type]
        for _ in range(30):
            next(batches_of_rank)
        batches_of_rank.close()
    found = [(event["shard"], row) for event in events(tmp_path, "quarantined") for row in event["rows"]]
    assert all(event["reason"] for event in events(tmp_path, "quarantined"))
    assert sorted((row["sample"], shard, row["source"], row["row"]) for shard, row in found) == sorted(
        (row.sample, row.shard, row.source, row.row) for row in wanted
    )


def test_run_stops_with_the_path_and_goes_on_by_quarantine_to_its_end(tmp_path: Path) -> None:
    """For real, on two ranks: the shard is flipped after the build; held-out text and checkpoints are whole."""
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(40):
        words = " ".join(draw.choices(["alpha", "beta", "gamma", "12345", "猫"], k=300))
        (tmp_path / "text" / f"{number:02d}.txt").write_text(words)
    data = {"input": str(tmp_path / "text"), "dir": str(tmp_path / "data"), "sequence_length_tokens": 16}
    data |= {"shard_bytes": 10_000, "holdout_fraction": 0.2}
    tree = {**TREE, "data": data, "train": {**TREE["train"], "steps": 30}}
    path, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree))
    built = build(parse_config(tree), use_ray=False)
    damaged = built / read_manifest(built).splits["train"][0].file
    bytes_ = bytearray(damaged.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    damaged.write_bytes(bytes_)

    _, err = finish(start(path, run_dir), ExitCode.WRONG_INPUT)
    assert str(damaged) in err and "data.damaged_shards=quarantine" in err and "Traceback" not in err
    summary, err = finish(start(path, run_dir, "data.damaged_shards=quarantine"), ExitCode.DONE, 120)
    assert summary["steps"] == 30 and all(np.isfinite(summary["losses"]))
    assert f"{damaged.name} is damaged" in err and err.count("is damaged") == 1
    told = {row["sample"]: row for event in events(run_dir, "quarantined") for row in event["rows"]}
    assert summary["left_out_rows"] == {damaged.name: len(told)} and len(told) > 0
    counted = sum(event["tokens"] for event in events(run_dir, "step"))
    assert counted == (30 * 4 - len(told)) * 16

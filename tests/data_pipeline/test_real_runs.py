"""Random corpora through build, order and the loader of ranks: the text of every batch, whoever reads it.

What stands in test_sources.py for row numbers is proven here for tokens, from files to the rows that a rank trains on.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from data_pipeline.build import build
from data_pipeline.packing import open_sources
from data_pipeline.tokenizer import train_tokenizer
from launch.batches import RankBatches
from moe_dist.config import Config, parse_config
from moe_dist.errors import DataError

WORDS = ["alpha", "beta", "größe", "猫", "🙂", "12345", "\n", "the", "of", "def f(x):", "!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([" ".join(WORDS)] * 20, 300).save(path)
    return path


def write_corpus(folder: Path, seed: int, sources: int) -> dict[str, dict[str, str]]:
    """Sources of 1 to 3 files of 4 to 12 records of 40 to 120 words, each of which fills a row."""
    draw, found = random.Random(seed), {}
    for name in "abc"[:sources]:
        (folder / name).mkdir()
        for number in range(draw.randint(1, 3)):
            lines = [" ".join(draw.choices(WORDS, k=draw.randint(40, 120))) for _ in range(draw.randint(4, 12))]
            records = "".join(json.dumps({"text": f"{name}{line}"}) + "\n" for line in lines)
            (folder / name / f"{number}.jsonl").write_text(records)
        found[name] = {"input": str(folder / name)}
    return found


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    """A corpus and a run of it: how often each source is read in each of up to three stages, None for no mixture."""
    sources = draw(st.integers(1, 3))
    times = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.3, 2.0]), min_size=sources, max_size=sources).filter(any)
    return {
        "corpus": draw(st.integers(0, 2**32)),
        "sources": sources,
        "seed": draw(st.integers(0, 2**32)),
        "length": draw(st.sampled_from([4, 13, 32])),
        "packing": draw(st.sampled_from(["concatenate", "best_fit"])),
        "window": draw(st.sampled_from([1, 2**19])),
        "stages": draw(st.none() | st.lists(times, min_size=1, max_size=3)),
        "batch": draw(st.integers(1, 17)),
    }


def config_of(run: dict[str, Any], folder: Path, tokenizer: Path, batch: int) -> Config:
    names = "abc"[: run["sources"]]
    stages = [{"epochs": {name: n for name, n in zip(names, stage, strict=True) if n}} for stage in run["stages"] or []]
    data = {
        "sources": write_corpus(folder, run["corpus"], run["sources"]),
        "dir": str(folder / "out"),
        "shard_bytes": 10_000,
        "holdout_fraction": 0.1,
        "sequence_length_tokens": run["length"],
        "packing": run["packing"],
        "shuffle_window_tokens": run["window"],
        "mixture": stages,
        "tokenizer": {"path": str(tokenizer)},
    }
    train = {"global_batch_sequences": batch, "steps": 1}
    return parse_config({"seed": run["seed"], "data": data, "train": train, "model": {"vocab_size": 300}})


def rank_of(config: Config, built: Path, rank: int, ranks: int) -> RankBatches:
    """The batches of a data rank of so many, opened anew as in a process of its own."""
    mesh = SimpleNamespace(data_place=rank, tensor_place=0, layout=SimpleNamespace(data=ranks))
    return RankBatches(config, built, mesh)  # type: ignore[arg-type]


def global_batches(config: Config, built: Path, steps: int, draw: random.Random) -> Iterator[np.ndarray]:
    """So many batches, by a number of ranks and of batches made ahead that changes every few steps."""
    state: dict[str, Any] | None = None
    while steps:
        ranks, here = draw.randint(1, 5), draw.randint(1, steps)
        ahead = config.data.model_copy(update={"prefetch_batches": draw.randint(0, 2)})
        config = config.model_copy(update={"data": ahead})
        group = [rank_of(config, built, rank, ranks) for rank in range(ranks)]
        if state is not None:
            for rank in group:
                rank.load_state_dict(state)
        for _ in range(here):
            yield np.concatenate([next(rank).numpy() for rank in group])
        states = [rank.state_dict() for rank in group]
        assert all(found == states[0] for found in states)
        state, steps = json.loads(json.dumps(states[0])), steps - here  # a checkpoint keeps it as JSON
        for rank in group:
            rank.close()


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked(), st.integers(0, 2**32))
def test_text_of_all_batches_is_the_same_for_any_ranks_and_each_row_comes_as_often_as_asked(
    tokenizer: Path, run: dict[str, Any], changes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(run, folder, tokenizer, run["batch"])
        try:
            built = build(config, use_ray=False)
            rows = {name: list(map(bytes, _all_rows(split, run["length"]))) for name, split in _sources(config, built)}
            assume(all(rows.values()))
        except DataError:  # chance held all of a source out, or nothing
            reject()
        shutil.rmtree(folder / "a")  # the build alone is read from here on
        for name, split in _sources(config, built):
            targets = np.concatenate([np.frombuffer(row, dtype=np.int64)[1:] for row in rows[name]])
            least = split.num_tokens if run["packing"] == "best_fit" else split.num_tokens - run["length"]
            assert least <= (targets >= 0).sum() <= split.num_tokens
        asked_for = (
            [dict.fromkeys(rows, 2)] if run["stages"] is None else [stage.epochs for stage in config.data.mixture]
        )
        taken = {
            name: sum(int(Fraction(str(s.get(name, 0))) * len(found)) for s in asked_for)
            for name, found in rows.items()
        }
        total = sum(taken.values())
        assume(total)
        batch = min(run["batch"], total)
        steps, train = total // batch, config.train.model_copy(update={"global_batch_sequences": batch})
        config = config.model_copy(update={"train": train})
        alone = rank_of(config, built, 0, 1)
        whole = [next(alone).numpy() for _ in range(steps)]
        alone.close()
        for one, other in zip(whole, global_batches(config, built, steps, random.Random(changes)), strict=True):
            assert np.array_equal(one, other)
        # A last batch that would not be full is not made: as many rows as it would have may be missing.
        check_counts(Counter(map(bytes, np.concatenate(whole))), rows, taken, missing=total % batch)


def check_counts(seen: Counter[bytes], rows: dict[str, list[bytes]], taken: dict[str, int], missing: int) -> None:
    """No row of a source comes twice more often than any other, and all together come as often as they were taken."""
    least, most = Counter[bytes](), Counter[bytes]()
    for name, found in rows.items():
        for row in found:
            least[row] += taken[name] // len(found)
            most[row] += -(-taken[name] // len(found))
    assert not seen - most
    assert (least - seen).total() <= missing
    assert seen.total() == sum(taken.values()) - missing


def _sources(config: Config, built: Path) -> Any:
    return open_sources(config, built).items()


def _all_rows(split: Any, length: int) -> np.ndarray:
    return np.concatenate([np.empty((0, length + 1), dtype=np.int64), *split.all_rows(length)])

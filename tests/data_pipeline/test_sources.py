"""Several sources through build, order and loader: whose text a row is, how often it comes, whoever reads it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build import build, open_tokenizer
from data_pipeline.inspection import describe_build
from data_pipeline.listing import list_data
from data_pipeline.loader import BatchLoader, TrainingRows, open_training
from data_pipeline.manifest import SOURCES_VERSION, read_manifest, write_manifest
from data_pipeline.mixture import stages_of
from data_pipeline.prefetch import Prefetch
from data_pipeline.run_order import RunOrder
from data_pipeline.shards import TokenSplit
from data_pipeline.verification import verify_build
from moe_dist.config import Config, parse_config
from moe_dist.config.data_schema import MixtureStage
from moe_dist.errors import ConfigError, DataError

S = 16
LONG = 4096  # a block of 2**18 tokens has 64 rows of it, so that small sources have several
WORDS = {"latin": "alpha beta gamma", "greek": "αλφα βητα γαμμα", "han": "甲乙丙丁"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Three sources of three formats, whose letters tell them apart."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "latin").mkdir()
    for i in range(40):
        (folder / "latin" / f"{i:02d}.txt").write_text(f"{i} " + WORDS["latin"] * (5 + i % 7))
    with gzip.open(folder / "greek.jsonl.gz", "wt") as file:
        for i in range(25):
            file.write(json.dumps({"body": f"{i} " + WORDS["greek"] * (3 + i % 5)}) + "\n")
    with open(folder / "han.jsonl", "w") as file:
        for i in range(20):
            file.write(json.dumps({"text": f"{i} " + WORDS["han"] * (6 + i % 3)}) + "\n")
    return {
        "latin": {"input": str(folder / "latin"), "license": "CC0"},
        "greek": {"input": str(folder / "*.gz"), "text_field": "body"},
        "han": {"input": str(folder / "han.jsonl")},
    }


def configure(inputs: dict[str, dict[str, str]], target: Path, **data: Any) -> Config:
    section = {"sources": inputs, "dir": str(target), "shard_bytes": 10_000, "sequence_length_tokens": S}
    return parse_config({"data": {**section, "holdout_fraction": 0.1, **data}, "model": {"vocab_size": 400}})


@pytest.fixture(scope="module")
def mixed(inputs: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(configure(inputs, tmp_path_factory.mktemp("mixed")), use_ray=False)


def sources_in(folder: Path, ids: np.ndarray) -> set[str]:
    tokenizer = open_tokenizer(folder)
    text = set(tokenizer.decode([token for token in ids.tolist() if token >= 0 and token != tokenizer.end_of_text]))
    return {name for name, words in WORDS.items() if (set(words) - {" "}) & text}


def test_listing_of_sources_names_files_by_source_in_the_order_of_the_config(
    inputs: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    files = list_data(configure(inputs, tmp_path).data).files
    assert [(file.source, file.text_field) for file in files[-2:]] == [("greek", "body"), ("han", "")]
    assert files[0].id == "latin/00.txt" and len(files) == 42


def test_listing_of_a_missing_source_names_its_key(inputs: dict[str, dict[str, str]], tmp_path: Path) -> None:
    wrong = {**inputs, "han": {"input": str(tmp_path / "nothing")}}
    with pytest.raises(DataError) as caught:
        list_data(configure(wrong, tmp_path).data)
    assert caught.value.where == "data.sources.han.input"


def test_build_of_sources_keeps_each_in_shards_of_its_own(mixed: Path) -> None:
    manifest = read_manifest(mixed)
    assert manifest.version == SOURCES_VERSION and verify_build(mixed)["tokens"]
    assert manifest.sources is not None and list(manifest.sources) == list(WORDS)
    assert [source["license"] for source in manifest.sources.values()] == ["CC0", None, None]
    for name in WORDS:
        split = TokenSplit(mixed, "train", source=name)
        assert sources_in(mixed, split.tokens(0, split.num_tokens)) == {name}
        assert {shard.source for shard in split.shards} == {name}
    assert sum(TokenSplit(mixed, "train", source=name).num_tokens for name in WORDS) == manifest.num_tokens("train")


def test_inspection_of_a_build_of_sources_counts_each(mixed: Path) -> None:
    found = describe_build(mixed, samples=0)
    assert list(found["sources"]) == list(WORDS) and found["sources"]["latin"]["license"] == "CC0"
    assert sum(row["tokens"] for row in found["sources"].values()) == found["splits"]["train"]["tokens"]


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ["latin", "greek", "han"]},
        {"sources": {"latin": "CC0"}},
        {"sources": {name: {"license": 3} for name in WORDS}},
        {"sources": {"latin": {}, "greek": {}}},
        {"sources": None},
    ],
)
def test_manifest_with_sources_that_make_no_sense_is_refused(mixed: Path, tmp_path: Path, change: dict) -> None:
    shutil.copytree(mixed, tmp_path / "copy")
    write_manifest(tmp_path / "copy", replace(read_manifest(mixed), **change))
    with pytest.raises(DataError, match=r"manifest\.json"):
        verify_build(tmp_path / "copy")


def test_build_of_sources_on_another_packing_has_the_same_shards(
    mixed: Path, inputs: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    config = configure(inputs, tmp_path, packing="best_fit")
    packed = build(config, use_ray=False)
    assert read_manifest(packed).splits == read_manifest(mixed).splits
    training = open_training(config, packed)
    for sample in range(30):
        name, _ = training.locate(sample)
        (row,) = training.rows(sample, sample + 1)
        assert sources_in(packed, row[1:]) <= {name}


def test_build_of_other_sources_licences_or_order_is_another(
    inputs: dict[str, dict[str, str]], mixed: Path, tmp_path: Path
) -> None:
    relicensed = {**inputs, "han": {**inputs["han"], "license": "MIT"}}
    turned = dict(reversed(inputs.items()))
    names = {build(configure(given, tmp_path), use_ray=False).name for given in (inputs, relicensed, turned)}
    assert len(names) == 3 and mixed.name in names


def test_batches_of_sources_are_rows_of_one_source_each_once_an_epoch(
    mixed: Path, inputs: dict[str, dict[str, str]]
) -> None:
    training = open_training(configure(inputs, mixed.parent), mixed)
    total = sum(split.num_rows(S) for split in training.sources.values())
    for epoch in range(2):
        seen = Counter(training.locate(sample) for sample in range(epoch * total, (epoch + 1) * total))
        assert len(seen) == total and set(seen.values()) == {1}
    rows = training.rows(3, 40)
    for sample, row in enumerate(rows, start=3):
        assert sources_in(mixed, row[1:]) <= {training.locate(sample)[0]}


def test_mixture_that_ends_before_the_run_is_refused_with_the_steps_that_fit(
    mixed: Path, inputs: dict[str, dict[str, str]]
) -> None:
    config = configure(inputs, mixed.parent, mixture=[{"epochs": {"latin": 2}}])
    rows = TokenSplit(mixed, "train", source="latin").num_rows(S)
    with pytest.raises(ConfigError) as caught:
        open_training(config, mixed, steps=rows)
    assert caught.value.where == "data.mixture" and f"train.steps={2 * rows // 16} or less" in caught.value.fix
    loader = BatchLoader(open_training(config, mixed, steps=2 * rows // 16), 16)
    assert sum(len(batch.rows) for batch in loader) == 2 * rows // 16 * 16


def test_source_without_a_row_is_named(mixed: Path, inputs: dict[str, dict[str, str]]) -> None:
    long = configure(inputs, mixed.parent, sequence_length_tokens=700)
    with pytest.raises(DataError, match=r"data\.sources\.latin"):
        open_training(long, mixed)


class _Numbers:
    """A source whose row i is (its number, i, i, ...): what a batch is made of can be read from it."""

    def __init__(self, place: int, rows: int) -> None:
        self.place, self.rows = place, rows
        self.content_sha256 = f"{place}:{rows}"

    def num_rows(self, sequence_length: int) -> int:
        return self.rows

    def row(self, i: int, sequence_length: int) -> np.ndarray:
        assert 0 <= i < self.rows
        return np.array([self.place] + [i] * sequence_length)


@st.composite
def runs(draw: st.DrawFn) -> tuple[TrainingRows, list[MixtureStage]]:
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    rows = {name: draw(st.integers(1, 400)) for name in names}
    share = st.sampled_from([0.0, 0.25, 1.0, 1.5, 7.0])
    shares = st.fixed_dictionaries(dict.fromkeys(names, share)).filter(lambda found: any(found.values()))
    stages = []
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            stages.append(MixtureStage(tokens=draw(st.integers(1, 300 * LONG)), weights=draw(shares)))
        else:
            stages.append(MixtureStage(epochs={name: draw(st.sampled_from([1.0, 2.0, 2.5])) for name in names}))
    if stages:
        stages.append(MixtureStage(weights=draw(shares)))
    seed, window = draw(st.integers(0, 2**64)), draw(st.sampled_from([1, 2**19, 2**21]))  # 1, 2, 8 blocks
    order = RunOrder(seed, rows, stages_of(stages, rows, LONG), LONG, window)
    assert order.block_rows == 64
    sources = {name: _Numbers(i, n) for i, (name, n) in enumerate(rows.items())}
    return TrainingRows(sources, order), stages  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(runs(), st.data())
def test_global_batches_are_the_same_however_ranks_accumulation_and_prefetching_change(
    run: tuple[TrainingRows, list[MixtureStage]], data: st.DataObject
) -> None:
    training, _ = run
    batch = data.draw(st.integers(1, 23))
    whole = BatchLoader(training, batch)
    cursor = data.draw(st.sampled_from([0, 3 * batch, 1000 * batch, 10**12 // batch * batch]))
    state = {**whole.state_dict(), "cursor": cursor}
    whole.load_state_dict(state)
    for _ in range(data.draw(st.integers(1, 4))):  # generations, each with another number of ranks
        ranks, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
        loaders = [Prefetch(BatchLoader(training_again(training), batch, r, ranks), r % 3) for r in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        for _ in range(steps):
            parts = [next(loader).rows for loader in loaders]
            micro = data.draw(st.integers(1, 5))  # accumulation cuts a rank's rows, and changes neither them nor order
            pieces = [part[i : i + micro] for part in parts for i in range(0, len(part), micro)]
            assert np.array_equal(np.concatenate(pieces), next(whole).rows)
        states = [loader.state_dict() for loader in loaders]
        assert all(found == whole.state_dict() for found in states)
        state = states[-1]
        for loader in loaders:
            loader.close()


def training_again(training: TrainingRows) -> TrainingRows:
    """Another process's copy: what it has located already is its own."""
    order = training.order
    rows = {name: split.num_rows(LONG) for name, split in training.sources.items()}
    fresh = RunOrder(order.seed, rows, order.mixture.stages, LONG, order.window_blocks * order.block_rows * LONG)
    return TrainingRows(training.sources, fresh)


@settings(deadline=None, max_examples=25)
@given(runs())
def test_every_sample_occurs_exactly_as_often_as_the_mixture_says(run: tuple[TrainingRows, list[MixtureStage]]) -> None:
    training, stages = run
    rows = [split.num_rows(LONG) for split in training.sources.values()]
    total = 3 * sum(rows) if not stages else training.order.mixture._starts[-1] + 8192
    sources, found = training.order.locate_range(0, total)
    taken = np.bincount(sources, minlength=len(rows))
    if not stages:
        assert taken.tolist() == [3 * count for count in rows]
    else:
        assert taken.tolist() == expected_counts(training, stages, total)
    for source, count in enumerate(rows):
        times = np.bincount(found[sources == source], minlength=count)
        assert len(times) == count and times.sum() == taken[source]
        assert times.max() - times.min() <= 1 and times.min() == taken[source] // count


def expected_counts(training: TrainingRows, stages: list[MixtureStage], total: int) -> list[int]:
    """What a person would count: epochs times rows, and weights' shares of a stage, the rest to the largest."""
    rows = {name: split.num_rows(LONG) for name, split in training.sources.items()}
    counts, left, tokens = dict.fromkeys(rows, 0), total, 0
    by_weight = 0
    for stage in stages:
        if stage.epochs:
            taken = {name: int(times * rows[name]) for name, times in stage.epochs.items()}
        else:
            length = left
            if stage.tokens is not None:
                tokens += stage.tokens
                length = -(-tokens // LONG) - by_weight
                by_weight += length
            weights = stage.weights
            taken = {name: int(length * share / sum(weights.values())) for name, share in weights.items()}
            largest = max(rows, key=lambda name: weights.get(name, 0))
            taken[largest] += length - sum(taken.values())
        for name, number in taken.items():
            counts[name] += number
        left -= sum(taken.values())
    return list(counts.values())

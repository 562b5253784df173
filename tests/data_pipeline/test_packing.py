"""Best-fit packing: the example of the documentation, properties of any plan, and builds whose rows are packed."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import packing
from data_pipeline.bigram import count_bigrams
from data_pipeline.build import build
from data_pipeline.lengths import LengthFile, find_lengths, lengths_name, write_lengths
from data_pipeline.loader import BatchLoader, heldout_rows, open_training
from data_pipeline.manifest import LENGTHS_VERSION, Manifest, read_manifest, write_manifest
from data_pipeline.packing import PADDING, PackedSplit, best_fit, open_rows, plan_rows, separating_token
from data_pipeline.shards import ShardWriter, TokenSplit, file_sha256
from data_pipeline.verification import verify_build
from moe_dist.config import Config
from moe_dist.errors import CheckpointError, DataError
from moe_dist.objectives import micro_batch
from tests.data_pipeline.conftest import _configure

END, VOCAB = 0, 1000


def written(folder: Path, shards: list[list[int]]) -> TokenSplit:
    """A build whose training shards have documents of these lengths; their tokens count up from 1."""
    rows, next_token = [], 1
    for number, lengths in enumerate(shards):
        writer = ShardWriter(folder / f"train-{number}.arrow", VOCAB)
        for length in lengths:
            ids = np.arange(next_token, next_token + length - 1) % (VOCAB - 1) + 1
            writer.add(np.append(ids, END).astype(np.int32), length)
            next_token += length - 1
        rows.append(writer.close())
    splits = {"train": tuple(rows), "heldout": ()}
    hashes = write_lengths(folder, splits, END, folder)
    manifest = Manifest(LENGTHS_VERSION, "f", {}, "", VOCAB, END, splits, 0, (), {}, lengths=hashes)
    write_manifest(folder, manifest)
    return TokenSplit(folder, "train")


def test_rows_of_the_documented_example(tmp_path: Path) -> None:
    split = PackedSplit(written(tmp_path, [[9, 3, 4, 2], [3]]))
    stream = split.split.tokens(0, 21).tolist()
    a, b, c, d, e = stream[:9], stream[9:12], stream[12:16], stream[16:18], stream[18:21]
    assert split.num_rows(6) == 4
    assert split.row(0, 6).tolist() == [END, *a[:6]]
    assert split.row(1, 6).tolist() == [a[5], *a[6:], *b]
    assert split.row(2, 6).tolist() == [END, *c, *d]
    assert split.row(3, 6).tolist() == [END, *e, PADDING, PADDING, PADDING]
    assert np.array_equal(np.concatenate(list(split.all_rows(6, 3))), [split.row(i, 6) for i in range(4)])
    for i in (-1, 4):
        with pytest.raises(IndexError):
            split.row(i, 6)


def test_rest_of_a_cut_document_begins_its_row_after_the_token_before_it(tmp_path: Path) -> None:
    split = PackedSplit(written(tmp_path, [[3, 9]]))
    stream = split.split.tokens(0, 12).tolist()
    assert split.row(0, 6).tolist() == [stream[8], *stream[9:], *stream[:3]]
    assert split.row(1, 6).tolist() == [END, *stream[3:9]]


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    # 7 leaves 3, 6 leaves 4, 4 fills the second, 3 fills the first, 3 and 3 and 1 share a third
    assert best_fit([7, 6, 4, 3, 3, 3, 1], room=10) == [0, 1, 1, 0, 2, 2, 2]
    assert best_fit([], room=10) == []


def slow_best_fit(sizes: list[int], room: int) -> list[int]:
    """Room that is left in each row, by looking at all of them."""
    left: list[int] = []
    for size in sizes:
        fitting = [row for row, space in enumerate(left) if space >= size]
        if fitting:
            left[min(fitting, key=lambda row: left[row])] -= size
        else:
            left.append(room - size)
    return left


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 16))
@settings(max_examples=150, deadline=None)
def test_plan_has_every_token_once_and_cuts_only_what_is_longer_than_a_row(lengths: list[int], room: int) -> None:
    plan = plan_rows(np.array(lengths, dtype=np.int64), room)
    rows = [plan.pieces(row) for row in range(plan.num_rows)]
    pieces = [piece for row in rows for piece in row]
    assert Counter(t for start, stop in pieces for t in range(start, stop)) == Counter(range(sum(lengths)))
    assert all(0 < sum(stop - start for start, stop in row) <= room for row in rows)
    ends = np.cumsum(lengths)
    begins = {int(end) - length: (int(end), length) for end, length in zip(ends, lengths, strict=True)}
    for start, stop in pieces:
        if start in begins and begins[start][1] <= room:
            assert begins.pop(start)[0] == stop, "a document that fits in a row is whole"
    assert all(length > room for _, length in begins.values())
    firsts = [min(start for start, _ in row) for row in rows]
    assert firsts == sorted(firsts)
    sizes = sorted((length % room for length in lengths if length % room), reverse=True)
    left = [room - sum(stop - start for start, stop in row) for row in rows]
    assert sorted(space for space in left if space) == sorted(space for space in slow_best_fit(sizes, room) if space)


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_rows_have_every_token_as_a_target_once_after_the_token_before_it(shards: list[list[int]], room: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        split = PackedSplit(written(Path(folder), shards))
        stream = split.split.tokens(0, split.num_tokens).tolist()
        rows = [split.row(i, room) for i in range(split.num_rows(room))]
        targets = [int(t) for row in rows for t in row[1:] if t != PADDING]
        assert Counter(targets) == Counter(stream)
        after = set(zip([END, *stream], stream, strict=False)) | {(END, token) for token in stream}
        for row in rows:
            kept = row[row != PADDING].tolist()
            assert row[: len(kept)].tolist() == kept, "padding stands at the end"
            assert set(itertools.pairwise(kept)) <= after


def configured(texts: Path, target: Path, **data: object) -> Config:
    return _configure(texts, target, holdout_fraction=0.1, packing="best_fit", **data)


@pytest.fixture(scope="module")
def packed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of `texts` for best-fit packing. Not to be changed: copy it."""
    return build(configured(texts, tmp_path_factory.mktemp("packed")), use_ray=False)


def test_packed_build_has_the_shards_of_another_and_lengths_beside_them(packed: Path, built: Path) -> None:
    new, old = read_manifest(packed), read_manifest(built)
    assert new.splits == old.splits and new.fingerprint != old.fingerprint
    assert (new.version, old.version, old.lengths) == (LENGTHS_VERSION, 1, None)
    assert '"lengths"' not in (built / "manifest.json").read_text() and not list(built.glob("lengths-*"))
    assert new.lengths == {split: file_sha256(packed / lengths_name(split)) for split in ("train", "heldout")}
    assert verify_build(packed)["tokens"] == verify_build(built)["tokens"]
    shards = new.splits["train"]
    stream = TokenSplit(packed, "train").tokens(0, new.num_tokens("train"))
    lengths = np.concatenate([LengthFile(packed, "train", new).of_shard(i) for i in range(len(shards))])
    assert np.array_equal(find_lengths([stream], new.end_of_text), lengths)


def test_loader_of_packed_rows_reads_each_row_once_an_epoch_and_knows_its_packing(packed: Path, texts: Path) -> None:
    config = configured(texts, packed.parent)
    split = open_rows(config, packed, "train")
    assert isinstance(split, PackedSplit)
    count = split.num_rows(32)
    loader = BatchLoader(open_training(config, packed), count)
    rows = next(loader).rows
    assert Counter(map(tuple, rows.tolist())) == Counter(tuple(split.row(i, 32).tolist()) for i in range(count))
    assert (rows == PADDING).any() and int((rows[:, 1:] >= 0).sum()) == split.num_tokens
    state = loader.state_dict()
    BatchLoader(open_training(config, packed), 4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="content_sha256"):
        BatchLoader(open_training(_configure(texts, packed.parent), packed), 4).load_state_dict(state)
    assert heldout_rows(open_rows(config, packed, "heldout"), 32, 3).shape == (3, 33)


def test_open_rows_and_separating_token_follow_the_config(built: Path, packed: Path, texts: Path) -> None:
    plain = _configure(texts, built.parent)
    assert isinstance(open_rows(plain, built, "train"), TokenSplit) and separating_token(plain, built) is None
    apart = _configure(texts, built.parent, documents="separate")
    assert separating_token(apart, built) == read_manifest(built).end_of_text
    with pytest.raises(DataError) as caught:
        open_rows(configured(texts, built.parent), built, "train")
    assert "data.packing=best_fit" in caught.value.fix
    assert packing.PADDING == micro_batch.PADDING


def test_bigrams_of_padded_rows_are_those_without_padding() -> None:
    whole = np.array([[5, 6, 7], [7, 5, 6]])
    padded = np.array([[5, 6, 7, PADDING, PADDING], [7, 5, 6, PADDING, PADDING], [PADDING] * 5])
    models = [count_bigrams([rows], 10) for rows in (whole, padded)]
    scores = [
        model.score([rows], np.ones(10, dtype=np.int64)) for model, rows in zip(models, (whole, padded), strict=True)
    ]
    assert scores[0] == scores[1] and scores[0].tokens == 4


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut_short, flipped, Path.unlink])
def test_damaged_lengths_are_named_and_never_read(packed: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    path = folder / lengths_name("train")
    damage(path)
    for read in (lambda: PackedSplit(TokenSplit(folder, "train")), lambda: verify_build(folder)):
        with pytest.raises(DataError) as caught:
            read()
        assert caught.value.where == str(path)


def test_lengths_of_a_stranger_that_are_not_those_of_the_tokens_are_refused(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    manifest, path = read_manifest(folder), folder / lengths_name("train")
    lengths = np.fromfile(path, "<u4")
    assert manifest.splits["train"][0].documents >= 2 and manifest.lengths
    lengths[:2] += np.array([1, -1], dtype=np.int64).astype("<u4")
    lengths.tofile(path)
    hashes = {**manifest.lengths, "train": file_sha256(path)}
    write_manifest(folder, dataclasses.replace(manifest, lengths=hashes))
    with pytest.raises(DataError, match="other lengths"):
        verify_build(folder)
    lengths[0] += 1
    lengths.tofile(path)
    write_manifest(folder, dataclasses.replace(manifest, lengths={**hashes, "train": file_sha256(path)}))
    with pytest.raises(DataError):
        PackedSplit(TokenSplit(folder, "train")).num_rows(32)

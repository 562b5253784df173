from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.shards import BATCH_TOKENS, ShardWriter, TokenSplit
from moe_dist.errors import DataError


def _write_split(folder: Path, parts: list[np.ndarray], vocab_size: int = 1000) -> list[Shard]:
    shards = []
    for i, part in enumerate(parts):
        writer = ShardWriter(folder / f"train-{i}.arrow", vocab_size)
        for document in np.array_split(part, 7):
            writer.add(document, len(document))
        shards.append(writer.close())
    splits = {"train": tuple(shards), "heldout": ()}
    write_manifest(folder, Manifest(1, "f", {}, "", vocab_size, 0, splits, 0, (), {}))
    return shards


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, 200_000).astype(np.int32)


@pytest.fixture
def folder(tmp_path: Path, tokens: np.ndarray) -> Path:
    """Three shards of several batches each but the second, which is tiny."""
    _write_split(tmp_path, np.split(tokens, [70_000, 70_005]))
    return tmp_path


@pytest.mark.parametrize("sequence_length", [1, 2, 255, 4096, 199_999])
def test_rows_are_windows_of_the_whole_stream_across_shards(
    folder: Path, tokens: np.ndarray, sequence_length: int
) -> None:
    split = TokenSplit(folder, "train")
    assert split.num_tokens == 200_000
    assert split.num_rows(sequence_length) == 199_999 // sequence_length
    across = range(70_000 // sequence_length - 2, 70_000 // sequence_length + 3)
    for i in {0, *across, split.num_rows(sequence_length) - 1} & set(range(split.num_rows(sequence_length))):
        row = split.row(i, sequence_length)
        assert row.dtype == np.int64
        assert row.tolist() == tokens[i * sequence_length : i * sequence_length + sequence_length + 1].tolist()


def test_rows_together_have_each_target_once(folder: Path, tokens: np.ndarray) -> None:
    parts = list(TokenSplit(folder, "train").all_rows(100, rows_per_batch=64))
    rows = np.concatenate(parts)
    assert max(len(part) for part in parts) == 64
    assert np.array_equal(rows[:, 1:].ravel(), tokens[1 : 1 + rows[:, 1:].size])
    assert np.array_equal(rows[:, :-1].ravel(), tokens[: rows[:, 1:].size])


def test_row_outside_is_an_index_error(folder: Path) -> None:
    split = TokenSplit(folder, "train")
    for i in (-1, split.num_rows(100)):
        with pytest.raises(IndexError):
            split.row(i, 100)


def test_rows_fewer_tokens_than_one_row_are_none(tmp_path: Path) -> None:
    _write_split(tmp_path, [np.arange(10, dtype=np.int32)])
    assert TokenSplit(tmp_path, "train").num_rows(9) == 1
    assert TokenSplit(tmp_path, "train").num_rows(10) == 0
    assert TokenSplit(tmp_path, "heldout").num_rows(1) == 0


@pytest.mark.parametrize(("vocab_size", "kind"), [(65_536, pa.uint16()), (65_537, pa.int32())])
def test_ids_have_the_width_of_the_vocabulary(tmp_path: Path, vocab_size: int, kind: pa.DataType) -> None:
    _write_split(tmp_path, [np.array([0, 5, vocab_size - 1], dtype=np.int32)], vocab_size)
    table = pa.ipc.open_file(str(tmp_path / "train-0.arrow")).read_all()
    assert table.schema.field("tokens").type == kind
    assert TokenSplit(tmp_path, "train").row(0, 2).tolist() == [0, 5, vocab_size - 1]


def test_shard_has_batches_of_the_stated_size(folder: Path) -> None:
    reader = pa.ipc.open_file(str(folder / "train-2.arrow"))
    sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes == [BATCH_TOKENS, 129_995 - BATCH_TOKENS]


def test_cache_is_bounded_and_does_not_change_rows(folder: Path) -> None:
    small, large = TokenSplit(folder, "train", cache_bytes=1), TokenSplit(folder, "train")
    for i in random.Random(0).sample(range(small.num_rows(1000)), 60):
        assert np.array_equal(small.row(i, 1000), large.row(i, 1000))
        assert len(small._cache) == 1


def test_flipped_byte_anywhere_is_found_before_a_token_is_read(folder: Path) -> None:
    source = random.Random(0)
    for _ in range(100):
        path = folder / f"train-{source.randrange(3)}.arrow"
        good = path.read_bytes()
        bad = bytearray(good)
        bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
        path.write_bytes(bad)
        split = TokenSplit(folder, "train")
        with pytest.raises(DataError, match=path.name):
            split.verify()
        with pytest.raises(DataError, match=path.name):
            list(split.all_rows(1000))
        path.write_bytes(good)
    TokenSplit(folder, "train").verify()


@pytest.mark.parametrize("left", [0, 1, 1000, -1])
def test_truncated_shard_is_found_on_open(folder: Path, left: int) -> None:
    path = folder / "train-0.arrow"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=r"train-0\.arrow"):
        TokenSplit(folder, "train")


def test_missing_shard_is_found_on_open(folder: Path) -> None:
    (folder / "train-1.arrow").unlink()
    with pytest.raises(DataError, match=r"train-1\.arrow"):
        TokenSplit(folder, "train")


def test_shard_truncated_or_removed_while_open_is_an_error(folder: Path) -> None:
    split = TokenSplit(folder, "train", cache_bytes=1)
    split.verify()
    split.row(0, 100)
    split.row(195, 1000)
    path = folder / "train-0.arrow"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"train-0\.arrow"):
        split.row(0, 100)
    path.unlink()
    with pytest.raises(DataError, match=r"train-0\.arrow"):
        split.row(0, 100)


def test_content_hash_tells_tokens_apart_and_not_folders(tmp_path: Path, folder: Path, tokens: np.ndarray) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "other").mkdir()
    changed = tokens.copy()
    changed[-1] ^= 1
    _write_split(tmp_path / "other", np.split(changed, [70_000, 70_005]))
    mine = TokenSplit(folder, "train").content_sha256
    assert mine == TokenSplit(tmp_path / "copy", "train").content_sha256
    assert mine != TokenSplit(tmp_path / "other", "train").content_sha256


def test_discarded_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.arrow", 1000)
    writer.add(np.arange(10, dtype=np.int32), 10)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_split_of_unknown_name_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="train, heldout"):
        TokenSplit(folder, "test")


def test_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert manifest.num_tokens("train") == 200_000


def test_manifest_missing_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        TokenSplit(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(version=99), "version 99"),
        (lambda tree: tree["splits"]["train"][0].update(tokens=1), "manifest_sha256"),
        (lambda tree: tree.pop("manifest_sha256"), "manifest is whole"),
    ],
)
def test_manifest_changed_is_an_error(folder: Path, change: object, words: str) -> None:
    tree = json.loads((folder / MANIFEST_NAME).read_text())
    assert callable(change)
    change(tree)
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=words):
        TokenSplit(folder, "train")


def test_manifest_cut_off_is_an_error(folder: Path) -> None:
    data = (folder / MANIFEST_NAME).read_bytes()
    for cut in (0, 1, 10, len(data) // 2, len(data) - 1):
        (folder / MANIFEST_NAME).write_bytes(data[:cut])
        with pytest.raises(DataError, match="manifest is whole"):
            TokenSplit(folder, "train")

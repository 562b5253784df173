"""The exported dataset, read back by a reader written from the published layout alone."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import SPLITS, Manifest, read_manifest, write_manifest
from data_pipeline.megatron import export_megatron, token_dtype
from data_pipeline.shards import ShardWriter, TokenSplit
from moe_dist.errors import DataError

# Codes of Megatron's `DType`.
KINDS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


@dataclass(frozen=True)
class Indexed:
    """What Megatron's reader finds in a pair of files."""

    lengths: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray
    data: np.memmap
    kind: type

    def sequence(self, i: int) -> np.ndarray:
        return np.frombuffer(self.data, dtype=self.kind, count=self.lengths[i], offset=self.pointers[i])


def read_indexed(prefix: str) -> Indexed:
    with open(f"{prefix}.idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", file.read(8)) == (1,)
        kind = KINDS[struct.unpack("<B", file.read(1))[0]]
        sequences, documents = struct.unpack("<QQ", file.read(16))
        offset = file.tell()
    index = np.memmap(f"{prefix}.idx", mode="r")
    lengths = np.frombuffer(index, dtype=np.int32, count=sequences, offset=offset)
    pointers = np.frombuffer(index, dtype=np.int64, count=sequences, offset=offset + lengths.nbytes)
    offset += lengths.nbytes + pointers.nbytes
    document_indices = np.frombuffer(index, dtype=np.int64, count=documents, offset=offset)
    assert offset + document_indices.nbytes == index.size, "bytes after the index"
    return Indexed(lengths, pointers, document_indices, np.memmap(f"{prefix}.bin", mode="r"), kind)


def _write_build(folder: Path, documents: list[np.ndarray], vocab_size: int, shards: int = 3) -> Path:
    folder.mkdir()
    rows = []
    for number in range(shards):
        writer = ShardWriter(folder / f"train-{number}.arrow", vocab_size)
        for document in documents[number * len(documents) // shards : (number + 1) * len(documents) // shards]:
            writer.add(document, len(document))
        rows.append(writer.close())
    heldout = ShardWriter(folder / "heldout-0.arrow", vocab_size)
    heldout.add(np.array([5, 0], dtype=np.int32), 1)
    splits = {"train": tuple(rows), "heldout": (heldout.close(),)}
    write_manifest(folder, Manifest(1, "f", {}, "", vocab_size, 0, splits, 0, (), {}))
    return folder


def _documents(number: int, vocab_size: int, longest: int) -> list[np.ndarray]:
    source = np.random.default_rng(0)
    lengths = source.integers(0, longest, number)
    return [np.append(source.integers(1, vocab_size, n), 0).astype(np.int32) for n in lengths]


def test_export_of_a_build_has_its_tokens_and_one_sequence_for_each_document(built: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = export_megatron(built, tmp_path / "out/corpus", lambda done, total: seen.append((done, total)))
    manifest = read_manifest(built)
    for split in SPLITS:
        indexed = read_indexed(found[split]["prefix"])
        stream = TokenSplit(built, split).tokens(0, manifest.num_tokens(split))
        assert indexed.kind is np.uint16
        sequences = [indexed.sequence(i) for i in range(len(indexed.lengths))]
        assert np.array_equal(np.concatenate(sequences), stream)
        assert all(np.flatnonzero(s == manifest.end_of_text).tolist() == [len(s) - 1] for s in sequences)
        assert indexed.document_indices.tolist() == list(range(len(sequences) + 1))
        assert found[split]["documents"] == len(sequences) == sum(s.documents for s in manifest.splits[split])
        assert found[split]["tokens"] == len(stream)
    assert seen[-1][0] == seen[-1][1] == sum(manifest.num_tokens(split) for split in SPLITS)
    names = {f"corpus_{split}{ending}" for split in SPLITS for ending in (".bin", ".idx")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize(("vocab_size", "kind"), [(65_499, np.uint16), (65_500, np.int32), (150_000, np.int32)])
def test_export_documents_across_batches_and_both_widths_come_back(tmp_path: Path, vocab_size: int, kind: type) -> None:
    documents = [*_documents(40, vocab_size, 20_000), np.append(np.full(200_000, vocab_size - 1), 0).astype(np.int32)]
    documents += _documents(5, vocab_size, 3)
    folder = _write_build(tmp_path / "build", documents, vocab_size)
    assert token_dtype(vocab_size) == kind
    indexed = read_indexed(export_megatron(folder, tmp_path / "m")["train"]["prefix"])
    assert indexed.kind is kind
    assert indexed.lengths.tolist() == [len(document) for document in documents]
    for i, document in enumerate(documents):
        assert np.array_equal(indexed.sequence(i), document)


def test_export_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    folder = _write_build(tmp_path / "build", _documents(10, 100, 10), 100)
    manifest = read_manifest(folder)
    writer = ShardWriter(folder / "train-0.arrow", 100)
    for _ in range(40):
        writer.add(np.tile(np.array([7, 0], dtype=np.int32), 25_000), 1)
    writer.documents = 1_000_000
    splits = {**manifest.splits, "train": (writer.close(),)}
    for path in folder.glob("train-[12].arrow"):
        path.unlink()
    write_manifest(folder, Manifest(1, "f", {}, "", 100, 0, splits, 0, (), {}))
    tracemalloc.start()
    found = export_megatron(folder, tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["train"]["documents"] == 1_000_000
    assert peak < 4 * 2**20, "the index alone has 20 MB"
    indexed = read_indexed(found["train"]["prefix"])
    assert set(indexed.lengths.tolist()) == {2}
    assert np.array_equal(indexed.pointers, np.arange(1_000_000) * 4)


def test_export_overwrites_nothing(built: Path, tmp_path: Path) -> None:
    (tmp_path / "m_heldout.idx").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"m_heldout\.idx exists"):
        export_megatron(built, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m_heldout.idx"]
    assert (tmp_path / "m_heldout.idx").read_bytes() == b"mine"


def test_export_of_a_damaged_build_names_the_shard_and_leaves_nothing(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / built.name))
    path = max(folder.glob("heldout-*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name):
        export_megatron(folder, tmp_path / "out/m")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_of_forged_document_counts_names_the_shard(tmp_path: Path) -> None:
    folder = _write_build(tmp_path / "build", _documents(10, 100, 10), 100)
    writer = ShardWriter(folder / "heldout-0.arrow", 100)
    writer.add(np.array([5, 0, 3], dtype=np.int32), 1)
    splits = {**read_manifest(folder).splits, "heldout": (writer.close(),)}
    write_manifest(folder, Manifest(1, "f", {}, "", 100, 0, splits, 0, (), {}))
    with pytest.raises(DataError, match=r"heldout-0\.arrow"):
        export_megatron(folder, tmp_path / "out/m")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_into_a_place_that_is_no_folder_is_a_named_error(built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="--out"):
        export_megatron(built, tmp_path / "file/m")

"""Folders as `save_to_disk` of Hugging Face `datasets` writes them, whole, damaged and made up."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build
from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile, list_input
from data_pipeline.manifest import read_manifest
from data_pipeline.shards import TokenSplit
from moe_dist.errors import DataError
from tests.data_pipeline.test_build import configure

TEXTS = [f"text {i} größe " * 20 for i in range(130)]


def _save(folder: Path, table: pa.Table, files: int = 2, options: pa.ipc.IpcWriteOptions | None = None) -> Path:
    """What `Dataset.save_to_disk(folder, num_shards=files)` leaves: streams of record batches, and two JSON files."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        start, stop = i * len(table) // files, (i + 1) * len(table) // files
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as out:
            out.write_table(table.slice(start, stop - start), max_chunksize=20)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def _table(kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"n": range(130), "text": pa.array(TEXTS).cast(kind or pa.string()), "last": [0.5] * 130})


def _found(source: Path) -> list[Document | DataError]:
    return [found for file in list_input(str(source), (".txt",)).files for found in read_documents(file, "text")]


def _texts(source: Path) -> list[str]:
    return [found.text for found in _found(source) if isinstance(found, Document)]


def _change_state(folder: Path, **fields: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | fields))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_saved_dataset_is_read_in_order_and_rows_are_named_from_zero(tmp_path: Path, kind: pa.DataType) -> None:
    folder = _save(tmp_path / "set", _table(kind))
    found = _found(folder)
    assert [document.text for document in found if isinstance(document, Document)] == TEXTS
    assert isinstance(found[0], Document)
    assert isinstance(found[65], Document)
    assert (found[0].id, found[65].id) == ("data-00000-of-00002.arrow:0", "data-00001-of-00002.arrow:0")


def test_saved_splits_among_other_files_are_found_and_caches_are_left_aside(tmp_path: Path) -> None:
    _save(tmp_path / "in/dict/train", _table())
    _save(tmp_path / "in/dict/test", _table(), files=1)
    (tmp_path / "in/dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "in/dict/train/cache-0123.arrow").write_bytes(b"no stream")
    (tmp_path / "in/loose.arrow").write_bytes(b"no stream")
    (tmp_path / "in/a.txt").write_text("plain")
    listing = list_input(str(tmp_path / "in"), (".txt",))
    assert [file.id for file in listing.files] == [
        "a.txt",
        "dict/test/data-00000-of-00001.arrow",
        "dict/train/data-00000-of-00002.arrow",
        "dict/train/data-00001-of-00002.arrow",
    ]
    assert listing.ignored_endings == {".arrow": 2, ".json": 1}


def test_saved_dataset_builds_the_tokens_that_parquet_of_it_builds(tmp_path: Path) -> None:
    table = _table()
    folder = _save(tmp_path / "set", table, files=1)
    name = "data-00000-of-00001.arrow"
    (tmp_path / "pq").mkdir()
    pq.write_table(table, tmp_path / "pq" / f"{name}.parquet")
    built = build(configure(folder, tmp_path / "out"), use_ray=False)
    manifest = read_manifest(built)
    assert sum(shard.documents for split in manifest.splits.values() for shard in split) == 130
    other = build(configure(tmp_path / "pq", tmp_path / "out"), use_ray=False)
    total = [sum(TokenSplit(b, split).num_tokens for split in ("train", "heldout")) for b in (built, other)]
    assert total[0] == total[1]


def test_saved_dataset_empty_is_no_document(tmp_path: Path) -> None:
    assert _found(_save(tmp_path / "set", _table().slice(0, 0), files=1)) == []


def test_saved_null_and_bytes_that_are_no_utf8_are_errors_in_their_place(tmp_path: Path) -> None:
    values = pa.array([b"a", None, b"caf\xe9", b"d", b"a\0"]).view(pa.string())
    found = _found(_save(tmp_path / "set", pa.table({"text": values}), files=1))
    assert [type(document) for document in found] == [Document, DataError, DataError, Document, DataError]
    assert [document.where for document in found if isinstance(document, DataError)] == [
        f"data-00000-of-00001.arrow:{row}" for row in (1, 2, 4)
    ]


def test_saved_file_cut_anywhere_is_an_error_and_never_short(tmp_path: Path) -> None:
    path = _save(tmp_path / "set", _table(), files=1) / "data-00000-of-00001.arrow"
    data = path.read_bytes()
    source = random.Random(0)
    messages = [i for i in range(0, len(data), 8) if data[i : i + 4] == b"\xff\xff\xff\xff"]
    assert len(messages) >= 8, "a schema, batches and an end"
    for cut in {0, 1, 7, *messages, len(data) - 1, *source.sample(range(len(data)), 60)}:
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="read to its end"):
            _found(path.parent)
    path.write_bytes(data + b"tail")
    with pytest.raises(DataError, match="4 bytes after"):
        _found(path.parent)


def test_saved_file_with_flipped_bytes_ends_in_text_or_a_named_error(tmp_path: Path) -> None:
    table, refused = _table(), 0
    path = _save(tmp_path / "set", table, files=1) / "data-00000-of-00001.arrow"
    data = path.read_bytes()
    source = random.Random(0)
    headers = range(min(1200, len(data)))
    for place in [*source.sample(headers, 300), *source.sample(range(len(data)), 300)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        try:
            found = _found(path.parent)
        except DataError as error:
            refused += error.where == path.name
            continue
        assert len(found) == len(table), f"byte {place} lost rows in silence"
    assert refused > 100, "most of a header carries what must be right"


def test_saved_file_of_compressed_batches_is_refused(tmp_path: Path) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    table = pa.table({"text": ["a" * 2**20] * 40})
    folder = _save(tmp_path / "set", table, files=1, options=options)
    assert (folder / "data-00000-of-00001.arrow").stat().st_size < 2**17
    with pytest.raises(DataError, match="compressed"):
        _found(folder)


def test_saved_file_that_is_missing_is_an_error_with_its_name(tmp_path: Path) -> None:
    folder = _save(tmp_path / "set", _table())
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="No such file") as caught:
        _found(folder)
    assert caught.value.where == "data-00001-of-00002.arrow"


@pytest.mark.parametrize(
    "name", ["../secret.arrow", "/etc/passwd", "sub/x.arrow", "..", "", "state.json", "a\0.arrow", 3, None]
)
def test_state_that_names_another_place_is_refused(tmp_path: Path, name: object) -> None:
    folder = _save(tmp_path / "set", _table())
    shutil.copy(folder / "data-00000-of-00002.arrow", tmp_path / "secret.arrow")
    _change_state(folder, _data_files=[{"filename": name}])
    with pytest.raises(DataError, match="in the same folder"):
        list_input(str(folder), (".txt",))


def test_state_that_is_damaged_or_reorders_rows_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "set", _table())
    _change_state(folder, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        list_input(str(folder), (".txt",))
    for text in ("", "{", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', "[" * 100_000, '"x"'):
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError, match="names its data files"):
            list_input(str(folder), (".txt",))


def test_arrow_file_named_alone_points_to_its_folder(tmp_path: Path) -> None:
    folder = _save(tmp_path / "set", _table())
    with pytest.raises(DataError, match="name the folder"):
        list_input(str(folder / "data-00000-of-00002.arrow"), (".txt",))


def test_saved_file_with_two_columns_of_the_name_or_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="2 columns named text"):
        _found(_save(tmp_path / "twice", twice, files=1))
    path = _save(tmp_path / "set", pa.table({"text": ["a"]}), files=1) / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xff\xff"))
    with pytest.raises(DataError, match="read to its end"):
        _found(path.parent)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_table_without_text_or_of_dialogues_is_a_named_error(tmp_path: Path, form: str) -> None:
    turns = [[{"role": "user", "content": "hello"}]]
    for columns, field, words in (
        ({"id": [1], "context": ["x"]}, "content", "data.text_field=context"),
        ({"text": [1]}, "text", "column text is int64"),
        ({"conversations": turns}, "text", "instruction tuning"),
        ({"conversations": turns}, "conversations", "instruction tuning"),
        ({"text": turns}, "text", "the text column holds strings"),
    ):
        folder = _save(tmp_path / words.replace(" ", "") / field, pa.table(columns), files=1)
        file = list_input(str(folder), (".txt",)).files[0]
        if form == "parquet":
            path = folder / "a.parquet"
            pq.write_table(pa.table(columns), path)
            file = InputFile("a.parquet", str(path), ".parquet", 0, 0)
        with pytest.raises(DataError, match=words):
            list(read_documents(file, field))

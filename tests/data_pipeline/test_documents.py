from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import streams
from data_pipeline.documents import PIECE_BYTES, WHOLE_FILE_BYTES, Document, read_documents
from data_pipeline.listing import InputFile
from moe_dist.errors import DataError

Write = Callable[[str, bytes], InputFile]


def _read(file: InputFile, field: str = "text") -> list[Document]:
    found = list(read_documents(file, field))
    assert all(isinstance(document, Document) for document in found), found
    return [document for document in found if isinstance(document, Document)]


def _one_error(file: InputFile, field: str = "text") -> DataError:
    errors = [found for found in read_documents(file, field) if isinstance(found, DataError)]
    assert len(errors) == 1
    return errors[0]


def _lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_plain_file_is_one_document_with_its_bytes_counted(input_file: Write) -> None:
    assert _read(input_file("a.txt", "größe\r\n".encode())) == [Document("a.txt", "größe\r\n", 9)]


def test_plain_file_not_utf8_gives_the_byte_offset(input_file: Write) -> None:
    with pytest.raises(DataError, match="byte 0xff at offset 3"):
        _read(input_file("a.txt", b"abc\xffdef"))


def test_plain_file_utf16_is_refused_for_its_nul(input_file: Write) -> None:
    with pytest.raises(DataError, match="byte 0x00 at offset 1"):
        _read(input_file("a.txt", "abc".encode("utf-16-le")))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), ends_of_lines=st.integers(0, 3), parts=st.integers(100, 900))
def test_plain_large_file_is_cut_into_bounded_pieces_that_join_to_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int, ends_of_lines: int, parts: int
) -> None:
    source = random.Random(seed)
    words = ["a" * 997, "é" * 501, "🙂" * 333, *["\n"] * ends_of_lines]
    text = "".join(source.choices(words, k=parts)) + "x" * source.randint(0, 3)
    path = tmp_path_factory.mktemp("large") / "large.txt"
    path.write_text(text, encoding="utf-8")
    found = _read(InputFile("large.txt", str(path), "plain", 0, 0))
    joined = "".join(document.text for document in found)
    assert joined == text, "pieces lose or change text"
    assert max(document.num_bytes for document in found) <= max(PIECE_BYTES, WHOLE_FILE_BYTES)
    offsets = [0]
    for document in found[:-1]:
        offsets.append(offsets[-1] + document.num_bytes)
    if len(found) > 1:
        assert [document.id for document in found] == [f"large.txt:{offset}" for offset in offsets]


@pytest.mark.parametrize("over", [0, 1, 2, PIECE_BYTES, PIECE_BYTES + 1, WHOLE_FILE_BYTES, 3 * WHOLE_FILE_BYTES + 5])
def test_plain_file_around_the_size_of_pieces_is_read_to_its_end(input_file: Write, over: int) -> None:
    for start in (b"", b"\n", "é\n".encode()):
        contents = start + b"x" * (WHOLE_FILE_BYTES + over)
        found = _read(input_file("a.txt", contents))
        assert "".join(document.text for document in found).encode() == contents


def test_plain_large_file_not_utf8_far_in_gives_the_offset_in_the_file(input_file: Write) -> None:
    good = b"0123456789abcde\n" * (WHOLE_FILE_BYTES // 16 + 10)
    with pytest.raises(DataError, match=f"offset {len(good) + 2}: "):
        _read(input_file("a.txt", good + b"ab\xc3(\n"))


def test_jsonl_records_are_named_by_line_and_blank_lines_are_no_records(input_file: Write) -> None:
    found = _read(input_file("a.jsonl", _lines("x") + b"\n  \r\n" + _lines("y").strip()))
    assert [(document.id, document.text) for document in found] == [("a.jsonl:1", "x"), ("a.jsonl:4", "y")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{bad", "one JSON object"),
        (b'["text"]', "an array"),
        (b"[", "jq -c '.[]' FILE"),
        (b'"text"', "str"),
        (b'{"conversations": [{"role": "user", "content": "hello"}]}', "instruction tuning"),
        (b'{"chosen": [], "rejected": []}', "instruction tuning"),
        (b'{"txt": "x"}', "data.text_field=txt"),
        (b'{"text": 3}', "text is int"),
        (b'{"text": null}', "text is NoneType"),
        (b'{"text": "a\xff"}', "byte 0xff at offset 11"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a\\u0000"}', "NUL"),
        (b'{"text": "a\x00"}', "NUL"),
        (b"[" * 100_000, "one JSON object"),
        (b'{"text": ' + b"1" * 5000 + b"}", "one JSON object"),
    ],
)
def test_jsonl_bad_record_is_an_error_in_its_place(input_file: Write, line: bytes, words: str) -> None:
    found = list(read_documents(input_file("a.jsonl", _lines("x") + line + b"\n" + _lines("y")), "text"))
    assert [type(document) for document in found] == [Document, DataError, Document]
    assert isinstance(found[1], DataError)
    assert found[1].where == "a.jsonl:2"
    assert words in str(found[1])


def test_jsonl_conversations_are_text_only_where_they_are_asked_for(input_file: Write) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi", "tools": [1]}]
    file = input_file("sft.jsonl", json.dumps({"conversations": turns, "chosen": turns[:1]}).encode())
    error = _one_error(file, "text")
    assert error.value == "conversations: turns of a dialogue"
    assert "instruction tuning" in error.fix and "data.text_field=conversations" in error.fix
    hello, hi = "<|im_start|>user\nhello<|im_end|>\n", "<|im_start|>assistant\nhi<|im_end|>\n"
    assert _read(file, "conversations")[0].text == hello + hi
    assert _read(file, "chosen")[0].text == hello
    assert _read(input_file("a.jsonl", b'{"chosen": "a text"}'), "chosen")[0].text == "a text"


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "no turn"),
        ([{"role": "user"}], "turn 0 of conversations is ['role']"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": [1]}], "turn 1"),
        (["x"], "turn 0 of conversations is str"),
        ([{"role": None, "content": "x"}], "a role and a content"),
    ],
)
def test_jsonl_conversation_with_a_turn_that_says_nothing_is_an_error(
    input_file: Write, turns: list, words: str
) -> None:
    error = _one_error(input_file("sft.jsonl", json.dumps({"conversations": turns}).encode()), "conversations")
    assert words in str(error) and error.where == "sft.jsonl:1"


def test_jsonl_empty_file_is_no_document(input_file: Write) -> None:
    assert _read(input_file("a.jsonl", b"")) == []
    assert _read(input_file("b.jsonl", b"\n \n")) == []


def test_jsonl_line_over_the_limit_is_an_error_and_the_next_line_is_read(
    input_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 100_000)
    file = input_file("a.jsonl", _lines("x" * 1_000_000, "y", "z" * 600_000))
    found = list(read_documents(file, "text"))
    assert [type(document) for document in found] == [DataError, Document, DataError]
    assert "1,000,012 bytes" in str(found[0])
    assert isinstance(found[1], Document)
    assert found[1].id == "a.jsonl:2"


def test_zst_of_two_frames_and_a_skippable_one_is_read_whole(input_file: Write) -> None:
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    data = compress(_lines("a", "b")) + skippable + compress(_lines("c"))
    assert [document.text for document in _read(input_file("a.jsonl.zst", data))] == ["a", "b", "c"]


def test_zst_with_bytes_after_its_frames_is_an_error(input_file: Write) -> None:
    data = zstandard.ZstdCompressor().compress(_lines("a")) + b"tail"
    with pytest.raises(DataError, match="frame 1"):
        list(read_documents(input_file("a.jsonl.zst", data), "text"))


def _parquet(path: Path, table: pa.Table) -> InputFile:
    pq.write_table(table, path, row_group_size=50)
    return InputFile(path.name, str(path), ".parquet", path.stat().st_size, 0)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_rows_are_named_from_zero(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i} é" for i in range(170)]
    file = _parquet(tmp_path / "a.parquet", pa.table({"n": range(170), "text": pa.array(texts).cast(kind)}))
    found = _read(file)
    assert [document.text for document in found] == texts
    assert [found[0].id, found[169].id] == ["a.parquet:0", "a.parquet:169"]


def test_parquet_missing_column_gives_columns_and_nearest(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", pa.table({"id": [1], "context": ["x"]}))
    with pytest.raises(DataError) as caught:
        list(read_documents(file, "content"))
    assert "id, context" in caught.value.value
    assert caught.value.fix == "data.text_field=context"


def test_parquet_column_that_is_no_string_gives_its_type(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", pa.table({"text": [1], "body": ["x"]}))
    with pytest.raises(DataError, match="column text is int64"):
        list(read_documents(file, "text"))


def test_parquet_null_is_an_error_in_its_place(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", pa.table({"text": ["x", None, "y"]}))
    assert _one_error(file).where == "a.parquet:1"


def test_parquet_cut_off_is_an_error(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", pa.table({"text": [f"text {i}" for i in range(100)]}))
    data = Path(file.path).read_bytes()
    for cut in (0, 3, 100, len(data) // 2, len(data) - 1):
        Path(file.path).write_bytes(data[:cut])
        with pytest.raises(DataError, match="read to its end"):
            list(read_documents(file, "text"))


def test_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    for kind in ("plain", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".arrow"):
        with pytest.raises(DataError, match="No such file"):
            list(read_documents(InputFile("gone", str(tmp_path / "gone"), kind, 0, 0), "text"))

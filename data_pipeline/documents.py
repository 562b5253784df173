"""Bounded, streaming readers: a file -> its documents, in order.

What is wrong with one record is yielded as a `DataError` in its place; what is wrong with the file (and so makes
everything after it doubtful) is raised. The caller decides by `data.unreadable`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.listing import InputFile
from moe_dist.errors import DataError

MAX_RECORD_BYTES = 64 * 2**20
WHOLE_FILE_BYTES = 256 * 2**10  # a plain file up to this size is one document; a larger one is cut into pieces
PIECE_BYTES = 64 * 2**10
_READ_BYTES = 256 * 2**10
_ZST_FEED_BYTES = 512  # zstd's densest block makes 128 KiB out of 4 bytes: this bounds one step's output to 16 MiB
_ZST_WINDOW_BYTES = 2**27
_PARQUET_ROWS = 64


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: Relative path; with `:line` (from 1) for a line of .jsonl, `:row` (from 0) for a row of .parquet, and
            `:byte` for a piece of a large plain file.
        text: Its text.
        num_bytes: Length of the text in UTF-8.
    """

    id: str
    text: str
    num_bytes: int


def read_documents(file: InputFile, text_field: str) -> Iterator[Document | DataError]:
    """Yields the documents of a file, empty ones included, and a `DataError` for each record that cannot be read.

    Args:
        file: What to read.
        text_field: Field or column that holds the text of a record.

    Raises:
        DataError: The file as a whole cannot be read to its end.
    """
    try:
        if file.kind == ".parquet":
            yield from _read_parquet(file, text_field)
        elif file.kind == "plain":
            yield from _read_plain(file)
        else:
            chunks = _zst_chunks(file) if file.kind == ".jsonl.zst" else _chunks(file)
            yield from _read_lines(file, chunks, text_field)
    except OSError as error:
        raise DataError(
            file.id, error.strerror or error, "the file can be read", "correct it, or data.unreadable=skip"
        ) from None


def _chunks(file: InputFile) -> Iterator[bytes]:
    with open(file.path, "rb") as source:
        while chunk := source.read(_READ_BYTES):
            yield chunk


def _zst_chunks(file: InputFile) -> Iterator[bytes]:
    """Decompresses every frame; the stream must end where a frame ends (the library's own reader does not check)."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW_BYTES)
    frame, frames = None, 0
    with open(file.path, "rb") as source:
        while data := source.read(_ZST_FEED_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _damaged_zst(file, f"{error} (frame {frames}, before byte {source.tell()})") from None
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, frames = None, frames + 1
        if frame is not None or not frames:
            raise _damaged_zst(file, f"ends inside frame {frames}, at byte {source.tell()}")


def _damaged_zst(file: InputFile, found: str) -> DataError:
    return DataError(
        file.id, found, "a .zst file is a row of whole zstd frames", "fetch the file again, or data.unreadable=skip"
    )


def _read_plain(file: InputFile) -> Iterator[Document]:
    """A file up to `WHOLE_FILE_BYTES` is one document; a larger one is read in pieces, each a document of its own."""
    with open(file.path, "rb") as source:
        data = source.read(WHOLE_FILE_BYTES + 1)
        if len(data) <= WHOLE_FILE_BYTES:
            yield _document(file.id, data, file.id, 0)
            return
        start = 0
        while data:
            if len(data) <= PIECE_BYTES:
                data += source.read(_READ_BYTES)
            cut = _piece_end(data)
            yield _document(f"{file.id}:{start}", data[:cut], file.id, start)
            start, data = start + cut, data[cut:]


def _piece_end(data: bytes) -> int:
    """Where to cut: after the last line that ends within a piece, else between two characters."""
    if len(data) <= PIECE_BYTES:
        return len(data)
    cut = data.rfind(b"\n", 0, PIECE_BYTES) + 1
    if cut:
        return cut
    starts = (cut for cut in range(PIECE_BYTES, PIECE_BYTES - 4, -1) if data[cut] & 0xC0 != 0x80)
    return next(starts, PIECE_BYTES)


def _document(id_: str, data: bytes, where: str, offset: int) -> Document:
    """Decodes strictly. `offset` is where `data` begins in `where`, for the message."""
    fix = "save it as UTF-8 text, or data.unreadable=skip"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}: {error.reason}"
        raise DataError(where, found, "text is UTF-8", fix) from None
    if "\0" in text:
        at = offset + data.index(b"\0")
        raise DataError(where, f"byte 0x00 at offset {at}", "text has no NUL (UTF-16 and binary files do)", fix)
    return Document(id_, text, len(data))


def _read_lines(file: InputFile, chunks: Iterable[bytes], text_field: str) -> Iterator[Document | DataError]:
    for number, (line, length) in enumerate(_lines(chunks), start=1):
        id_ = f"{file.id}:{number}"
        if line is None:
            rule = f"a line has at most {MAX_RECORD_BYTES:,} bytes"
            yield DataError(id_, f"{length:,} bytes", rule, "cut the record into several, or data.unreadable=skip")
        elif line.strip():
            yield _parse_record(id_, line, text_field)


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Yields (line, its length), and None for the bytes of a line over the limit, which are not kept in memory."""
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            length += len(piece)
            yield (b"".join([*parts, piece]) if length <= MAX_RECORD_BYTES else None), length
            parts, length = [], 0
        length += len(rest)
        if length > MAX_RECORD_BYTES:
            parts = []
        elif rest:
            parts.append(rest)
    if length:
        yield (b"".join(parts) if length <= MAX_RECORD_BYTES else None), length


def _parse_record(id_: str, line: bytes, text_field: str) -> Document | DataError:
    try:
        record = json.loads(_document(id_, line, id_, 0).text)
        return _document(id_, _text_of(id_, record, text_field).encode("utf-8"), id_, 0)
    except DataError as error:
        return error
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x} at character {error.start}"
        return DataError(id_, found, "text has no half of a surrogate pair", "correct it, or data.unreadable=skip")
    except (ValueError, RecursionError) as error:
        return DataError(id_, error, "a line is one JSON object", "correct the line, or data.unreadable=skip")


def _text_of(id_: str, record: Any, text_field: str) -> str:
    if not isinstance(record, dict):
        found = "an array" if isinstance(record, list) else type(record).__name__
        raise DataError(id_, found, "a line is one JSON object", "write one object per line, or data.unreadable=skip")
    if text_field not in record:
        raise _missing_field(id_, text_field, [str(name) for name in record])
    text = record[text_field]
    if not isinstance(text, str):
        found = f"{text_field} is {type(text).__name__}"
        raise DataError(id_, found, "the text field is a string", "correct it, or data.unreadable=skip")
    return text


def _missing_field(where: str, text_field: str, names: list[str]) -> DataError:
    near = difflib.get_close_matches(text_field, names, n=1, cutoff=0.5) or names[:1]
    fix = f"data.text_field={near[0]}" if near else "data.unreadable=skip"
    return DataError(where, f"fields: {', '.join(names) or 'none'}", f"there is a field '{text_field}'", fix)


def _read_parquet(file: InputFile, text_field: str) -> Iterator[Document | DataError]:
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            _check_column(file, table.schema_arrow, text_field)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0).cast(pa.large_binary()):
                    yield _parse_value(f"{file.id}:{row}", value.as_py(), text_field)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        found = f"{error} (after {row} rows)"
        fix = "fetch the file again, or data.unreadable=skip"
        raise DataError(file.id, found, "a .parquet file can be read to its end", fix) from None


def _check_column(file: InputFile, schema: pa.Schema, text_field: str) -> None:
    if text_field not in schema.names:
        raise _missing_field(file.id, text_field, schema.names)
    kind = schema.field(text_field).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
        strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        fix = f"data.text_field={strings[0]}" if strings else "name another file"
        raise DataError(file.id, f"column {text_field} is {kind}", "the text column holds strings", fix)


def _parse_value(id_: str, value: bytes | None, text_field: str) -> Document | DataError:
    if value is None:
        return DataError(
            id_, f"{text_field} is null", "the text column holds strings", "correct it, or data.unreadable=skip"
        )
    if len(value) > MAX_RECORD_BYTES:
        rule = f"a record has at most {MAX_RECORD_BYTES:,} bytes"
        return DataError(id_, f"{len(value):,} bytes", rule, "cut the record, or data.unreadable=skip")
    try:
        return _document(id_, value, id_, 0)
    except DataError as error:
        return error

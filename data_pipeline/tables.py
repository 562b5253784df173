"""Tables with a text column -> documents: Parquet files, and the Arrow files of saved Hugging Face datasets.

A saved dataset is a row of Arrow IPC messages. Arrow takes the end of a file between two messages for the end of the
stream, reads whatever sizes a message claims, and checks no offset before it follows it: so the messages are walked
once without their bodies, and each text column is validated before it is read.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.listing import InputFile
from data_pipeline.parquet_pages import read_chunks, read_pages
from data_pipeline.records import Document, is_dialogue, missing_field, not_plain_text, parse_value
from data_pipeline.streams import open_file
from moe_dist.errors import DataError

_PARQUET_ROWS, _BATCH_BYTES = 64, 8 * 2**20
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)  # damaged names of columns are no UTF-8
_MAX_HEADER_BYTES = 16 * 2**20
_RECORD_BATCH = 3  # number of RecordBatch in the union MessageHeader of Arrow's Message.fbs


def read_parquet(file: InputFile, text_field: str) -> Iterator[Document | DataError]:
    """Yields a document, or an error, for each row.

    Raises:
        DataError: There is no such column of strings, or the file is damaged.
    """
    row = 0
    try:
        with _arrow_file(file) as source, pq.ParquetFile(source, page_checksum_verification=True) as table:
            _check_column(file, table.schema_arrow, text_field)
            for batch in _parquet_batches(file, table, text_field):
                for value in batch.column(0).cast(pa.large_binary()):
                    yield parse_value(f"{file.id}:{row}", value.as_py(), text_field)
                    row += 1
            if row != table.metadata.num_rows:
                raise _Malformed(f"{row:,} rows, where the footer has {table.metadata.num_rows:,}")
    except _UNREADABLE as error:
        raise _damaged(file, error, row) from None


def _parquet_batches(file: InputFile, table: pq.ParquetFile, text_field: str) -> Iterator[pa.RecordBatch]:
    """The text column, a row group at a time, in batches that take little memory however large a row is."""
    with open_file(file) as source:
        size = source.seek(0, os.SEEK_END)
        for number, chunk in enumerate(read_chunks(source, size, text_field)):
            rows = read_pages(source, size, chunk).rows_within(_BATCH_BYTES, _PARQUET_ROWS)
            yield from table.iter_batches(rows, row_groups=[number], columns=[text_field], use_threads=False)


def read_arrow(file: InputFile, text_field: str) -> Iterator[Document | DataError]:
    """Yields a document, or an error, for each row of an Arrow IPC stream, one record batch in memory at a time.

    Raises:
        DataError: There is no such column of strings, or the file is damaged, compressed or not an Arrow stream.
    """
    row = 0
    try:
        with open_file(file) as plain:
            _walk_messages(plain)
        with _arrow_file(file) as source, pa.ipc.open_stream(source) as reader:
            _check_column(file, reader.schema, text_field)
            place = reader.schema.get_field_index(text_field)
            for batch in reader:
                for value in _as_bytes(batch.column(place)):
                    yield parse_value(f"{file.id}:{row}", value.as_py(), text_field)
                    row += 1
    except (*_UNREADABLE, struct.error) as error:
        raise _damaged(file, error, row) from None


@contextlib.contextmanager
def _arrow_file(file: InputFile) -> Iterator[pa.NativeFile]:
    """The file as Arrow reads it: itself on this machine, since Arrow reads it faster, else through `open_file`."""
    if not file.store:
        with pa.OSFile(file.path) as local:
            yield local
        return
    with open_file(file) as stored, pa.PythonFile(stored, mode="r") as source:
        yield source


class _Malformed(ValueError):
    """An Arrow stream that is cut off, or that no `datasets` wrote."""


def _damaged(file: InputFile, error: Exception, row: int) -> Exception:
    """A missing file stays what it is: the caller names it."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return error
    rule = f"a {file.kind} file can be read to its end"
    fix = "fetch the file again, or data.unreadable=skip"
    return DataError(file.id, f"{error} (after {row} rows)", rule, fix)


def _check_column(file: InputFile, schema: pa.Schema, text_field: str) -> None:
    if text_field not in schema.names:
        raise missing_field(file.id, text_field, schema.names)
    if schema.names.count(text_field) > 1:
        found = f"{schema.names.count(text_field)} columns named {text_field}"
        raise DataError(file.id, found, "one column has the name of the text field", "rename one of them")
    kind = schema.field(text_field).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
        if is_dialogue(text_field) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise not_plain_text(file.id, text_field)
        strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        fix = f"data.text_field={strings[0]}" if strings else "name another file"
        raise DataError(file.id, f"column {text_field} is {kind}", "the text column holds strings", fix)


def _as_bytes(column: pa.Array) -> pa.Array:
    """The column as bytes, its offsets proven to lie inside it; whether they are UTF-8 is for each record to say."""
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)
        return column.cast(pa.large_binary())
    column = column.view(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    column.validate(full=True)
    return column


def _walk_messages(source: BinaryIO) -> None:
    """Goes from message to message to the end-of-stream mark, which must be the end of the file.

    Raises:
        _Malformed: The stream is cut off, has bytes after its end, or a batch is compressed.
        struct.error: A message's header points outside itself.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    number = 0
    while True:
        start = source.tell()
        mark, header_bytes = struct.unpack("<Ii", _exactly(source, 8))
        if mark != 0xFFFFFFFF or not 0 <= header_bytes <= _MAX_HEADER_BYTES:
            raise _Malformed(f"no Arrow message at byte {start}")
        if header_bytes == 0:
            break
        compressed, body_bytes = _parse_header(_exactly(source, header_bytes))
        if compressed:
            raise _Malformed(f"message {number} is compressed, which save_to_disk never writes")
        if not 0 <= body_bytes <= size - source.tell():
            raise _Malformed(f"ends inside message {number} at byte {size:,}")
        source.seek(body_bytes, os.SEEK_CUR)
        number += 1
    if source.tell() != size:
        raise _Malformed(f"{size - source.tell():,} bytes after the end of the stream")


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise _Malformed(f"ends without an end-of-stream mark at byte {source.tell():,}")
    return data


def _parse_header(header: bytes) -> tuple[bool, int]:
    """Whether a message's body is compressed (of record batches only), and the body's size.

    Source: Message.fbs of the Arrow format, tables Message and RecordBatch, and the layout of FlatBuffers tables.
    """
    (message,) = struct.unpack_from("<I", header)
    kind_at, table_at, size_at = (_field(header, message, number) for number in (1, 2, 3))
    kind = struct.unpack_from("<B", header, kind_at)[0] if kind_at else 0
    body_bytes = struct.unpack_from("<q", header, size_at)[0] if size_at else 0
    if kind != _RECORD_BATCH or not table_at:
        return False, body_bytes
    batch = table_at + struct.unpack_from("<I", header, table_at)[0]
    return bool(_field(header, batch, 3)), body_bytes


def _field(header: bytes, table: int, number: int) -> int:
    """Where a field of a FlatBuffers table lies; 0 where it is left out."""
    places = table - struct.unpack_from("<i", header, table)[0]
    if places < 0 or 4 + 2 * number >= struct.unpack_from("<H", header, places)[0]:
        return 0
    offset = struct.unpack_from("<H", header, places + 4 + 2 * number)[0]
    return table + offset if offset else 0

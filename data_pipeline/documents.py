"""Bounded, streaming readers: a file -> its documents, in order.

What is wrong with one record is yielded as a `DataError` in its place; what is wrong with the file (and so makes
everything after it doubtful) is raised. The caller decides by `data.unreadable`.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline import streams
from data_pipeline.listing import InputFile
from data_pipeline.records import Document, decode_document, parse_line
from data_pipeline.tables import read_arrow, read_parquet
from moe_dist.errors import DataError

__all__ = ["Document", "read_documents", "WHOLE_FILE_BYTES", "PIECE_BYTES"]

WHOLE_FILE_BYTES = 256 * 2**10  # a plain file up to this size is one document; a larger one is cut into pieces
PIECE_BYTES = 64 * 2**10


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
            yield from read_parquet(file, text_field)
        elif file.kind == ".arrow":
            yield from read_arrow(file, text_field)
        elif file.kind == "plain":
            yield from _read_plain(file)
        else:
            yield from _read_lines(file, text_field)
    except OSError as error:
        raise DataError(
            file.id, error.strerror or error, "the file can be read", "correct it, or data.unreadable=skip"
        ) from None


def _read_plain(file: InputFile) -> Iterator[Document]:
    """A file up to `WHOLE_FILE_BYTES` is one document; a larger one is read in pieces, each a document of its own."""
    with streams.open_file(file) as source:
        data = source.read(WHOLE_FILE_BYTES + 1)
        if len(data) <= WHOLE_FILE_BYTES:
            yield decode_document(file.id, data, file.id, 0)
            return
        start = 0
        while data:
            if len(data) <= PIECE_BYTES:
                data += source.read(streams.READ_BYTES)
            cut = _piece_end(data)
            yield decode_document(f"{file.id}:{start}", data[:cut], file.id, start)
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


def _read_lines(file: InputFile, text_field: str) -> Iterator[Document | DataError]:
    for number, (line, length) in enumerate(streams.lines_of(streams.chunks_of(file)), start=1):
        id_ = f"{file.id}:{number}"
        if line is None:
            yield _too_long(id_, length)
        elif line.strip():
            yield parse_line(id_, line, text_field)


def _too_long(id_: str, length: int) -> DataError:
    rule = f"a line has at most {streams.MAX_RECORD_BYTES:,} bytes"
    if length <= streams.MAX_RECORD_BYTES:
        rule = (
            f"a line that expands more than {streams.MAX_EXPANSION}-fold has at most {streams.MAX_DENSE_BYTES:,} bytes"
        )
    return DataError(id_, f"{length:,} bytes", rule, "cut the record into several, or data.unreadable=skip")

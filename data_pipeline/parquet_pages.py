"""How much memory a text column of a Parquet file takes, from its footer and pages' headers, before a page is expanded.

Arrow expands a page to whatever size its header claims, and repeats a value of the dictionary as often as the page
asks: a file of kilobytes can fill gigabytes. The sizes in the footer are claims of their own, which Arrow does not hold
a page to; so the pages' headers are read, as Arrow reads them. Where the pages begin is read here too: asking pyarrow
26 for it ends the whole process where the footer's statistics are damaged.

Source: `parquet.thrift` of the Parquet format (FileMetaData, PageHeader), and the compact protocol of Apache Thrift.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.streams import MAX_DENSE_BYTES, MAX_EXPANSION

_FIRST_READ, _LONGEST_HEADER = 8 * 2**10, 2**20  # a header holds statistics, which may hold values
_LONGEST_FOOTER = 32 * 2**20
_DEEPEST = 16
_MAX_DENSE_DICTIONARY_BYTES = 2**20  # lower, since every row may repeat it
# Fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _METADATA = 4, 1, 3
_PATH, _CHUNK_VALUES, _DATA_PLACE, _DICTIONARY_PLACE = 3, 5, 9, 11
# Fields of PageHeader, and of the headers inside it.
_TYPE, _EXPANDED, _STORED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
_NUM_VALUES = 1
_DICTIONARY_PAGE = 2


class Malformed(ValueError):
    """Pages that are cut off, that no writer wrote, or that expand as no text does."""


@dataclass(frozen=True)
class ColumnPages:
    """What the pages of one column in one row group say.

    Attributes:
        expanded_bytes: Size of all pages when they are decompressed.
        dictionary_bytes: Size of the dictionary; a value of a row may be as large.
        values: Rows.
    """

    expanded_bytes: int
    dictionary_bytes: int
    values: int

    def rows_within(self, limit_bytes: int, most: int) -> int:
        """How many rows to decode at once, at least one, so that they take about `limit_bytes`, or `most` of them."""
        row_bytes = max(self.dictionary_bytes, self.expanded_bytes // max(1, self.values), 1)
        return max(1, min(most, limit_bytes // row_bytes))


class Chunk(NamedTuple):
    """One column in one row group: where its first page begins, and how many values its pages have."""

    place: int
    values: int


def read_chunks(source: BinaryIO, size: int, column: str) -> Iterator[Chunk]:
    """The chunks of a column of the first level, one for each row group, from the footer.

    Raises:
        Malformed: There is no footer, or it has no such column.
    """
    source.seek(max(0, size - 8))
    length, mark = struct.unpack("<I4s", source.read(8).rjust(8, b"\0"))
    if mark != b"PAR1" or not 0 < length <= min(size - 8, _LONGEST_FOOTER):
        raise Malformed(f"a footer of {length:,} bytes")
    source.seek(size - 8 - length)
    try:
        fields, _ = _struct(source.read(length), 0, 0)
        for group in fields.get(_ROW_GROUPS, ()):
            found = (chunk[_METADATA] for chunk in group[_COLUMNS])
            wanted = next(chunk for chunk in found if chunk[_PATH] == [column.encode("utf-8")])
            starts = [wanted[kind] for kind in (_DATA_PLACE, _DICTIONARY_PLACE) if wanted.get(kind)]
            yield Chunk(int(min(starts, default=0)), int(wanted[_CHUNK_VALUES]))
    except (IndexError, KeyError, TypeError, AttributeError, StopIteration):
        raise Malformed(f"a footer without the pages of {column}") from None


def read_pages(source: BinaryIO, size: int, chunk: Chunk) -> ColumnPages:
    """Goes from header to header through one chunk.

    Args:
        source: The file.
        size: Its size.
        chunk: One of `read_chunks`.

    Raises:
        Malformed: A page lies outside the file, or they expand more than `MAX_EXPANSION`-fold beyond `MAX_DENSE_BYTES`.
    """
    place = chunk.place
    if not 0 <= place <= size:
        raise Malformed(f"a page at byte {place:,} of {size:,}")
    expanded = stored = dictionary = values = 0
    while values < chunk.values:
        header, length = _read_header(source, place, size)
        page, kept = _size(header, _EXPANDED, place), _size(header, _STORED, place)
        place += length + kept
        if place > size:
            raise Malformed(f"a page ends at byte {place:,} of {size:,}")
        expanded, stored = expanded + page, stored + length + kept
        limit = MAX_DENSE_BYTES
        if header.get(_TYPE) == _DICTIONARY_PAGE:
            dictionary, limit = max(dictionary, page), _MAX_DENSE_DICTIONARY_BYTES
        if _is_dense(page, length + kept, limit) or _is_dense(expanded, stored, MAX_DENSE_BYTES):
            raise Malformed(
                f"{stored:,} bytes that expand to {expanded:,}: more than {MAX_EXPANSION}-fold, as no text does"
            )
        values += sum(_size(header[kind], _NUM_VALUES, place) for kind in (_DATA, _DATA_V2) if kind in header)
    return ColumnPages(expanded, dictionary, values)


def _is_dense(expanded: int, stored: int, limit: int) -> bool:
    return expanded > limit and expanded > MAX_EXPANSION * stored


def _size(fields: Any, number: int, place: int) -> int:
    value = fields.get(number, 0) if isinstance(fields, dict) else -1
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise Malformed(f"a page before byte {place:,} has {value} for a size")
    return value


def _read_header(source: BinaryIO, place: int, size: int) -> tuple[dict[int, Any], int]:
    """(fields, length) of the header at a place. More is read only where it is longer than most."""
    wanted = _FIRST_READ
    while True:
        source.seek(place)
        data = source.read(min(wanted, max(0, size - place)))
        try:
            fields, length = _struct(data, 0, 0)
        except IndexError:
            if len(data) < wanted or wanted >= _LONGEST_HEADER:
                raise Malformed(f"no page header at byte {place:,}") from None
            wanted *= 8
        else:
            return fields, length


def _struct(data: bytes, place: int, depth: int) -> tuple[dict[int, Any], int]:
    """(fields by number, place after them). An IndexError means that the data ends before."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[place]) != 0:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _integer(data, place)
        fields[number], place = _value(data, place, head & 0x0F, depth + 1)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise Malformed(f"a page header that is nested {depth} deep")
    if kind in (1, 2):  # a boolean is in its kind
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _integer(data, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _unsigned(data, place)
        return data[place : place + length], place + length
    if kind in (9, 10):
        return _list(data, place, depth)
    if kind == 12:
        return _struct(data, place, depth)
    raise Malformed(f"a page header with a field of kind {kind}")


def _list(data: bytes, place: int, depth: int) -> tuple[list[Any], int]:
    head, place = data[place], place + 1
    count, kind, values = head >> 4, head & 0x0F, []
    if count == 15:
        count, place = _unsigned(data, place)
    for _ in range(count):
        value, place = _value(data, place, 3 if kind in (1, 2) else kind, depth + 1)  # here a boolean takes a byte
        if place > len(data):
            raise IndexError
        values.append(value)
    return values, place


def _unsigned(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, place = data[place], place + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise Malformed("a page header with a number that does not end")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _unsigned(data, place)
    return (value >> 1) ^ -(value & 1), place

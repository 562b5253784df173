"""The walk over the pages of a Parquet file follows what writers write, and refuses what none does."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile
from data_pipeline.parquet_pages import ColumnPages, Malformed, read_chunks, read_pages
from data_pipeline.streams import MAX_DENSE_BYTES, MAX_EXPANSION

TEXTS = [f"text {i % 70} größe " * (i % 9 + 1) for i in range(1000)]
OPTIONS: dict[str, tuple[Any, ...]] = {
    "data_page_version": ("1.0", "2.0"),
    "compression": ("none", "snappy", "zstd", "gzip"),
    "use_dictionary": (True, False),
    "data_page_size": (None, 500),
    "write_page_index": (True, False),
}


def _table() -> pa.Table:
    turns = [[{"role": "user", "content": "x", "text": "y"}]] * len(TEXTS)
    return pa.table({"n": range(len(TEXTS)), "turns": turns, "text": TEXTS, "deep": [{"text": "z"}] * len(TEXTS)})


@pytest.mark.parametrize("values", [*itertools.product(*OPTIONS.values())], ids=str)
def test_parquet_of_every_option_of_the_writer_is_read_whole(tmp_path: Path, values: tuple[Any, ...]) -> None:
    path = tmp_path / "a.parquet"
    options = dict(zip(OPTIONS, values, strict=True))
    pq.write_table(_table(), path, row_group_size=300, dictionary_pagesize_limit=2000, **options)
    found = list(read_documents(InputFile("a", str(path), ".parquet", 0, 0), "text"))
    assert [document.text for document in found if isinstance(document, Document)] == TEXTS
    metadata = pq.ParquetFile(path).metadata
    with open(path, "rb") as source:
        size = path.stat().st_size
        for group, chunk in enumerate(read_chunks(source, size, "text")):
            column = metadata.row_group(group).column(metadata.num_columns - 2)
            assert column.path_in_schema == "text"
            pages = read_pages(source, size, chunk)
            assert pages.values == column.num_values
            assert 0 < pages.expanded_bytes < column.total_uncompressed_size  # which counts the headers too
            assert (pages.dictionary_bytes > 0) == column.has_dictionary_page


def test_rows_at_once_are_few_where_rows_or_the_dictionary_are_large() -> None:
    assert ColumnPages(expanded_bytes=6400, dictionary_bytes=0, values=100).rows_within(1000, 64) == 15
    assert ColumnPages(expanded_bytes=6400, dictionary_bytes=500, values=100).rows_within(1000, 64) == 2
    assert ColumnPages(expanded_bytes=10**9, dictionary_bytes=0, values=1).rows_within(1000, 64) == 1
    assert ColumnPages(expanded_bytes=0, dictionary_bytes=0, values=0).rows_within(1000, 64) == 64


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 30))
def test_pages_with_random_bytes_end_in_figures_or_a_named_error(seed: int, changes: int) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS[:50]}), sink)
    data, source = bytearray(sink.getvalue()), random.Random(seed)
    for _ in range(changes):
        data[source.randrange(4, len(data) - 8)] = source.randrange(256)
    file, most = io.BytesIO(bytes(data)), max(MAX_DENSE_BYTES, MAX_EXPANSION * len(data))
    try:
        for chunk in read_chunks(file, len(data), "text"):
            pages = read_pages(file, len(data), chunk)
            assert pages.values >= chunk.values
            assert 0 <= pages.dictionary_bytes <= pages.expanded_bytes <= most
            assert 1 <= pages.rows_within(1000, 64) <= 64
    except Malformed:
        return

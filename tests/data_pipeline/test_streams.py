"""Compressed lines: whole, damaged, and small files that expand to gigabytes."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile
from data_pipeline.streams import lines_of
from moe_dist.errors import DataError

Write = Callable[[str, bytes], InputFile]


def _lines(number: int) -> bytes:
    return b"".join(json.dumps({"text": f"record {i} {i * 7919 % 1000}"}).encode() + b"\n" for i in range(number))


def _zst(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def _texts(file: InputFile) -> list[str]:
    found = list(read_documents(file, "text"))
    assert all(isinstance(document, Document) for document in found), found
    return [document.text for document in found if isinstance(document, Document)]


def test_gz_of_several_members_and_padding_is_read_whole(input_file: Write) -> None:
    data = gzip.compress(_lines(50)) + gzip.compress(b"") + gzip.compress(_lines(100)) + b"\0" * 600
    file = input_file("a.jsonl.gz", data)
    assert file.kind == ".jsonl.gz"
    found = list(read_documents(file, "text"))
    assert len(found) == 150
    assert isinstance(found[149], Document)
    assert (found[149].id, found[149].text) == ("a.jsonl.gz:150", "record 99 981")


def test_gz_of_many_steps_of_output_is_read_whole(input_file: Write) -> None:
    texts = ["x" * length for length in (2**20 - 13, 2**20, 3 * 2**20 + 5, 7, 2**21)]
    data = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    assert _texts(input_file("a.jsonl.gz", data)) == texts


COMPRESSED = {
    # ending: (how to compress, what the file is made of, bytes of the header that carry no text)
    "gz": (lambda data: gzip.compress(data, mtime=0), "whole gzip members", 7),  # time and kind of system
    "zst": (lambda data: _zst(data, write_checksum=True), "whole zstd frames", 0),
}


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_file_cut_anywhere_is_an_error_and_never_short(input_file: Write, ending: str) -> None:
    compress, parts, _ = COMPRESSED[ending]
    first = compress(_lines(150))
    data = first + compress(_lines(150))
    assert len(_texts(input_file(f"a.jsonl.{ending}", data))) == 300
    for cut in range(len(data)):
        file = input_file(f"a.jsonl.{ending}", data[:cut])
        if cut == len(first):  # a whole part: nothing tells that another followed
            assert len(_texts(file)) == 150
        else:
            with pytest.raises(DataError, match=parts):
                list(read_documents(file, "text"))


@pytest.mark.parametrize("ending", COMPRESSED)
def test_flipped_byte_under_a_checksum_is_an_error_or_changes_no_text(input_file: Write, ending: str) -> None:
    compress, _, most_unharmed = COMPRESSED[ending]
    data = compress(_lines(200))
    expected = [f"record {i} {i * 7919 % 1000}" for i in range(200)]
    unharmed = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x41
        try:
            assert _texts(input_file(f"a.jsonl.{ending}", bytes(flipped))) == expected, f"byte {place}"
        except DataError:
            continue
        unharmed += 1
    assert unharmed <= most_unharmed


def test_gz_with_bytes_after_its_members_is_an_error(input_file: Write) -> None:
    with pytest.raises(DataError, match="member 1"):
        list(read_documents(input_file("a.jsonl.gz", gzip.compress(_lines(3)) + b"tail"), "text"))


@pytest.mark.parametrize(("name", "words"), [("a.jsonl.gz", "inside member 0"), ("a.jsonl.zst", "inside frame 0")])
def test_compressed_empty_file_is_an_error_and_an_empty_stream_is_not(input_file: Write, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(read_documents(input_file(name, b""), "text"))
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    assert _texts(input_file(name, compress(b""))) == []


_MEASURE = """
import sys
from data_pipeline.documents import read_documents
from data_pipeline.listing import list_input
def peak():  # of this program; that of getrusage begins with what the parent had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
file, = list_input(sys.argv[1], (".txt",)).files
list(read_documents(list_input(sys.argv[2], (".txt",)).files[0], "text"))
before = peak()
for found in read_documents(file, "text"):
    print(found.where, found.value, found.rule, sep="|")
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_bomb_that_expands_to_a_gigabyte_is_refused_in_64_megabytes(
    input_file: Write, tmp_path: Path, kind: str
) -> None:
    compressor = zstandard.ZstdCompressor().compressobj() if kind == "zst" else zlib.compressobj(1, wbits=31)
    line = b'{"text": "' + b" " * 2**20
    data = b"".join(compressor.compress(line if i == 0 else line[10:]) for i in range(1024)) + compressor.flush()
    assert len(data) < (40_000 if kind == "zst" else 5 * 2**20)
    file = input_file(f"bomb.jsonl.{kind}", data)
    small = input_file(f"small.jsonl.{kind}", gzip.compress(_lines(3)) if kind == "gz" else _zst(_lines(3)))
    command = [sys.executable, "-c", _MEASURE, file.path, small.path]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found, grown = done.stdout.splitlines()
    assert found == f"bomb.jsonl.{kind}:1|1,073,741,834 bytes|a line has at most 67,108,864 bytes"
    assert int(grown) < 64 * 1000, f"{grown} KiB"


def test_dense_line_between_the_limits_is_refused_and_its_neighbours_are_read(input_file: Write) -> None:
    dense = json.dumps({"text": "a" * (20 * 2**20)}).encode() + b"\n"
    for name, data in (
        ("a.jsonl.zst", _zst(_lines(2) + dense + _lines(1))),
        ("a.jsonl", _lines(2) + dense + _lines(1)),
    ):
        found = list(read_documents(input_file(name, data), "text"))
        refused = [i for i, document in enumerate(found) if isinstance(document, DataError)]
        assert len(found) == 4
        assert refused == ([2] if name.endswith("zst") else [])
    with pytest.raises(DataError, match="more than 200-fold"):
        raise next(
            d for d in read_documents(input_file("b.jsonl.zst", _zst(dense)), "text") if isinstance(d, DataError)
        )


def test_long_line_of_real_text_is_read_from_a_compressed_file(input_file: Write) -> None:
    source = random.Random(0)
    text = " ".join(source.choices(["alpha", "beta", "gamma", "12", "the"], k=4_000_000))
    assert len(text) > 17 * 2**20
    assert _texts(input_file("a.jsonl.zst", _zst(json.dumps({"text": text}).encode()))) == [text]


def test_line_of_100_megabytes_is_dropped_and_the_next_is_read() -> None:
    chunks = [(b"x" * 2**20, 2**20)] * 100 + [(b"\nnext\n", 6)]
    assert list(lines_of(chunks)) == [(None, 100 * 2**20), (b"next", 4)]

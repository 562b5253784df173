"""Builds of the formats that were there first keep their names and their tokens, whatever is added to the readers.

The expected values are those of the program before it read .jsonl.gz and saved datasets.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.build import build
from data_pipeline.fingerprint import fingerprint
from data_pipeline.listing import list_input
from data_pipeline.manifest import read_manifest
from data_pipeline.shards import TokenSplit
from moe_dist.config import parse_config

NAME = "bdbde63d23144647c468"
TOKENS = {
    "train": "405c8c5581db9c682b3ab1807597b38ca214300be4dc0fbf46ff5e0f59fc883f",
    "heldout": "da9eab4b6dd0b1cb424a2d91e86abcb1f2129655caf0732e2900e3b493f55a27",
}
SKIPPED = [
    ("a.jsonl:11", "Expecting property name enclosed in double quotes"),
    ("a.jsonl:13", "an array (rule: a line is one JSON object)"),
    ("a.jsonl:14", "fields: txt (rule: there is a field 'text')"),
    ("a.jsonl:15", "text is int (rule: the text field is a string)"),
    ("c.parquet:1", "text is null (rule: the text column holds strings)"),
    ("latin.txt", "byte 0xe9 at offset 3: unexpected end of data (rule: text is UTF-8)"),
    ("torn.jsonl.zst", "ends inside frame 0, at byte"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        (folder / f"plain{i}.txt").write_text(f"plain text {i} größe\n" * 80, encoding="utf-8")
    (folder / "large.txt").write_text("a line of a large file, which is cut into pieces\n" * 7000)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = [json.dumps({"text": f"record {i} of a file " * 20, "n": i}) for i in range(40)]
    bad = ["{bad", "", '["text"]', '{"txt": "x"}', '{"text": 3}']
    (folder / "a.jsonl").write_text("\r\n".join([*lines[:10], *bad, *lines[10:]]))
    compressed = zstandard.ZstdCompressor(write_checksum=True).compress("\n".join(lines).encode())
    (folder / "b.jsonl.zst").write_bytes(compressed)
    (folder / "torn.jsonl.zst").write_bytes(compressed[:-20])
    pq.write_table(pa.table({"text": ["row of a table " * 50, None, "last row"]}), folder / "c.parquet")
    for path in folder.iterdir():
        os.utime(path, ns=(0, 1_600_000_000_000_000_000))
    return folder


def test_builds_of_existing_formats_have_the_same_tokens_and_reasons(source: Path, tmp_path: Path) -> None:
    data = {"input": str(source), "dir": str(tmp_path / "out"), "shard_bytes": 20_000, "unreadable": "skip"}
    tree = {"data": {**data, "sequence_length_tokens": 32, "holdout_fraction": 0.1}, "model": {"vocab_size": 300}}
    folder = build(parse_config(tree), use_ray=False)
    manifest = read_manifest(folder)
    assert {split: TokenSplit(folder, split).content_sha256 for split in TOKENS} == TOKENS
    assert [where for where, _ in manifest.skipped] == [where for where, _ in SKIPPED]
    for (where, reason), (_, expected) in zip(manifest.skipped, SKIPPED, strict=True):
        assert reason.startswith(expected), where
    assert (manifest.empty_documents, manifest.ignored_endings) == (1, {".png": 1})


def test_fingerprint_of_existing_formats_is_the_same(source: Path) -> None:
    for path in (*source.glob("*.zst"), *source.glob("*.parquet")):
        path.unlink()  # their sizes are those of another version of a library
    assert fingerprint(list_input(str(source), (".txt", ".py")), {"data.text_field": "text"}) == NAME

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.inspection import describe_build
from data_pipeline.manifest import SPLITS, read_manifest
from tests.data_pipeline.test_build import configure


def test_inspect_figures_are_those_of_the_manifest_and_of_the_text(texts: Path, built: Path) -> None:
    found = describe_build(built, samples=3)
    manifest = read_manifest(built)
    for split in SPLITS:
        assert found["splits"][split]["tokens"] == manifest.num_tokens(split)
        assert found["splits"][split]["shards"] == len(manifest.splits[split])
    assert sum(row["documents"] for row in found["splits"].values()) == 60
    assert sum(row["text_bytes"] for row in found["splits"].values()) == sum(p.stat().st_size for p in texts.iterdir())
    assert sum(row["file_bytes"] for row in found["splits"].values()) == sum(
        path.stat().st_size for path in built.glob("*.arrow")
    )
    assert found["tokenizer"]["sha256"] == manifest.tokenizer_sha256
    assert found["created_from"] == manifest.created_from
    assert json.loads(json.dumps(found)) == found


def test_inspect_samples_are_beginnings_of_different_documents(texts: Path, built: Path) -> None:
    samples = describe_build(built, samples=3)["samples"]
    assert [sample["split"] for sample in samples] == ["train"] * 3 + ["heldout"] * 3
    documents = [path.read_bytes().decode() for path in texts.iterdir()]
    for sample in samples:
        text = sample["text"].rstrip("\N{REPLACEMENT CHARACTER}")
        assert len(text) > 20
        assert any(document.startswith(text) for document in documents)
    assert len({sample["text"] for sample in samples}) == 6
    assert describe_build(built, samples=0)["samples"] == []


def test_inspect_lists_what_was_skipped_with_file_line_and_reason(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    lines = [json.dumps({"text": f"record {i} " * 30}) for i in range(20)]
    (source / "a.jsonl").write_text("\n".join([*lines[:4], "{bad", *lines[4:], '{"text": 3}']))
    (source / "b.txt").write_bytes(b"caf\xe9")
    (source / "c.png").write_bytes(b"x")
    found = describe_build(build(configure(source, tmp_path / "out", unreadable="skip"), use_ray=False), samples=1)
    assert [row["where"] for row in found["skipped"]] == ["a.jsonl:5", "a.jsonl:22", "b.txt"]
    assert "text is int (rule: the text field is a string)" in found["skipped"][1]["reason"]
    assert found["ignored_endings"] == {".png": 1}

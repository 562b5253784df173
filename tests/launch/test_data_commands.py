"""`moe-dist data inspect`, `verify` and `export` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.build import build
from moe_dist.config import parse_config
from tests.launch.test_cli import moe_dist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small build with a skipped record, and text that would steer a terminal."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"\x1b[2J record {i} " * 40}) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{bad"]))
    data = {"input": str(folder / "a.jsonl"), "dir": str(folder / "out"), "unreadable": "skip"}
    tree = {"data": {**data, "sequence_length_tokens": 32}, "model": {"vocab_size": 300}}
    return build(parse_config(tree), use_ray=False)


def test_inspect_prints_figures_reasons_and_samples_within_100_columns(built: Path) -> None:
    done = moe_dist("data", "inspect", str(built))
    assert done.returncode == 0, done.stderr
    for words in ("heldout", f"fingerprint     {built.name}", "data.unreadable=skip", "a.jsonl:41: ", "record"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("┃") or line.startswith("│")]
    assert max(map(len, table)) <= 100


def test_inspect_and_verify_end_with_one_json_object(built: Path) -> None:
    inspected = moe_dist("data", "inspect", str(built), "--samples", "1", "--json")
    figures = json.loads(inspected.stdout)
    assert figures["skipped"][0]["where"] == "a.jsonl:41"
    assert [sample["split"] for sample in figures["samples"]] == ["train", "heldout"]
    verified = moe_dist("data", "verify", str(built), "--json")
    assert verified.returncode == 0, verified.stderr
    proven = json.loads(verified.stdout)
    assert proven["documents"] == sum(row["documents"] for row in figures["splits"].values()) == 40


def test_verify_damaged_build_exits_2_and_names_the_file(built: Path) -> None:
    path = min(built.glob("train-*.arrow"))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        done = moe_dist("data", "verify", str(built))
    finally:
        path.write_bytes(good)
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "build again" in done.stderr
    assert not done.stdout
    assert moe_dist("data", "verify", str(built)).stdout.startswith(f"{built} is whole: ")


def test_export_writes_both_splits_and_says_what_megatron_takes(built: Path, tmp_path: Path) -> None:
    command = ("data", "export", str(built), "--format", "megatron", "--out", str(tmp_path / "c"))
    done = moe_dist(*command, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["splits"]["train"]["prefix"] == str(tmp_path / "c_train")
    assert sum(row["documents"] for row in figures["splits"].values()) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "c_heldout.bin",
        "c_heldout.idx",
        "c_train.bin",
        "c_train.idx",
    ]
    again = moe_dist(*command)
    assert again.returncode == 2
    assert "overwrites nothing" in again.stderr

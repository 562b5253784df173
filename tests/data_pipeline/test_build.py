from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.build import build, open_tokenizer
from data_pipeline.holdout import split_hash
from data_pipeline.manifest import SPLITS, read_manifest
from data_pipeline.once import Progress
from data_pipeline.shards import TokenSplit
from moe_dist.config import Config, parse_config
from moe_dist.errors import DataError


def configure(source: Path | str, target: Path, **data: Any) -> Config:
    section = {"input": str(source), "dir": str(target), "shard_bytes": 20_000, "sequence_length_tokens": 32}
    return parse_config({"data": {**section, **data}, "model": {"vocab_size": 300}})


def _documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    tokenizer = open_tokenizer(folder)
    stream = TokenSplit(folder, split).tokens(0, TokenSplit(folder, split).num_tokens)
    ends = np.flatnonzero(stream == tokenizer.end_of_text)
    assert ends[-1] == len(stream) - 1
    return [tokenizer.decode(part[part != tokenizer.end_of_text]) for part in np.split(stream, ends[:-1] + 1)]


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _mixed(folder: Path) -> Path:
    """Every kind of file, with damage of every kind."""
    folder.mkdir()
    for i in range(20):
        (folder / f"plain{i:02d}.txt").write_text(f"plain text {i}\n" * 80)
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    lines = [json.dumps({"text": f"record {i} " * 50}) for i in range(90)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:10], "{bad", *lines[10:]]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    (folder / "torn.jsonl.zst").write_bytes((folder / "b.jsonl.zst").read_bytes()[:-20])
    pq.write_table(pa.table({"text": ["row of a table " * 50, None, "last row"]}), folder / "c.parquet")
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _mixed(tmp_path_factory.mktemp("mixed") / "in")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def test_build_holds_every_document_once_in_its_split(texts: Path, built: Path) -> None:
    manifest = read_manifest(built)
    cut = int(0.1 * 2**64)
    for split in SPLITS:
        names = [p.name for p in sorted(texts.iterdir()) if (split_hash(p.name) < cut) == (split == "heldout")]
        assert names
        assert _documents(built, split) == [(texts / name).read_bytes().decode() for name in names]
        assert sum(shard.documents for shard in manifest.splits[split]) == len(names)
        sizes = [(texts / name).stat().st_size for name in names]
        assert sum(shard.text_bytes for shard in manifest.splits[split]) == sum(sizes)


def test_build_has_several_shards_and_only_the_files_of_its_manifest(built: Path) -> None:
    manifest = read_manifest(built)
    shards = [shard.file for split in SPLITS for shard in manifest.splits[split]]
    assert len(manifest.splits["train"]) > 3
    assert sorted(p.name for p in built.iterdir()) == sorted([*shards, "manifest.json", "tokenizer.json"])
    assert manifest.fingerprint == built.name
    for split in SPLITS:
        TokenSplit(built, split).verify()


def test_build_that_is_there_is_returned_without_work(texts: Path, built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    calls: list[Progress] = []
    config = configure(texts, built.parent, holdout_fraction=0.1, sequence_length_tokens=16)
    assert build(config, use_ray=False, progress=calls.append) == built
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_build_progress_of_each_stage_ends_with_its_total(texts: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    build(
        configure(texts, tmp_path), False, lambda step: seen.setdefault(step.stage, []).append((step.done, step.total))
    )
    assert list(seen) == ["read text", "train tokenizer", "write shards"]
    for stage in seen.values():
        assert [done for done, _ in stage] == sorted(done for done, _ in stage)
        assert stage[0][0] == 0
        assert stage[-1][0] == stage[-1][1] > 0


def test_build_of_changed_input_or_configuration_has_another_name(texts: Path, built: Path, tmp_path: Path) -> None:
    same = {"holdout_fraction": 0.1}
    assert build(configure(texts, tmp_path, **same), False).name == built.name
    for change in ({"holdout_fraction": 0.2}, {"shard_bytes": 30_000}, {"unreadable": "skip"}):
        assert build(configure(texts, tmp_path, **{**same, **change}), False).name != built.name
    source = tmp_path / "copy"
    source.mkdir()
    for path in texts.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
        os.utime(source / path.name, ns=(0, path.stat().st_mtime_ns))
    assert build(configure(source, tmp_path, **same), False).name == built.name
    os.utime(source / "text000.txt", ns=(0, 1))
    assert build(configure(source, tmp_path, **same), False).name != built.name


def test_build_again_elsewhere_gives_the_same_bytes(texts: Path, built: Path, tmp_path: Path) -> None:
    other = build(configure(texts, tmp_path, holdout_fraction=0.1), use_ray=False)
    assert _hashes(other) == _hashes(built)


def test_build_on_ray_gives_the_same_bytes(mixed: Path, tmp_path: Path, ray_cluster: None) -> None:
    steps: list[Progress] = []
    plain = build(configure(mixed, tmp_path / "plain", unreadable="skip"), use_ray=False)
    on_ray = build(configure(mixed, tmp_path / "ray", unreadable="skip"), True, steps.append)
    assert len(read_manifest(plain).splits["train"]) > 3
    assert _hashes(on_ray) == _hashes(plain)
    written = sum(shard.tokens for shards in read_manifest(on_ray).splits.values() for shard in shards)
    assert steps[-1] == Progress("write shards", steps[-1].total, steps[-1].total, 0, written)


def test_build_on_ray_of_damaged_input_raises_the_named_error(
    mixed: Path, tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:11|latin\.txt|torn\.jsonl\.zst|c\.parquet:1"):
        build(configure(mixed, tmp_path), use_ray=True)
    assert list(tmp_path.glob("[!.]*")) == []
    assert "Traceback" not in capfd.readouterr().err


def test_build_of_damaged_input_names_the_first_each_time_and_leaves_no_build(mixed: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:11"):
            build(configure(mixed, tmp_path), use_ray=False)
        assert list(tmp_path.glob("[!.]*")) == []


def test_build_that_skips_lists_what_it_left_out_and_keeps_the_rest(mixed: Path, tmp_path: Path) -> None:
    folder = build(configure(mixed, tmp_path, unreadable="skip"), use_ray=False)
    manifest = read_manifest(folder)
    assert [id_ for id_, _ in manifest.skipped] == ["a.jsonl:11", "c.parquet:1", "latin.txt", "torn.jsonl.zst"]
    assert manifest.empty_documents == 1
    assert manifest.ignored_endings == {".png": 1}
    found = sorted(_documents(folder, "train") + _documents(folder, "heldout"))
    records = [f"record {i} " * 50 for i in range(90)]
    plain = [f"plain text {i}\n" * 80 for i in range(20)]
    assert found == sorted([*records, *records, *plain, "row of a table " * 50, "last row"])


_BUILD = """
import sys, time
from moe_dist.config import parse_config
from data_pipeline.build import build
data = {"input": sys.argv[1], "dir": sys.argv[2], "shard_bytes": 20_000, "sequence_length_tokens": 32}
config = parse_config({"data": data, "model": {"vocab_size": 300}})
time.sleep(max(0, float(sys.argv[3]) - time.time()))
print(build(config, use_ray=False))
"""


def test_builders_at_the_same_time_agree_and_leave_one_build(texts: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _BUILD, str(texts), str(tmp_path), str(time.time() + 3)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert [str(path) for path in tmp_path.iterdir()] == list(found)
    TokenSplit(Path(found.pop()), "train").verify()


def test_folder_without_manifest_is_no_build_and_is_replaced(texts: Path, built: Path, tmp_path: Path) -> None:
    half = tmp_path / built.name
    half.mkdir()
    (half / "train-000000-0000.arrow").write_bytes(b"half")
    folder = build(configure(texts, tmp_path, holdout_fraction=0.1), use_ray=False)
    assert folder == half
    assert _hashes(folder) == _hashes(built)
    assert list(tmp_path.iterdir()) == [half]


def test_tiny_input_holds_out_the_document_with_the_lowest_hash(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [f"{i}.txt" for i in range(4)]
    for name in names:
        (tmp_path / "in" / name).write_text(f"text of {name} with some words in it\n" * 10)
    lowest = min(names, key=split_hash)
    assert split_hash(lowest) >= int(0.001 * 2**64)
    folder = build(configure(tmp_path / "in", tmp_path / "out", holdout_fraction=0.001), use_ray=False)
    assert _documents(folder, "heldout") == [(tmp_path / "in" / lowest).read_text()]
    assert len(_documents(folder, "train")) == 3


def test_tiny_split_says_tokens_there_and_needed_and_a_length_that_works(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.txt").write_text("some words\n")
    with pytest.raises(DataError) as caught:
        build(configure(tmp_path / "in", tmp_path / "out", sequence_length_tokens=512), use_ray=False)
    assert "513 tokens" in caught.value.rule
    tokens = int(str(caught.value.value).split()[0])
    assert f"data.sequence_length_tokens={tokens - 1} or less" in caught.value.fix
    assert "data.holdout_fraction" in caught.value.fix
    fixed = configure(tmp_path / "in", tmp_path / "out", sequence_length_tokens=tokens - 1)
    build(fixed, use_ray=False)


def test_one_document_or_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="1 documents with text, 1 empty"):
        build(configure(tmp_path, tmp_path / "out"), use_ray=False)


def test_one_large_plain_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line of a book, not too long.\n" * 12_000)
    folder = build(configure(tmp_path / "book.txt", tmp_path / "out"), use_ray=False)
    joined = _documents(folder, "train") + _documents(folder, "heldout")
    assert sum(len(text) for text in joined) == 12_000 * 32


def test_given_tokenizer_is_kept_and_changes_the_name(texts: Path, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_bytes((built / "tokenizer.json").read_bytes())
    folder = build(configure(texts, tmp_path / "out", tokenizer={"path": str(path)}), use_ray=False)
    assert open_tokenizer(folder).sha256 == open_tokenizer(built).sha256
    assert folder.name != built.name


def test_changed_tokenizer_of_a_build_is_an_error(texts: Path, tmp_path: Path) -> None:
    folder = build(configure(texts, tmp_path), use_ray=False)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(DataError, match="tokenizer is as the manifest says"):
        open_tokenizer(folder)


def test_build_into_a_place_that_is_no_folder_is_a_named_error(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.dir"):
        build(configure(texts, tmp_path / "file"), use_ray=False)


ALL_CLEANING: dict[str, Any] = {
    "clean": {
        "normalize": "NFC",
        "mask": ["email", "ip"],
        "languages": ["en", "zh"],
        "rules": ["c4_citations", "c4_javascript", "c4_curly_bracket", "gopher_word_count", "gopher_stop_words"],
    },
    "dedup": {"exact": True},
}
SENTENCE = "It is said of the old bridge that a bishop paid for it, and that he was never thanked by the town. "
CHINESE_SENTENCE = "春天的时候，河水从山上流下来，淹没了低处的田地。农民们早就习惯了这样的事情。"


def _dirty(folder: Path) -> Path:
    """Documents that each step changes or removes, with copies in files of every kind."""
    (folder / "web").mkdir(parents=True)
    (folder / "books").mkdir()
    for i in range(40):
        (folder / "books" / f"{i:02d}.txt").write_text(f"Chapter {i % 30} of the book. " + SENTENCE * 8)
    texts = [f"Chapter {i} of the book. " + SENTENCE * 8 for i in range(20)]
    texts += [f"Mail number {i}@example.org or 10.0.0.{i}. cafe\u0301[{i}] " + SENTENCE * 5 for i in range(20)]
    texts += ["{ " + SENTENCE * 8, "short", "Der Hund und die Katze gehen durch den Wald. " * 9, CHINESE_SENTENCE * 4]
    texts += ["Enable JavaScript.\n", CHINESE_SENTENCE * 4]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "web" / "a.jsonl").write_text("\n".join(["{bad", *lines]))
    pq.write_table(pa.table({"text": texts}), folder / "web" / "b.parquet")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dirty(tmp_path_factory.mktemp("dirty") / "in")


def test_cleaned_build_holds_each_cleaned_text_once_and_counts_what_it_left_out(dirty: Path, tmp_path: Path) -> None:
    folder = build(configure(dirty, tmp_path, unreadable="skip", **ALL_CLEANING), use_ray=False)
    chapters = [f"Chapter {i} of the book. " + SENTENCE * 8 for i in range(30)]
    mails = ["Mail number <EMAIL_ADDRESS> or <IP_ADDRESS>. café " + SENTENCE * 5]
    found = sorted(_documents(folder, "train") + _documents(folder, "heldout"))
    assert found == sorted([*chapters, *mails, CHINESE_SENTENCE * 4])
    manifest = read_manifest(folder)
    assert manifest.version == 2
    assert manifest.cleaning is not None
    assert {source: sorted(rows) for source, rows in manifest.cleaning.pop("content").items()} == {
        "books": ["en"],
        "web": ["en", "zh"],
    }
    assert manifest.cleaning == {
        "documents": {"books": 40, "web": 92},
        "kept": {"books": 30, "web": 2},
        "changed": {
            step: {"web": count}
            for step, count in (("NFC", 40), ("c4_citations", 40), ("c4_javascript", 2))
            + (("mask_email", 40), ("mask_ip", 40))
        },
        "removed": {
            "c4_curly_bracket": {"web": 2},
            "exact_duplicate": {"books": 10, "web": 40 + 39 + 3},
            "language": {"web": 2 + 2},
            "no_text_left": {"web": 2},
        },
    }
    assert sum(shard.documents for split in SPLITS for shard in manifest.splits[split]) == 32


def test_cleaned_build_is_the_same_on_ray_and_for_any_cut_of_the_work(
    dirty: Path, tmp_path: Path, ray_cluster: None
) -> None:
    settings = {"unreadable": "skip", **ALL_CLEANING}
    plain = build(configure(dirty, tmp_path / "plain", **settings), use_ray=False)
    on_ray = build(configure(dirty, tmp_path / "ray", **settings), use_ray=True)
    assert _hashes(on_ray) == _hashes(plain)
    other_cut = build(configure(dirty, tmp_path / "cut", shard_bytes=10_000_000, **settings), use_ray=False)
    for split in SPLITS:
        assert _documents(other_cut, split) == _documents(plain, split)
    assert read_manifest(other_cut).cleaning == read_manifest(plain).cleaning


def test_cleaning_that_is_off_leaves_name_and_version_and_each_setting_has_its_own_name(
    dirty: Path, tmp_path: Path
) -> None:
    skip = {"unreadable": "skip"}
    off = build(configure(dirty, tmp_path, **skip, clean={}, dedup={"exact": False}), False)
    assert read_manifest(off).version == 1
    assert "clean" not in (off / "manifest.json").read_text()
    names = {off.name, build(configure(dirty, tmp_path, **skip), False).name}
    assert len(names) == 1
    for settings in (
        {"dedup": {"exact": True}},
        {"clean": {"normalize": "NFC"}},
        {"clean": {"mask": ["ip"]}},
        {"clean": {"languages": ["en"]}},
        {"clean": {"rules": ["c4_citations"]}},
    ):
        names.add(build(configure(dirty, tmp_path, **skip, **settings), False).name)
    assert len(names) == 6


def test_first_copy_stays_even_where_only_a_later_one_would_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(f"text {i // 2} with some words in it\n" * 10)
    folder = build(configure(tmp_path / "in", tmp_path / "out", dedup={"exact": True}), use_ray=False)
    first = [f"{i:02d}.txt" for i in range(0, 30, 2)]
    cut = max(int(0.03 * 2**64), min(map(split_hash, first)) + 1)
    for split in SPLITS:
        names = [name for name in first if (split_hash(name) < cut) == (split == "heldout")]
        assert _documents(folder, split) == [(tmp_path / "in" / name).read_text() for name in names]


def test_cleaning_that_leaves_nothing_says_so(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"60 were removed by data\.clean, data\.dedup or data\.decontaminate"):
        build(configure(texts, tmp_path, clean={"languages": ["zh"]}), use_ray=False)

"""Builds that are not what their manifest says, by accident or by somebody's will."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.manifest import MANIFEST_NAME, SPLITS, read_manifest, write_manifest
from data_pipeline.shards import ShardWriter, TokenSplit, file_sha256
from data_pipeline.verification import verify_build
from moe_dist.errors import DataError


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / built.name))


def _replace_first(folder: Path, **fields: Any) -> None:
    """A manifest, its own hash right, with other fields of the first training shard."""
    manifest = read_manifest(folder)
    first, *others = manifest.splits["train"]
    splits = {**manifest.splits, "train": (dataclasses.replace(first, **fields), *others)}
    write_manifest(folder, dataclasses.replace(manifest, splits=splits))


def _rewrite_first(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """The first training shard with other tokens, and a manifest that has its new hashes."""
    manifest = read_manifest(folder)
    old = manifest.splits["train"][0]
    tokens = change(TokenSplit(folder, "train").tokens(0, old.tokens).astype(np.int32))
    writer = ShardWriter(folder / old.file, 300)
    writer.add(tokens, old.text_bytes)
    _replace_first(folder, **{**dataclasses.asdict(writer.close()), "documents": old.documents})


def test_verify_whole_build_counts_what_its_manifest_has(built: Path) -> None:
    manifest = read_manifest(built)
    seen: list[tuple[int, int]] = []
    found = verify_build(built, lambda done, total: seen.append((done, total)))
    assert found["tokens"] == sum(manifest.num_tokens(split) for split in SPLITS)
    assert found["documents"] == 60
    assert found["shards"] == len(seen) == len(list(built.glob("*.arrow")))
    assert seen[-1] == (found["file_bytes"], found["file_bytes"])


def test_verify_flipped_byte_in_any_file_names_the_file(copy: Path) -> None:
    source = random.Random(0)
    for path in sorted(copy.iterdir()):
        good = path.read_bytes()
        for _ in range(5):
            bad = bytearray(good)
            bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(DataError, match=path.name) as caught:
                verify_build(copy)
            assert "build" in caught.value.fix
        path.write_bytes(good)
    verify_build(copy)


@pytest.mark.parametrize("name", ["train-000000-0000.arrow", "tokenizer.json", MANIFEST_NAME])
def test_verify_missing_or_cut_file_is_named(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(DataError, match=name):
        verify_build(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        verify_build(copy)


@pytest.mark.parametrize(
    "name",
    ["../other/train-000000-0000.arrow", "/etc/passwd", "sub/x.arrow", "..", "", ".hidden.arrow", "a\n.arrow", 3, None],
)
def test_verify_manifest_that_names_a_path_is_refused_before_anything_is_read(copy: Path, name: object) -> None:
    (copy.parent / "other").mkdir()
    shutil.copy(copy / "train-000000-0000.arrow", copy.parent / "other")
    _replace_first(copy, file=name)
    with pytest.raises(DataError, match="files of its own folder"):
        verify_build(copy)


def test_reader_of_a_split_refuses_a_shard_outside_the_folder(copy: Path) -> None:
    (copy.parent / "other").mkdir()
    shutil.copy(copy / "train-000000-0000.arrow", copy.parent / "other")
    _replace_first(copy, file="../other/train-000000-0000.arrow")
    with pytest.raises(DataError, match="a path"):
        TokenSplit(copy, "train")


def test_verify_shard_that_no_manifest_lists_is_refused(copy: Path) -> None:
    shutil.copy(copy / "train-000000-0000.arrow", copy / "train-000099-0000.arrow")
    with pytest.raises(DataError, match=r"train-000099-0000\.arrow"):
        verify_build(copy)


def test_verify_shard_listed_twice_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    first, _, *others = manifest.splits["train"]
    splits = {**manifest.splits, "train": (first, first, *others)}
    write_manifest(copy, dataclasses.replace(manifest, splits=splits))
    with pytest.raises(DataError, match="listed twice"):
        verify_build(copy)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 1}, "tokens in batch 0"),
        ({"documents": 1}, "ends of text"),
        ({"tokens_sha256": "0"}, "sha256 of the tokens"),
        ({"file_bytes": 1}, "bytes, not 1"),
        ({"sha256": None}, "as sha256, not None"),
        ({"tokens": "many"}, "no whole number"),
        ({"tokens": -1}, "no whole number"),
    ],
)
def test_verify_forged_figures_are_found(copy: Path, fields: dict[str, Any], words: str) -> None:
    _replace_first(copy, **fields)
    with pytest.raises(DataError, match=words):
        verify_build(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens, end: tokens[:-1], "ends of text"),
        (lambda tokens, end: np.append(np.int32(end), tokens[:-1]), "as the last token"),
        (lambda tokens, end: np.where(tokens == tokens[0], 300, tokens), "of 300 tokens"),
    ],
    ids=["last end cut off", "end moved to the beginning", "id above the vocabulary"],
)
def test_verify_end_of_text_and_ids_are_checked_under_right_hashes(
    copy: Path, change: Callable[[np.ndarray, int], np.ndarray], words: str
) -> None:
    end = read_manifest(copy).end_of_text
    _rewrite_first(copy, lambda tokens: change(tokens, end))
    with pytest.raises(DataError, match=words):
        verify_build(copy)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"tokens": pa.array([1.0, 2.0])}),
        pa.table({"tokens": pa.array([1, None], pa.int32())}),
        pa.table({"ids": pa.array([1, 2], pa.int32())}),
        pa.table({"tokens": pa.array(["a", "b"])}),
    ],
)
def test_verify_shard_of_another_schema_is_refused(copy: Path, table: pa.Table) -> None:
    path = copy / read_manifest(copy).splits["train"][0].file
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    _replace_first(copy, file_bytes=path.stat().st_size, sha256=file_sha256(path), tokens=2, documents=1)
    with pytest.raises(DataError, match="not tokens of uint16 or int32"):
        verify_build(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("splits"),
        lambda tree: tree["splits"].update(test=[]),
        lambda tree: tree["splits"].pop("heldout"),
        lambda tree: tree["splits"].update(train=3),
        lambda tree: tree["splits"]["train"][0].update(more=1),
        lambda tree: tree["splits"]["train"][0].pop("sha256"),
        lambda tree: tree.update(skipped=[1]),
        lambda tree: tree.update(splits=[]),
        lambda tree: tree.update(end_of_text=10**9),
        lambda tree: tree.update(tokenizer_size="large"),
        lambda tree: tree.update(created_from=[]),
        lambda tree: tree.update(unknown=1),
    ],
)
def test_verify_manifest_of_wrong_shape_is_a_named_error(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((copy / MANIFEST_NAME).read_text())
    del tree["manifest_sha256"]
    change(tree)
    text = json.dumps(tree, sort_keys=True).encode()
    tree["manifest_sha256"] = hashlib.sha256(text).hexdigest()
    (copy / MANIFEST_NAME).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"manifest\.json"):
        verify_build(copy)


def test_verify_folder_that_is_no_build_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no manifest\.json"):
            verify_build(folder)

"""Faults of checkpoints, injected for real: flipped bytes, kills at every call, full disks, ranks that cannot write."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint import store
from moe_dist.checkpoint.load import load_newest_model
from moe_dist.checkpoint.manifest import MANIFEST, read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.checkpoint.reshard import reshard
from moe_dist.errors import CheckpointError
from tests.support.checkpoints import one_rank_checkpoint

FLIPS, PARTS = 1000, 3
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a file system: hundreds of saves wait for no disk."""
    if not SHARED_MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several parts."""
    root = tmp_path_factory.mktemp("whole")
    return reshard(one_rank_checkpoint(root / "one", 7), root / "cut", PARTS)


@pytest.fixture
def path(whole: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, folder / "root" / whole.name))


def flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(place)
        (byte,) = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))


def tensor_at(path: Path, file: str, place: int) -> str:
    """The tensor that a byte of a part belongs to; `header` before all of them."""
    (part,) = (part for part in read_manifest(path).parts if part.file == file)
    inside = [name for name, entry in part.tensors.items() if entry.start <= place < entry.end]
    return inside[0] if inside else "header"


def test_thousand_flipped_bytes_are_all_found_in_the_file_and_tensor_they_are_in(path):
    dice = random.Random(0)
    files = sorted(path.iterdir())
    assert len(files) == PARTS + 1
    for number in range(FLIPS):
        file = files[number % len(files)]
        in_header = number // len(files) % 4 == 0 and file.name != MANIFEST
        size = 8192 if in_header else file.stat().st_size
        place, bit = dice.randrange(size), dice.randrange(8)
        where = "" if file.name == MANIFEST else tensor_at(path, file.name, place)
        flip(file, place, bit)
        with pytest.raises(CheckpointError) as caught:
            verify(path, read_manifest(path))
        assert file.name in caught.value.where and where in caught.value.where, (file.name, place, bit, where)
        flip(file, place, bit)
    verify(path, read_manifest(path))


def test_flipped_byte_met_while_loading_leads_to_the_checkpoint_before(path):
    older = one_rank_checkpoint(path.parent, 5)
    name = "model/blocks.1.feed_forward.experts.down#6"
    manifest = read_manifest(path)
    part, entry = manifest.tensors[name]
    flip(path / part.file, entry.end - 1, 0)
    reports: list[str] = []
    _, found = load_newest_model(path.parent, torch.device("cpu"), reports.append)
    assert found.step == store.step_of(older) == 5
    assert "step-00000007" in reports[0] and part.file in reports[0] and name in reports[0]


@pytest.mark.parametrize("damage", ["missing part", "short part", "long part", "missing manifest", "short manifest"])
def test_missing_or_cut_file_is_named_and_the_checkpoint_before_is_used(path, damage):
    one_rank_checkpoint(path.parent, 5)
    kind, what = damage.split()
    file = path / MANIFEST if what == "manifest" else sorted(path.glob("*.safetensors"))[1]
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if kind == "short" else content + b"\0")
    reports: list[str] = []
    _, found = load_newest_model(path.parent, torch.device("cpu"), reports.append)
    assert found.step == 5 and file.name in reports[0]


def answer_of(*command: str, seconds: int = 240) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_save_killed_at_any_call_leaves_the_newest_committed_checkpoint_whole(folder):
    found = answer_of(sys.executable, "-m", "tests.faults.kill_points", str(folder))
    calls = Counter(row["call"] for row in found)
    assert calls.pop("") == 2  # each save is tried once more after its last point
    assert sum(calls.values()) >= 50
    assert calls.keys() == {"mkdir", "open", "write", "ftruncate", "fsync", "rename", "unlink", "rmdir"}
    for row in found:
        assert row["loaded"] == row["newest"] and not row["reports"], row
        assert row["marks"] in ([row["loaded"]], [row["loaded"] + 0.5]), row  # the old one, or the new one, whole
        assert row["newest"] >= max(row["before"]), row
        assert not row["left"], row  # the next save swept what was left
    assert {row["loaded"] for row in found} == {8, 9}


def can_mount() -> bool:
    """Whether this user may have a mount of their own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="this user may mount no tmpfs of their own")
def test_full_disk_fails_the_save_with_sizes_and_training_goes_on(tmp_path):
    command = ("unshare", "-rm", sys.executable, "-m", "tests.faults.full_disk", str(tmp_path))
    runs = answer_of(*command)
    assert len(runs) == 4
    for run in runs:
        assert run["status"] == "finished" and run["losses"] == runs[0]["losses"] and len(run["losses"]) == 10
        told = [text for text in run["told"] if "no checkpoint" in text]
        assert [text.partition(":")[0] for text in told] == ["step 4", "step 6"]
        word = "No space left on device; " if run in runs[:2] else f"needs {run['needed']:,} bytes"
        assert all(word in text and "bytes free" in text for text in told)
        assert run["left"] == ["step-00000008", "step-00000010"]

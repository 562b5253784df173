"""A build on a disk that is full, and one that a person interrupts: named, nothing in the way, and gone on with."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.exit_codes import ExitCode
from tests.faults.test_checkpoints import can_mount
from tests.launch.conftest import ROOT, wait_until
from tests.launch.test_cli import moe_dist


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of 100 kB that hardly compress."""
    folder, draw = tmp_path_factory.mktemp("builds"), random.Random(0)
    (folder / "text").mkdir()
    for number in range(30):
        (folder / "text" / f"{number:02d}.txt").write_text(" ".join(str(draw.getrandbits(60)) for _ in range(5000)))
    data = {"input": str(folder / "text"), "dir": str(folder / "out"), "sequence_length_tokens": 32}
    data |= {"shard_bytes": 500_000}
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"data": data, "model": {"vocab_size": 400}}))
    return path


@pytest.fixture(scope="module")
def undisturbed(config_path: Path) -> dict[str, str]:
    done = moe_dist("data", "build", str(config_path), "--no-ray")
    assert done.returncode == ExitCode.DONE, done.stderr
    return hashes(config_path.parent / "out")


def hashes(target: Path) -> dict[str, str]:
    """Of all files below a folder, the working folder of a build included."""
    files = (path for path in target.rglob("*") if path.is_file())
    return {str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SCRIPT = """
set -e
mount -t tmpfs -o size=400k tmpfs "$1"
build() { "$2" -m launch.cli data build "$3" --no-ray data.dir="$1"; }
build "$@" && exit 9 || echo "code $?" >&2
find "$1" -path '*/scratch/*' -type f >&2
mount -o remount,size=40m "$1"
build "$@"
find "$1" -name '.*.work' >&2
cp -r "$1"/. "$4"
"""


@pytest.mark.skipif(not can_mount(), reason="this user may mount no tmpfs of their own")
def test_build_on_a_full_disk_names_it_and_goes_on_when_there_is_room(
    config_path: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    small, copy = tmp_path / "small", tmp_path / "copy"
    small.mkdir()
    copy.mkdir()
    arguments = ("unshare", "-rm", "sh", "-c", SCRIPT, "sh", str(small), sys.executable, str(config_path), str(copy))
    done = subprocess.run(
        arguments, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr and "free space and build again" in done.stderr
    assert "code 2" in done.stderr and "Traceback" not in done.stderr
    assert "/scratch/" not in done.stderr and ".work" not in done.stderr
    assert hashes(copy) == undisturbed


def test_build_that_is_interrupted_says_so_and_goes_on_with_the_same_bytes(
    config_path: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    target, told = tmp_path / "out", tmp_path / "told"
    arguments = ("data", "build", str(config_path), "--no-ray", f"data.dir={target}")
    with told.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments], cwd=ROOT, stderr=stream)
        wait_until(lambda: "train tokenizer" in told.read_text(), 60, "the tokenizer's turn")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == ExitCode.INTERRUPTED
    assert told.read_text().endswith("stopped at once; the same command goes on from what is done\n")
    done = moe_dist(*arguments)
    assert done.returncode == ExitCode.DONE and "found done" in done.stderr
    assert hashes(target) == undisturbed

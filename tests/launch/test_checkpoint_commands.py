"""`moe-dist checkpoint` as a person and as a script see it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launch.checkpoint_commands import checkpoint_app
from moe_dist.checkpoint import store
from moe_dist.checkpoint.compare import differ
from moe_dist.checkpoint.manifest import manifest_bytes, read_manifest
from moe_dist.checkpoint.write import hashes_of
from moe_dist.errors import CheckpointError, ConfigError
from tests.launch.test_cli import moe_dist
from tests.support.checkpoints import one_rank_checkpoint

EXPERT = "exp_avg/blocks.1.feed_forward.experts.down#5"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with two checkpoints that differ in their steps alone."""
    run = tmp_path_factory.mktemp("run")
    for step in (5, 10):
        one_rank_checkpoint(run / "checkpoints", step, mark=2.0)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def answer(*arguments: str | Path) -> tuple[int, Any]:
    """Exit code and the last line of standard output, as a script reads it."""
    done = CliRunner().invoke(checkpoint_app, [*map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def write_tensor(path: Path, name: str, value: torch.Tensor) -> None:
    """Another value for a tensor, with hashes as a save would have written them."""
    manifest = read_manifest(path)
    part, entry = manifest.tensors[name]
    content = value.numpy().tobytes()
    with (path / part.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(content)
    entry.hashes[:] = hashes_of(memoryview(content))
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))


def test_list_and_show_say_what_there_is(run):
    code, found = answer("list", run)
    assert code == 0 and [row["step"] for row in found["checkpoints"]] == [10, 5]
    code, found = answer("show", run)
    assert code == 0 and found["step"] == 10 and found["data"] == {"cursor": 10}
    assert found["experts"]["blocks.1.feed_forward.experts.down"] == 8
    assert found["tensors"]["exp_avg"] == found["tensors"]["exp_avg_sq"]
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    _, found = answer("list", run)
    assert "manifest.json" in found["checkpoints"][0]["problem"]


def test_verify_names_file_and_tensor_and_ends_with_one(run):
    code, found = answer("verify", run)
    assert code == 0 and found["whole"]
    path = run / "checkpoints" / "step-00000010"
    part, entry = read_manifest(path).tensors[EXPERT]
    with (path / part.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"x")
    code, found = answer("verify", run)
    assert code == 1 and not found["whole"]
    (problem,) = found["checkpoints"][0]["problems"]
    assert part.file in problem["where"] and EXPERT in problem["where"]
    assert found["checkpoints"][1]["whole"]


def test_diff_names_tensor_and_expert_with_the_largest_differences(run):
    older, newer = (run / "checkpoints" / store.step_name(step) for step in (5, 10))
    code, found = answer("diff", older, newer)
    assert code == 0 and found["equal"] and found["steps"] == [5, 10] and found["equal_tensors"] == found["tensors"]
    changed = torch.full(read_manifest(newer).tensors[EXPERT][1].shape, 2.0, dtype=torch.float64)
    changed[0, 0], changed[1, 1] = 2.5, 1.0
    write_tensor(newer, EXPERT, changed)
    code, found = answer("diff", older, newer)
    assert code == 1 and found["equal_tensors"] == found["tensors"] - 1
    (row,) = found["different"]
    assert (row["name"], row["expert"], row["numbers"]) == (EXPERT, 5, 2)
    assert (row["largest"], row["largest_relative"]) == (1.0, 0.5)


def test_difference_of_numbers_that_are_none():
    nan, inf = math.nan, math.inf
    assert differ("a", torch.tensor([nan, inf, 0.0]), torch.tensor([nan, inf, -0.0])) is None
    found = differ("a", torch.tensor([nan, inf, 1.0]), torch.tensor([1.0, -inf, 1.0]))
    assert found is not None and found.numbers == 2 and found.largest == inf and found.expert is None


def test_reshard_cuts_into_like_parts_that_hold_the_same(run, tmp_path):
    code, found = answer("reshard", run, "--out", tmp_path / "new", "--parts", 4)
    assert code == 0 and found["parts"] == 4
    manifest = read_manifest(Path(found["path"]))
    sizes = [part.bytes for part in manifest.parts]
    assert len(sizes) == 4 and max(sizes) < 1.1 * min(sizes)
    assert answer("verify", found["path"])[0] == 0
    assert answer("diff", run, found["path"])[1]["equal"]
    with pytest.raises(CheckpointError, match="never written over"):
        answer("reshard", run, "--out", tmp_path / "new", "--parts", 2)


def test_reshard_of_a_damaged_checkpoint_leaves_nothing(run, tmp_path):
    path = run / "checkpoints" / "step-00000010"
    part, entry = read_manifest(path).tensors[EXPERT]
    with (path / part.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="down#5"):
        answer("reshard", path, "--out", tmp_path / "new", "--parts", 2)
    assert not list((tmp_path / "new").iterdir())


def test_prune_counts_whole_checkpoints_and_keeps_every_mth(run):
    root = run / "checkpoints"
    for step in (20, 30, 35):
        one_rank_checkpoint(root.parent / "more" / str(step), step)
        shutil.move(root.parent / "more" / str(step) / store.step_name(step), root)
    (root / "step-00000035" / "manifest.json").write_text("{}")
    code, found = answer("prune", run, "--keep", 1, "--keep-every", 10, "--dry-run")
    assert code == 0 and len(list(root.iterdir())) == 5
    _, found = answer("prune", run, "--keep", 1, "--keep-every", 10)
    kept, gone = ({store.step_of(Path(path)) for path in found[name]} for name in ("kept", "removed"))
    assert kept == {30, 20, 10} and gone == {5}
    assert {path.name for path in root.iterdir()} == {store.step_name(step) for step in (35, 30, 20, 10)}


def test_place_without_checkpoints_is_wrong_input(tmp_path):
    with pytest.raises(ConfigError):
        answer("show", tmp_path)
    done = moe_dist("checkpoint", "verify", str(tmp_path), "--json")
    assert done.returncode == ConfigError.exit_code == 2 and "RUN|CHECKPOINT" in done.stderr

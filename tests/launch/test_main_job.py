"""The main job for real, in small: text to trained model through the commands a person runs.

One little corpus, one configuration; the reference is a run on one rank that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.launch.conftest import ROOT, alive, events, head_node, wait_until
from tests.support.tolerances import TWENTY_STEPS

STEPS = 24

TREE: dict[str, Any] = {
    "model": {
        "vocab_size": 400,
        "num_layers": 2,
        "width": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_width": 16,
        "moe": {"num_experts": 8, "expert_width": 32, "shared_expert_width": 32, "capacity_factor": 1.5},
    },
    "train": {"steps": STEPS, "global_batch_sequences": 8, "micro_batch_sequences": 4},
    "optimizer": {"warmup_steps": 10},
    "evaluate": {"sequences": 8},
    "generate": {"max_new_tokens": 8},
    "checkpoint": {"every_steps": 8},
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration over a few files of the interpreter's library, and its shards."""
    folder = tmp_path_factory.mktemp("job")
    text = folder / "text"
    text.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "bdb", "calendar", "cmd", "code", "copy", "csv", "enum", "shutil", "tarfile"):
        (text / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    data = {"input": str(text), "dir": str(folder / "data"), "sequence_length_tokens": 64, "holdout_fraction": 0.2}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "data": data}))
    return path


def start(command: str, config: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own, as a terminal does."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", command, str(config), f"run.dir={run_dir}", *more, "--json"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expected_code: int = 0, seconds: float = 180) -> dict[str, Any]:
    """Waits for a command and returns its JSON object."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == expected_code, err[-3000:]
    return json.loads(out.splitlines()[-1])


def run(command: str, config: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    return finish(start(command, config, run_dir, *more))


@pytest.fixture(scope="module")
def two_ranks(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run of two ranks, the reference of most tests."""
    return run("simulate", config_path, tmp_path_factory.mktemp("two") / "run", "--ranks=2")


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: any(event["step"] >= step for event in events(run_dir, "step"))


def test_losses_are_the_same_on_one_two_three_and_four_ranks(config_path, two_ranks, tmp_path):
    for ranks in (1, 3, 4):
        other = run("simulate", config_path, tmp_path / f"{ranks}", f"--ranks={ranks}")
        assert other["losses"][:20] == pytest.approx(two_ranks["losses"][:20], rel=TWENTY_STEPS)
        assert len(other["workers"]) == ranks
    assert two_ranks["losses"][-1] < two_ranks["losses"][0] - 0.1


def test_summary_and_record_of_a_run_are_complete(two_ranks):
    run_dir = Path(two_ranks["run_dir"])
    assert two_ranks["status"] == "finished" and two_ranks["steps"] == STEPS == len(two_ranks["losses"])
    heldout = two_ranks["heldout"]
    assert heldout["after"]["loss"] < heldout["before"]["loss"]
    assert 0 < heldout["after"]["bits_per_byte"] < heldout["before"]["bits_per_byte"] < 10
    assert 0 < heldout["bigram_bits_per_byte"] < 10
    assert [len(layer["load"]) for layer in two_ranks["expert_load"]] == [8, 8]
    assert sum(two_ranks["expert_load"][0]["load"]) == pytest.approx(1)
    assert len(two_ranks["samples"]) == 3
    assert all(sample["text"].startswith(sample["prompt"]) for sample in two_ranks["samples"])
    rows = pq.read_table(run_dir / "metrics").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == two_ranks["losses"]
    for row in rows:
        assert [sum(load) for load in row["demand"]] == [8 * 64 * 2] * 2
        assert 0 <= row["drop_rate"] < 1 and row["tokens"] == 8 * 64
    assert list((run_dir / "tensorboard").glob("events*"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["steps"] == STEPS
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-00000016", "step-00000024"]


def test_simulate_ctrl_c_then_again_gives_the_losses_of_an_undisturbed_run(config_path, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    process = start("simulate", config_path, run_dir, "--ranks=2")
    wait_until(reached(run_dir, 3), 90, "step 3")
    os.killpg(process.pid, signal.SIGINT)
    stopped = finish(process, expected_code=130)
    assert stopped["status"] == "interrupted" and 3 <= stopped["steps"] < STEPS
    continued = run("simulate", config_path, run_dir, "--ranks=2")
    assert [event["first_step"] for event in events(run_dir, "start")] == [0, stopped["steps"]]
    assert continued["losses"] == two_ranks["losses"]
    assert continued["heldout"] == two_ranks["heldout"]


def test_simulate_killed_then_again_continues_from_the_last_checkpoint(config_path, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    process = start("simulate", config_path, run_dir, "--ranks=2")
    wait_until(reached(run_dir, 10), 90, "step 10")
    process.kill()
    process.communicate()
    workers = [worker["pid"] for worker in events(run_dir, "start")[-1]["workers"]]
    wait_until(lambda: not any(map(alive, workers)), 20, "the end of the ranks")
    continued = run("simulate", config_path, run_dir, "--ranks=2")
    assert events(run_dir, "start")[-1]["first_step"] in (8, 16)
    assert continued["losses"] == two_ranks["losses"]


def test_ray_run_survives_a_killed_worker_and_ctrl_c_bit_for_bit(config_path, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    process = start("train", config_path, run_dir)
    wait_until(reached(run_dir, 9), 120, "step 9")
    os.kill(events(run_dir, "start")[-1]["workers"][1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(events(run_dir, "start")) == 2, 60, "the new group of workers")
    assert events(run_dir, "start")[-1]["first_step"] in (8, 16)
    # The second group is stopped by Ctrl-C at the terminal, and the same command goes on.
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, 0), err[-3000:]  # 0 if the last step was already made
    continued = run("train", config_path, run_dir)
    assert continued["losses"] == two_ranks["losses"]
    assert continued["heldout"] == two_ranks["heldout"]
    again = start("train", config_path, run_dir)
    assert finish(again)["losses"] == two_ranks["losses"]  # a finished run shows its result


def test_two_nodes_train_the_same_model(config_path, two_ranks, tmp_path):
    from ray.cluster_utils import Cluster as TestCluster

    nodes = TestCluster()
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, include_dashboard=False)
        more = ("--address", nodes.address, "launch.placement=strict_spread")
        summary = run("train", config_path, tmp_path / "run", *more)
    finally:
        nodes.shutdown()
    assert len({worker["node"] for worker in summary["workers"]}) == 2
    assert summary["losses"] == two_ranks["losses"]


def test_submitted_job_trains_the_same_model_and_returns_its_exit_code(config_path, two_ranks, tmp_path_factory):
    # One CPU on that node: two ranks take half each.
    folder = tmp_path_factory.mktemp("j")
    with head_node(folder) as address:
        more = ("--address", address, "launch.cpus_per_worker=0.5")
        answer = run("submit", config_path, folder / "run", *more)
        assert answer["exit_code"] == 0 and answer["job_id"]
        assert json.loads((folder / "run" / "summary.json").read_text())["losses"] == two_ranks["losses"]
        missing = start("submit", config_path, folder / "other", *more, f"data.input={folder}/nothing")
        assert finish(missing, expected_code=2)["exit_code"] == 2


@pytest.fixture
def broken_input(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(override, words that the message must have) for each kind of unusable input."""
    kind = request.param
    folder = tmp_path / "input"
    folder.mkdir()
    if kind == "not UTF-8":
        (folder / "bad.txt").write_bytes(b"caf\xe9 au lait\n")
        yield f"data.input={folder}", "bad.txt"
    elif kind == "empty folder":
        yield f"data.input={folder}", str(folder)
    elif kind == "damaged zst":
        import zstandard

        whole = zstandard.ZstdCompressor().compress(json.dumps({"text": "x" * 5000}).encode() + b"\n")
        (folder / "part.jsonl.zst").write_bytes(whole[: len(whole) // 2])
        yield f"data.input={folder}", "part.jsonl.zst"
    elif kind == "missing folder":
        yield f"data.input={folder}s", "input"
    else:
        yield "model.moe.top_k=9", "model.moe.top_k"


@pytest.mark.parametrize(
    "broken_input", ["not UTF-8", "empty folder", "damaged zst", "missing folder", "top-k"], indirect=True
)
def test_unusable_input_is_one_screen_without_a_traceback(broken_input, config_path, tmp_path):
    override, words = broken_input
    process = start("simulate", config_path, tmp_path / "run", "--ranks=1", override)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert words in err and "fix" in err and "Traceback" not in err
    assert len(err.splitlines()) < 15


def test_generate_continues_prompts_with_the_newest_checkpoint(two_ranks):
    command = [sys.executable, "-m", "launch.cli", "generate", two_ranks["run_dir"], "--prompt", "import ", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    (sample,) = json.loads(found.stdout.splitlines()[-1])["samples"]
    assert sample["text"].startswith("import ") and len(sample["text"]) > len("import ")

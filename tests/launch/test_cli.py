"""The `moe-dist` command from outside: exit codes, error texts, help, and what it does to a run's directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import ROOT

SUMMARY = {
    "status": "finished",
    "run_dir": "r",
    "steps": 20,
    "losses": [7.5, 6.5],
    "tokens_per_second": 5000.0,
    "mfu": 0.25,
    "parameters": {"total": 1000, "active": 600},
    "expert_load": [{"layer": 0, "load": [0.25, 0.75], "max_vio": 0.5}],
}


def moe_dist(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'r'}}}\ntrain: {{steps: 20}}\n")
    return path


@pytest.fixture
def finished(tmp_path: Path, config_path: Path) -> Path:
    """The directory of a finished run of the config."""
    from moe_dist.config import load_config

    run_dir = tmp_path / "r"
    run_dir.mkdir()
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(load_config(config_path).model_dump(mode="json")))
    return run_dir


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "C", "train.stepz=3"), "did you mean train.steps?"),
        (("train", "C", "model.num_heads=3"), "model.num_kv_heads"),
        (("train", "none.yaml"), "the config file is read"),
        (("simulate", "C"), "--ranks"),
        (("simulate", "C", "--ranks", "0"), "--ranks"),
        (("train", "C", "--nope"), "No such option"),
        (("nonsense",), "No such command"),
        (("generate", "nowhere"), "RUN_DIR"),
        (("data", "inspect", "nowhere"), "no manifest.json"),
        (("data", "verify", "nowhere"), "no manifest.json"),
        (("data", "inspect", "C"), "no manifest.json"),
        (("data", "build", "C", "--no-ray", "data.input=/dev/null"), "not a pipe or a device"),
        (("data", "build", "C", "--no-ray", f"data.dir={'x' * 300}"), "its builds can be read"),
        (("data", "export", "nowhere", "--out", "nowhere"), "no manifest.json"),
        (("data", "export", "nowhere"), "--out"),
        (("data", "export", "nowhere", "--format", "csv", "--out", "x"), "megatron"),
        (("status", "job"), "--address"),
    ],
)
def test_command_wrong_input_exits_2_in_one_screen(config_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = moe_dist(*(str(config_path) if word == "C" else word for word in arguments))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 15
    assert not done.stdout


def test_command_wrong_input_imports_neither_torch_nor_ray(config_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['moe-dist', 'train', sys.argv[1], 'train.stepz=3']\n"
        "from launch.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, config_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 []\n"


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "simulate",
        "data build",
        "data inspect",
        "data verify",
        "submit",
        "logs",
        "status",
        "stop",
        "generate",
        "config show",
    ]
    + ["routing record", "routing diff", "routing replay"],
)
def test_help_every_command_has_text(command: str) -> None:
    done = moe_dist(*command.split(), "--help")
    assert done.returncode == 0
    if not command.startswith("config"):
        assert f"Example: moe-dist {command}" in done.stdout


def test_train_finished_run_prints_the_stored_report(config_path: Path, finished: Path) -> None:
    done = moe_dist("train", str(config_path))
    assert done.returncode == 0, done.stderr
    assert "--again trains anew" in done.stderr
    assert "5,000 tokens/s, MFU 25.0%" in done.stdout
    as_json = moe_dist("simulate", str(config_path), "--ranks", "2", "--json")
    assert json.loads(as_json.stdout)["losses"] == [7.5, 6.5]


def test_train_other_config_in_the_directory_is_refused(config_path: Path, finished: Path) -> None:
    done = moe_dist("train", str(config_path), "seed=1", "model.width=64", "launch.workers=3")
    assert done.returncode == 2
    assert re.search(r"these differ: seed \(0 -> 1\), model.width \(256 -> 64\)\n", done.stderr)
    assert "--again" in done.stderr
    assert (finished / "summary.json").exists()


def test_train_bug_shows_its_traceback_and_exits_1(config_path: Path, tmp_path: Path) -> None:
    package = tmp_path / "data_pipeline"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "build.py").write_text("def build(*_, **__): raise ZeroDivisionError('a bug')\n")
    done = moe_dist("simulate", str(config_path), "--ranks", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: a bug" in done.stderr


def test_simulate_impossible_layout_is_refused_before_the_data_is_built(config_path: Path, tmp_path: Path) -> None:
    done = moe_dist("simulate", str(config_path), "--ranks", "2", "parallel.expert=3", f"data.dir={tmp_path}/data")
    assert done.returncode == 2
    assert "parallel.expert=2" in done.stderr
    assert not (tmp_path / "data").exists()


def test_data_build_with_cleaning_shows_what_it_did_and_gives_it_as_json(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "notes").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "in" / "notes" / f"{i:02d}.txt").write_text(f"Note {i // 2}, written by a{i // 2}@b.org.\n" * 20)
    command = ["data", "build", str(config_path), f"data.input={tmp_path / 'in'}", f"data.dir={tmp_path / 'data'}"]
    command += ["data.dedup.exact=true", "data.clean.mask=[email]", "data.sequence_length_tokens=32", "--no-ray"]
    done = moe_dist(*command)
    assert done.returncode == 0, done.stderr
    assert "cleaning kept 20 of 40 documents" in done.stdout
    assert re.search(r"exact_duplicate .* 20 ", done.stdout)
    assert re.search(r"notes .* 40 .* 20 .* exact_duplicate 20", done.stdout)
    as_json = moe_dist(*command, "--json")
    assert "cleaning kept" in as_json.stderr
    cleaning = json.loads(as_json.stdout)["cleaning"]
    assert cleaning["changed"] == {"mask_email": {"notes": 40}}
    assert cleaning["removed"] == {"exact_duplicate": {"notes": 20}}

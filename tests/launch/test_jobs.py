"""Ray Jobs against a head node of our own: shipping, the log, exit codes, stopping."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch import jobs
from moe_dist.config import parse_config
from moe_dist.errors import ConfigError
from tests.launch.conftest import head_node

# Takes the place of the shipped `launch/cli.py`: what a job does is tested elsewhere.
_COMMAND = """
import signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
import data_pipeline, moe_dist.config
signal.signal(signal.SIGTERM, lambda *_: (print("checkpoint", flush=True), sys.exit(130)))
print("seed", config["seed"], "in", config["run"]["dir"], flush=True)
time.sleep(600 if config["seed"] == 99 else 0)
sys.exit(config["seed"])
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with head_node(tmp_path_factory.mktemp("h")) as address:
        yield address


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, with the shipped command replaced."""
    stage = jobs.stage

    def staged(config: object, folder: Path) -> None:
        stage(config, folder)  # type: ignore[arg-type]
        (folder / "launch" / "cli.py").write_text(textwrap.dedent(_COMMAND))

    monkeypatch.setattr(jobs, "stage", staged)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: runs/x}\n")
    return path


def test_submit_job_exit_code_and_log_come_back(head: str, config_path: Path, tmp_path: Path) -> None:
    for code in (0, 3):
        log = io.StringIO()
        job_id, exit_code = jobs.submit(str(config_path), [f"seed={code}"], head, log=log)
        assert exit_code == code
        assert f"seed {code} in {tmp_path}/runs/x" in log.getvalue()
    assert jobs.status(job_id, head)["status"] == "FAILED"
    again = io.StringIO()
    assert jobs.logs(job_id, head, log=again) == 3
    assert "seed 3" in again.getvalue()


def test_stop_running_job_lets_it_save(head: str, config_path: Path) -> None:
    from tests.launch.conftest import wait_until

    job_id, exit_code = jobs.submit(str(config_path), ["seed=99"], head, follow=False)
    assert exit_code == 0

    def log_text() -> str:
        log = io.StringIO()
        jobs.logs(job_id, head, follow=False, log=log)
        return log.getvalue()

    wait_until(lambda: "seed 99" in log_text(), 60, "the job's first line")
    assert jobs.stop(job_id, head)["status"] == "STOPPED"
    assert "checkpoint" in log_text()


def test_status_unknown_job_is_a_named_error(head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.status("raysubmit_none", head)
    assert caught.value.where == "JOB_ID"


def test_submit_nobody_at_the_address_is_a_named_error(config_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.submit(str(config_path), [], "http://127.0.0.1:1")
    assert caught.value.where == "--address"
    assert "ray start --head" in caught.value.fix


def test_stage_carries_code_and_config_only(tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    jobs.stage(parse_config({"seed": 7}), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", *sorted(jobs.PACKAGES)]
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 7
    assert not list(folder.rglob("__pycache__"))
    assert (folder / "moe_dist" / "config" / "schema.py").exists()


def test_absolute_with_notes_names_the_paths_the_cluster_must_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = jobs.absolute_with_notes(parse_config({"run": {"dir": "a"}, "data": {"dir": "b", "input": "c"}}))
    assert (config.run.dir, config.data.dir, config.data.input) == tuple(f"{tmp_path}/{name}" for name in "abc")
    assert capsys.readouterr().err.count("every node of the cluster must see this path") == 3

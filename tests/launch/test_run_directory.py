"""What a run's directory says before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run_directory import changed_keys, prepare, resolve_paths
from moe_dist.config import Config, parse_config
from moe_dist.errors import ConfigError


def config_of(folder: Path, **sections: Any) -> Config:
    return parse_config({"run": {"dir": str(folder / "run")}, "train": {"steps": 10}, **sections})


def finish(config: Config, steps: int = 10) -> None:
    summary = {"status": "finished", "steps": steps}
    (Path(config.run.dir) / "summary.json").write_text(json.dumps(summary))


def test_prepare_new_directory_stores_the_config(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert prepare(config, again=False) is None
    assert parse_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == config


def test_prepare_unfinished_run_continues_even_with_again(tmp_path: Path) -> None:
    prepare(config_of(tmp_path), again=False)
    (tmp_path / "run" / "mark").touch()
    assert prepare(config_of(tmp_path), again=True) is None
    assert (tmp_path / "run" / "mark").exists()


def test_prepare_finished_run_returns_its_summary_or_is_set_aside(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for _ in range(2):
        prepare(config, again=True)
        finish(config)
    assert prepare(config, again=False) == {"status": "finished", "steps": 10}
    assert prepare(config, again=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_prepare_finished_run_with_more_steps_goes_on(tmp_path: Path) -> None:
    prepare(config_of(tmp_path), again=False)
    finish(config_of(tmp_path))
    assert prepare(config_of(tmp_path, train={"steps": 20}), again=False) is None


def test_prepare_other_config_is_refused_or_set_aside(tmp_path: Path) -> None:
    prepare(config_of(tmp_path), again=False)
    other = config_of(tmp_path, seed=3, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"seed \(0 -> 3\), optimizer.lr \(0.001 -> 0.5\)"):
        prepare(other, again=False)
    assert prepare(other, again=True) is None
    assert (tmp_path / "run.1").exists()


def test_changed_keys_what_leaves_the_result_alone_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(config_of(tmp_path, data={"input": "text"}), again=False)
    same = config_of(
        tmp_path,
        data={"input": str(tmp_path / "text"), "dir": "elsewhere"},
        train={"steps": 50, "threads_per_rank": 3, "micro_batch_sequences": 2, "checks": "full"},
        launch={"workers": 5},
        parallel={"expert": 2},
        checkpoint={"keep": 9},
        generate={"top_k": 1},
        evaluate={"sequences": 3},
    )
    assert changed_keys(same) == []


def test_changed_keys_unreadable_config_is_a_named_error(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepare(config, again=False)
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="valid YAML"):
        changed_keys(config)


def test_resolve_paths_leaves_urls_and_names_of_inputs_as_they_are(tmp_path: Path) -> None:
    for given in ("s3://bucket/texts/**/*.md", "python-library"):
        assert resolve_paths(config_of(tmp_path, data={"input": given})).data.input == given
    assert Path(resolve_paths(config_of(tmp_path, data={"input": "texts"})).data.input).is_absolute()

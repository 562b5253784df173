"""`moe-dist config show`, `check` and `explain`, as a person and as a script see them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from launch.config_commands import config_app
from moe_dist.config import load_config
from moe_dist.config.explain import key_rows, resolved
from moe_dist.errors import ConfigError


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.yaml"
    path.write_text("train: {steps: 5}\n")
    return str(path)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text("model: {num_heads: 6, num_kv_heads: 4, moe: {top_k: 9}}\n")
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(config_app, arguments)


def last_json(result: Result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def test_show_prints_yaml_that_loads_to_the_same_config(good: str, tmp_path: Path) -> None:
    result = run("show", good, "optimizer.lr=1e-8")
    assert result.exit_code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_config(printed) == load_config(good, ["optimizer.lr=1e-8"])
    assert yaml.safe_load(result.stdout)["train"]["steps"] == 5


def test_show_json_ends_with_the_tree(good: str) -> None:
    result = run("show", good, "seed=3", "--json")
    assert last_json(result) == {"config": resolved(load_config(good, ["seed=3"]))}


def test_show_wrong_config_raises_the_named_error(bad: str) -> None:
    assert isinstance(run("show", bad).exception, ConfigError)


def test_check_good_config_says_ok(good: str) -> None:
    result = run("check", good)
    assert (result.exit_code, result.stdout) == (0, f"ok: {good}\n")
    assert last_json(run("check", good, "--json")) == {"ok": True, "problems": []}


def test_check_bad_config_lists_every_broken_rule_and_exits_2(bad: str) -> None:
    result = run("check", bad)
    assert (result.exit_code, result.stdout) == (2, "")
    for part in ("model.num_kv_heads=3", "model.moe.top_k=8 or less"):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ((), ["model.num_kv_heads", "model.moe.top_k"]),
        (("train.steps=0", "zebra=1"), ["train.steps", "zebra"]),
        (("train.steps",), ["train.steps"]),
    ],
)
def test_check_json_holds_every_problem(bad: str, arguments: tuple[str, ...], where: list[str]) -> None:
    result = run("check", bad, *arguments, "--json")
    figures = last_json(result)
    assert (result.exit_code, figures["ok"]) == (2, False)
    assert [problem["where"] for problem in figures["problems"]] == where
    assert all(problem["rule"] and problem["fix"] for problem in figures["problems"])


def test_check_missing_file_exits_2(tmp_path: Path) -> None:
    result = run("check", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


def test_explain_all_names_every_key() -> None:
    result = run("explain")
    assert result.exit_code == 0
    for row in key_rows():
        assert row.path.rpartition(".")[2] in result.stdout
    assert "Query heads." in result.stdout


def test_explain_one_key_gives_all_that_is_known() -> None:
    lines = run("explain", "model.moe.top_k").stdout.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["key", "meaning", "type", "unit", "allowed", "default"]
    assert lines[-1].split() == ["default", "2"]


def test_explain_section_lists_only_its_keys() -> None:
    output = run("explain", "optimizer").stdout
    assert "weight_decay" in output
    assert "top_k" not in output


def test_explain_json_gives_rows() -> None:
    (row,) = last_json(run("explain", "train.steps", "--json"))["keys"]
    assert row["path"] == "train.steps"
    assert (row["unit"], row["default"], row["allowed"]) == ("steps", 100, "at least 1")
    assert len(last_json(run("explain", "--json"))["keys"]) == len(key_rows())


def test_explain_unknown_key_raises_the_named_error() -> None:
    error = run("explain", "model.moe.topk").exception
    assert isinstance(error, ConfigError)
    assert (error.exit_code, error.fix) == (2, "did you mean model.moe.top_k?")


def test_import_brings_neither_torch_nor_ray() -> None:
    code = "import sys, launch.config_commands; print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"

"""`moe-dist routing` as a person and as a script see it."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from launch.routing_commands import routing_app
from moe_dist.errors import ConfigError, LedgerError
from tests.launch.test_cli import moe_dist
from tests.launch.test_main_job import TREE


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("routing")
    (folder / "text").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "calendar", "enum"):
        (folder / "text" / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    data = {"input": str(folder / "text"), "dir": str(folder / "data"), "sequence_length_tokens": 32}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "data": {**data, "holdout_fraction": 0.3}}))
    return str(path)


def routing(*arguments: str) -> dict:
    done = moe_dist("routing", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def here(*arguments: str) -> Result:
    """The same in this process, which need not start up again."""
    return CliRunner().invoke(routing_app, arguments)


def last_json(*arguments: str) -> dict:
    return json.loads(here(*arguments, "--json").stdout.splitlines()[-1])


def flip_one_choice(folder: Path) -> int:
    """Sends token 5 of the second layer elsewhere, in a ledger that is otherwise as it was; returns its new expert."""
    from moe_dist.train.routing_ledger import read_part, write_part

    (file,) = (folder / "routing").glob("step-00000002*")
    page = read_part(file)
    row = page.choices[1].expert_TK[5]
    row[1] = next(e for e in range(8) if e not in row)
    write_part(folder / "routing", 2, (0, 1), page)
    return int(row[1])


def test_routing_recorded_compared_and_followed(config_path: str, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = routing("record", config_path, "--ranks", "1", "--steps", "2", "--out", one)
    small = "train.micro_batch_sequences=2"
    assert here("record", config_path, "--ranks", "2", "--steps", "2", "--out", two, small).exit_code == 0
    found = last_json("diff", one, two)
    assert found["equal"] and [(row["step"], row["layer"]) for row in found["rows"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    followed = last_json("replay", one, config_path, "--ranks", "1", "optimizer.lr=0.1")
    assert followed["losses"][0] == first["losses"][0] and followed["losses"][1] != first["losses"][1]
    drift = torch.tensor(followed["drift"])
    assert drift[0].tolist() == [0.0, 0.0] and drift[1].min() > 0 and drift.max() <= 1
    expert = flip_one_choice(Path(one))
    found = last_json("diff", one, two)
    assert not found["equal"] and sum(row["experts"] for row in found["rows"]) == 1
    assert {name: found["first"][name] for name in ("step", "layer", "token")} == {"step": 2, "layer": 1, "token": 5}
    assert str(expert) in found["first"]["a"].split() and str(expert) not in found["first"]["b"].split()
    shown = here("diff", one, two)
    assert shown.exit_code == 1 and "first: step 2, layer 1, token 5" in shown.stdout
    again = here("record", config_path, "--ranks", "1", "--steps", "2", "--out", one).exception
    assert isinstance(again, ConfigError) and "new or empty" in again.rule
    other = here("replay", one, config_path, "--ranks", "1", "seed=3").exception
    assert isinstance(other, LedgerError) and "seed is 3" in other.rule


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("replay", "nowhere", "C", "--ranks", "1"), "no recorded step"),
        (("record", "C", "--ranks", "1", "--steps", "2"), "--out"),
        (("record", "C", "--ranks", "1", "--steps", "1", "--out", "x", "train.stepz=1"), "train.steps?"),
    ],
)
def test_routing_wrong_input_exits_2(config_path: str, arguments: tuple[str, ...], said: str) -> None:
    done = moe_dist("routing", *(config_path if word == "C" else word for word in arguments))
    assert done.returncode == 2 and said in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout

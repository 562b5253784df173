"""`moe-dist verify`: equal where it must be, and every planted mistake found, placed and explained."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from launch import verify_commands
from launch.cli import app
from moe_dist.config import parse_config
from moe_dist.moe import router_kinds
from moe_dist.train.step import micro_batches
from moe_dist.verify.compare import GROUPS, Difference, Report, group_of
from moe_dist.verify.diagnosis import common_ground, diagnose
from moe_dist.verify.lattice import _choices, cells_of, config_of, cut_of, rows_of
from moe_dist.verify.proof import Proof
from moe_dist.verify.shrink import shrunk
from moe_dist.verify.step import StepProof, oracle_step, whole_model
from tests.launch.conftest import ROOT
from tests.launch.test_cli import moe_dist
from tests.traps import TRAPS
from tests.verify import planted as script
from tests.verify.mistake import Mistake
from tests.verify.mistakes import MISTAKES
from tests.verify.planted import BY_CUT, ELSEWHERE, RANKS, run_gang, small_demo

DEMO = str(ROOT / "configs" / "demo.yaml")


def quiet(done: int, total: int) -> None:
    return None


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a gang of four found in each proof, right and with its mistake."""
    return run_gang(tmp_path_factory.mktemp("verify"))


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_placed_and_explained(planted, name):
    mistake, found = MISTAKES[name], planted[name]
    assert found["right"]["equal"], found["right"]["failures"]
    [cell], [failure] = found["planted"]["cells"], found["planted"]["failures"]
    assert not cell["equal"] and not found["planted"]["equal"]
    assert (cell["stage"], cell["group"]) == mistake.place, cell
    for words in mistake.words:
        assert words in cell["diagnosis"], cell["diagnosis"]
    assert script.finding_of(name, found).caught
    assert failure["diagnoses"] == [cell["diagnosis"]] and failure["layouts"] == [cell["layout"]]
    assert cell["first_difference"].startswith("rank ") and cell["worst"] > 1e-10


def test_every_trap_is_planted_or_has_a_test_elsewhere_that_exists():
    planted_traps = {mistake.trap for mistake in MISTAKES.values()}
    assert {str(trap) for trap in TRAPS} <= planted_traps | ELSEWHERE.keys()
    for why, test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert why and f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_docs_hold_the_tables_of_the_mistakes():
    docs = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    section = docs.partition("## Planted in the ranks of `verify`")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert [row for row in rows if not row.startswith("| trap |")] == script.docs_rows()
    assert f"All {len(MISTAKES)} are caught" in section


@pytest.mark.parametrize("missed", [None, "routers not updated"])
def test_script_fails_where_a_mistake_is_missed(monkeypatch, capsys, missed):
    def cell_for(mistake: Mistake, name: str) -> dict[str, Any]:
        told = "" if name == missed else "; ".join(mistake.words)
        stage, group = mistake.place
        return {"layout": "x", "stage": stage, "group": group, "diagnosis": told}

    found = {
        name: {"right": {"equal": True}, "planted": {"cells": [cell_for(mistake, name)]}}
        for name, mistake in MISTAKES.items()
    }
    monkeypatch.setattr(script, "run_gang", lambda folder: found)
    assert script.main(["--json"]) == (missed is not None)
    printed = json.loads(capsys.readouterr().out)
    assert [finding["mistake"] for finding in printed if not finding["caught"]] == [missed] * (missed is not None)
    assert script.main([]) == (missed is not None)
    assert f"{len(MISTAKES) - (missed is not None)} of {len(MISTAKES)} caught" in capsys.readouterr().out


@pytest.mark.parametrize("name", BY_CUT)
def test_option_that_depends_on_the_cut_equals_one_process_with_the_same_cut(planted, name):
    found = planted[name]["right"]
    assert found["equal"], found["failures"]
    assert len(found["cells"]) > 3


def test_verify_of_two_ranks_by_the_command_is_equal():
    done = moe_dist("verify", DEMO, "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and found["status"] == "finished" and found["failures"] == []
    assert len(found["cells"]) > 40 and all(cell["equal"] and cell["worst"] < 1e-10 for cell in found["cells"])
    assert {cell["degrees"]["tensor"] for cell in found["cells"]} == {1, 2}
    assert found["reference"]["options"] >= 5 and found["reference"]["worst"] < 1e-10
    assert found["shrunk"]["model.width"] == [256, 16] and "model.moe.top_k" not in found["shrunk"]
    assert "cell" in done.stderr and "all equal" in done.stderr


def test_verify_of_a_mistake_by_the_command_exits_1_and_tells_what_failing_layouts_share():
    worker = "tests.verify.planted:run_lattice_with_mistake"
    with mock.patch.object(verify_commands, "WORKER", worker):
        done = CliRunner().invoke(app, ["verify", DEMO, "--ranks", "2"])
    assert done.exit_code == 1, done.output
    assert "gradients of the experts are exactly 1/2x the oracle's (2 is the number of ranks" in done.stdout
    assert "in all cells with expert 2 and in no other" in done.stdout and "DIFFERENT" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((DEMO, "--ranks", "2", "model.moe.num_expert=8"), "did you mean model.moe.num_experts?"),
        ((DEMO, "--ranks", "0"), "--ranks"),
        (("nowhere.yaml", "--ranks", "2"), "the config file is read"),
        ((DEMO, "--ranks", "2", "model.moe.top_k=9"), "more experts than there are"),
    ],
)
def test_verify_wrong_input_exits_2(arguments, said):
    done = moe_dist("verify", *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


LARGE = {
    "num_experts": 256,
    "router": "sigmoid_topk",
    "top_k": 8,
    "num_groups": 8,
    "groups_per_token": 4,
    "selection_bias": True,
    "expert_width": 2048,
    "latent_width": 512,
    "shared_expert_gate": True,
    "capacity_factor": 1.25,
}


def test_shrunk_config_keeps_every_kind_and_fits():
    model = {"num_layers": 61, "num_dense_layers": 3, "width": 7168, "num_heads": 128, "num_kv_heads": 128}
    config = parse_config({"seed": 3, "model": {**model, "tie_embeddings": False, "moe": LARGE}})
    small, changes = shrunk(config)
    moe = small.model.moe
    assert (moe.num_experts, moe.top_k, moe.num_groups, moe.groups_per_token) == (64, 8, 8, 4)
    kept = ("router", "selection_bias", "shared_expert_gate", "capacity_factor", "activation", "drop_policy")
    assert all(getattr(moe, name) == getattr(config.model.moe, name) for name in kept)
    assert (small.model.num_layers, small.model.num_dense_layers, small.model.tie_embeddings) == (2, 1, False)
    assert small.model.num_heads == small.model.num_kv_heads == 4 and moe.latent_width == 8
    assert small.seed == 3 and small.train.precision == "fp64" and small.optimizer.lr == 1.0
    assert changes["model.moe.num_experts"] == (256, 64) and "seed" not in changes
    again, _ = shrunk(small)
    assert again == small


def test_shrunk_groups_that_need_many_experts_keep_enough_of_them():
    groups = {"num_experts": 512, "num_groups": 64, "groups_per_token": 2, "top_k": 10}
    moe = shrunk(parse_config({"model": {"moe": groups}}))[0].model.moe
    assert (moe.num_experts, moe.num_groups) == (320, 64)


def test_quick_cells_hold_every_pair_of_choices_that_all_cells_hold():
    config = small_demo()
    quick, full = (cells_of(config, RANKS, full) for full in (False, True))
    pairs = [{pair for cell in cells for pair in combinations(_choices(cell), 2)} for cells in (quick, full)]
    assert pairs[0] == pairs[1]
    assert len(full) >= 150 and len(quick) < len(full) / 5
    assert {cell.layout.ranks for cell in quick} == {1, 2, 4}
    assert {cell.dispatch for cell in quick} == {"all_to_all", "deduplicated", "all_gather", "two_level"}
    assert any(0 in cell.batch.rows for cell in quick) and any(cell.batch.rows == (1, 2, 2, 2) for cell in quick)


def test_cells_of_a_config_are_those_it_allows():
    switch = small_demo("model.moe.router=switch", "model.moe.top_k=1", "model.moe.normalize_gates=false")
    assert {config_of(switch, cell).model.moe.router for cell in cells_of(switch, 2, full=False)} == {"switch"}
    choice = ("model.moe.router=expert_choice", "model.moe.normalize_gates=false", "model.moe.balance_loss=0.0")
    chooses = small_demo(*choice, "model.moe.capacity_factor_eval=1.0", "generate.prompts=[]")
    cells = cells_of(chooses, 2, full=True)
    assert "dropless" not in {cell.capacity for cell in cells} and {cell.layout.tensor for cell in cells} == {1}
    dense = small_demo("model.num_dense_layers=4")
    assert {cell.capacity for cell in cells_of(dense, 2, full=True)} == {"as configured"}


def test_cut_is_that_of_a_training_step():
    config = small_demo()
    for cell in cells_of(config, RANKS, full=False):
        rows = rows_of(config, cell)
        starts = torch.tensor((0, *cell.batch.rows)).cumsum(0).tolist()
        for reader, (first, last) in enumerate(pairwise(starts)):
            parts = list(micro_batches(rows[first:last], config_of(config, cell), cell.layout.data))
            mine = [pieces[reader] for pieces in cut_of(cell)]
            assert [rows[start : start + count].tolist() for start, count in mine] == [part.tolist() for part in parts]
        begun = [first for first in rows[:, 0].tolist() if first >= 0]  # the others are padding
        assert len(set(begun)) == len(begun) == (len(rows) // 2 if cell.batch.padded else len(rows))


def test_layer_that_differs_from_the_reference_is_reported(tmp_path):
    config = small_demo()
    proof = Proof(config, 1, cells_of(config, 1, full=False)[:1], tmp_path)
    assert proof.judge_layers(quiet)["first_difference"] is None
    original = router_kinds.softmax_topk

    def detached(*given: Any) -> Any:
        decision = original(*given)
        return type(decision)(**{**vars(decision), "gate_TK": decision.gate_TK.detach()})

    with mock.patch("moe_dist.moe.router_kinds.softmax_topk", detached):
        found = proof.judge_layers(quiet)["first_difference"]
    assert found is not None and "gradient of" in found


def test_every_parameter_belongs_to_a_group():
    moe = {"selection_bias": True, "latent_width": 8, "shared_expert_gate": True, "router_bias": True}
    model = {"num_dense_layers": 1, "num_layers": 2, "tie_embeddings": False, "moe": moe}
    whole = whole_model(parse_config({"model": model}))
    assert {group_of(name) for name in whole.state_dict()} == set(GROUPS)


def test_oracle_is_the_same_from_a_file(tmp_path: Path):
    config = small_demo()
    cell = cells_of(config, 1, full=False)[0]
    proof = oracle_step(config_of(config, cell), rows_of(config, cell))
    proof.write(tmp_path / "oracle.pt")
    again = StepProof.read(tmp_path / "oracle.pt")
    assert again.scalars == proof.scalars and torch.equal(again.choices[1][0].expert_TK, proof.choices[1][0].expert_TK)
    assert all(torch.equal(again.gradients[name], grad) for name, grad in proof.gradients.items())


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.0, 0.0), "are zero: they are lost or cut off"),
        ((3.0, 3.0), "are exactly 3x the oracle's;"),
        ((1.0 / 3, 1.0 / 3), "are exactly 1/3x"),
        ((2.0, 2.0), "(2 is the expert degree)"),
        ((1.7182818, 1.7182818), "are 1.71828 times the oracle's"),
        ((0.5, 0.75), "are wrong by no common factor"),
        ((1.0, 1.0 + 1e-8), "are the oracle's up to rounding"),
        ((float("-inf"), float("inf")), "are wrong by no common factor"),
    ],
)
def test_factor_is_named_where_there_is_one(ratio, words):
    report = Report(factors={"experts": ratio, "norms": (1.0, 1.0)})
    report.note(Difference("gradients", "experts", "e", 0.5, "gradient of e off by 0.5"), 1e-10)
    told = diagnose(report, {"number of ranks": 4, "expert degree": 2})
    assert told is not None and words in f"{told};" and "those of the norms are right" in told


def test_gradient_that_is_not_finite_is_named_as_such():
    report = Report(factors={"experts": (1.0, 1.0), "norms": (1.0, 1.0)})
    report.note(Difference("gradients", "experts", "e", math.inf, "gradient of e off by inf"), 1e-10)
    report.note(Difference("gradient norm", "grad_norm", "grad_norm", math.inf, "gradient norm nan"), 1e-10)
    told = diagnose(report, {})
    assert told is not None and "gradients of the experts are not finite" in told and "norms are right" in told
    bare = Report(differences=report.differences[1:])
    assert diagnose(bare, {}) == "all gradients are right, their global norm is wrong by no common factor"


def test_common_ground_names_what_only_failing_cells_have():
    cells = [{"expert": e, "dispatch": d} for e in ("1", "2") for d in ("all_to_all", "all_gather")]
    by_degree = [cell["expert"] == "2" for cell in cells]
    assert common_ground(cells, by_degree) == "in all cells with expert 2 and in no other"
    told = common_ground(cells, [False, True, False, False])
    assert told == "only with expert 1 and dispatch all_gather, but not in all such cells"
    assert common_ground(cells, [True] * 4) == "whatever the layout and options"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_lattice_of_two_ranks_is_equal():
    """With the configured scope of the balance terms alone: crossing the scopes too would take a quarter of an hour."""
    keys = ["model.moe.balance_loss=0.0", "--full", "--json"]
    done = CliRunner().invoke(app, ["verify", DEMO, "--ranks", "2", *keys])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] and len(found["cells"]) > 600


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("router", ["sigmoid_topk", "noisy_topk", "gshard", "hash"])
def test_quick_lattice_of_four_ranks_is_equal_for_other_routers(router):
    keys = [f"model.moe.router={router}", "model.num_dense_layers=1", "model.tie_embeddings=false", "seed=3"]
    keys += ["model.moe.input_jitter=0.1"] if router == "noisy_topk" else []
    keys += ["model.moe.num_groups=4", "model.moe.groups_per_token=2"] if router == "sigmoid_topk" else []
    if router == "hash":
        keys += [f"model.moe.{name}=0.0" for name in ("balance_loss", "z_loss")]
        keys += ["model.moe.drop_policy=position_token_major"]
    done = CliRunner().invoke(app, ["verify", DEMO, "--ranks", "4", "--json", *keys])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("style", ["mixtral", "deepseek"])
def test_quick_lattice_of_eight_ranks_is_equal_for_other_families(style):
    """Of DeepSeek-V3's kind (64 experts, 8 a token, groups, bias, a shared one) and of Mixtral's."""
    config = str(ROOT / "configs" / f"{style}-style.yaml")
    done = CliRunner().invoke(app, ["verify", config, "--ranks", "8", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] and len(found["cells"]) > 400
    assert {cell["degrees"]["expert"] for cell in found["cells"]} == {1, 2, 4, 8}

"""Numbers that are not finite, planted in one rank of a run: what is passed over and counted, what is never saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config import Config
from moe_dist.train.step import train_step
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee
from tests.support.routers import ROUTERS
from tests.support.small_runs import Poison, open_trainer, run_to_the_end, same, state_of
from tests.support.tolerances import RELATIVE

BIASED = {"router": "sigmoid_topk", "selection_bias": True, "bias_update_rate": 0.01}
ONE_ROW = {"micro_batch_sequences": 1}
# Name: (expert degree, sections, where the number is planted).
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "replicate": (1, {}, "gradient"),
    "replicate, in the loss": (1, {}, "activation"),
    "replicate, no clipping": (1, {"train": {"clip_norm": None}}, "gradient"),
    "experts apart": (2, {}, "expert gradient"),
    "experts apart, in the loss": (2, {}, "activation"),
    "experts apart, biased choice": (2, {"moe": BIASED}, "gradient"),
    "accumulated, counted first": (2, {"moe": {"balance_scope": "global"}, "train": ONE_ROW}, "gradient"),
    "sums beside the backward pass": (2, {"parallel": {"overlap_gradients": True}}, "expert gradient"),
    "zero1": (2, {"parallel": {"data": "zero1"}}, "expert gradient"),
    "fsdp": (2, {"parallel": {"data": "fsdp"}}, "gradient"),
    "fsdp, in the loss": (1, {"parallel": {"data": "fsdp"}}, "activation"),
    "tensor": (1, {"parallel": {"tensor": 2}, "model": {"num_kv_heads": 2}}, "gradient"),
    "bf16": (2, {"train": {"precision": "bf16"}}, "activation"),
    "expert choice": (2, {"moe": ROUTERS["expert choice"]}, "activation"),
    "two experts drawn": (2, {"moe": ROUTERS["gshard"]}, "activation"),
    "a capacity, full checks": (2, {"moe": {"capacity_factor": 1.0}, "train": {"checks": "full"}}, "activation"),
}  # fmt: skip


def config_of(sections: dict[str, Any], folder: str = "runs/none", steps: int = 6) -> Config:
    given = {name: dict(values) for name, values in sections.items()}
    train = {"steps": steps, "precision": "fp32", "micro_batch_sequences": 2, **given.pop("train", {})}
    given |= {"run": {"dir": folder}, "optimizer": {"lr": 0.01, "warmup_steps": 2}, "train": train}
    given |= {"checkpoint": {"every_steps": 2, "keep": 9}, "generate": {"prompts": []}}
    return small_config(given.pop("moe", {}), **given)


def passed_over(rank: int, name: str, value: float) -> dict[str, Any]:
    """Two steps, one with a planted number on the last rank, and one more."""
    degree, sections, where = LAYOUTS[name]
    trainee = parallel_trainee(config_of(sections), degree, optimizer="adamw")
    poison = Poison(trainee, where, value)
    rows = random_rows(6).tensor_split(trainee.mesh.layout.data)[trainee.mesh.data_place]
    clean = [train_step(trainee, rows, step).skipped for step in range(2)]
    before = state_of(trainee)
    poison.on = rank == trainee.mesh.layout.ranks - 1
    skipped = train_step(trainee, rows, 2)
    after = state_of(trainee)
    poison.on = False
    last = train_step(trainee, rows, 3)
    moved = same(after, state_of(trainee))
    return {
        "clean": clean,
        "skipped": skipped.skipped,
        "loss finite": math.isfinite(skipped.loss),
        "changed": same(before, after),
        "goes on": (last.skipped, len(moved) > 5, math.isfinite(last.loss)),
        "updates": updates(state_of(trainee)),
        "demand": skipped.demand.sum(1).tolist(),
    }


def updates(state: dict[str, Any]) -> set[float]:
    """How many updates the optimizer counts, over all parameters."""
    return {float(count) for name, count in state.items() if name.startswith("step of")}


def whole_run(folder: str, steps: dict[int, str], last: int = 6, stop_after: int = 10_000) -> dict[str, Any]:
    """A run of six steps with a number planted on the last rank at some of them."""

    def before(trainee: Any) -> Callable[[int], None]:
        poisons = {where: Poison(trainee, where) for where in set(steps.values())}

        def plant(step: int) -> None:
            for where, poison in poisons.items():
                poison.on = steps.get(step) == where and trainee.mesh.rank == trainee.mesh.layout.ranks - 1

        return plant

    config = config_of({"moe": BIASED, "watch": {"stop_after_nonfinite_steps": 3}}, folder, last)
    degree = torch.distributed.get_world_size()
    return run_to_the_end(open_trainer(config, degree, before), stop_after)


def spoilt_weights(folder: str, kind: str) -> dict[str, Any]:
    """A weight or a moment of one rank becomes infinite after the update that is to be saved."""
    trainer = open_trainer(config_of({}, folder), 1)
    original = trainer._watch

    def spoil(figures: Any) -> None:
        original(figures)
        if trainer.step == 4 and trainer.trainee.mesh.rank == 1:
            parameter = trainer.trainee.model.get_parameter("final_norm.weight")
            tensor = parameter.data if kind == "weight" else trainer.trainee.optimizer.state[parameter]["exp_avg_sq"]
            tensor.view(-1)[3] = math.inf

    trainer._watch = spoil  # type: ignore[method-assign]
    return run_to_the_end(trainer)


def everything(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"layouts": {name: passed_over(rank, name, math.nan) for name in LAYOUTS}}
    found["infinite"] = passed_over(rank, "replicate", math.inf)
    once = {3: "gradient"}
    found["once"] = whole_run(f"{folder}/once", once)
    whole_run(f"{folder}/cut", once, stop_after=4)
    found["cut"] = whole_run(f"{folder}/cut", {})
    found["first"] = whole_run(f"{folder}/first", {1: "activation", 2: "gradient"}, stop_after=2)
    found["first, continued"] = whole_run(f"{folder}/first", {})
    found["apart"] = whole_run(f"{folder}/apart", dict.fromkeys((1, 2, 4, 5), "activation"))
    found["in a row"] = whole_run(f"{folder}/row", dict.fromkeys((3, 4, 5), "activation"))
    found["in a row, again"] = whole_run(f"{folder}/row", {})
    for kind in ("weight", "moment"):
        found[f"spoilt {kind}"] = spoilt_weights(f"{folder}/{kind}", kind)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_gang(everything, 2, str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_that_is_not_finite_on_one_rank_changes_no_bit_on_any(found, name):
    for rank in found:
        seen = rank["layouts"][name]
        assert seen["clean"] == [False, False]
        assert seen["skipped"] and seen["loss finite"] == ("gradient" in LAYOUTS[name][2])
        assert seen["changed"] == []
        assert seen["goes on"] == (False, True, True)
        assert seen["updates"] == {3.0}
        assert seen["demand"] == found[0]["layouts"][name]["demand"]


def test_infinite_gradient_is_passed_over_as_nan_is(found):
    for rank in found:
        assert rank["infinite"]["skipped"] and rank["infinite"]["changed"] == []


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_run_records_the_step_that_was_passed_over_with_its_samples(found, folder):
    rows = found[0]["once"]["rows"]
    assert [row["step"] for row in rows if row["skipped"]] == [3] and len(rows) == 6
    assert rows[2]["grad_norm"] is None and rows[2]["loss"] is not None
    (event,) = events(folder / "once", "skipped")
    assert (event["step"], event["first_sample"], event["last_sample"], event["in_a_row"]) == (3, 12, 17, 1)
    assert event["grad_norm"] == "nan" and math.isfinite(float(event["loss"]))
    assert [row["lr"] for row in rows] == [row["lr"] for row in found[0]["apart"]["rows"]]  # by number of the step


def test_run_that_passed_a_step_over_continues_bit_for_bit(found):
    for rank in found:
        assert rank["cut"]["first"] == 4
        assert same(rank["once"]["state"], rank["cut"]["state"]) == []
        assert updates(rank["cut"]["state"]) == {5.0}


def test_checkpoint_before_any_update_is_one_like_any_other(found):
    for rank in found:
        assert rank["first"]["status"] == "interrupted" and rank["first, continued"]["first"] == 2
        assert updates(rank["first, continued"]["state"]) == {4.0}


def test_one_rank_passes_over_what_two_pass_over(found, tmp_path):
    with one_rank():
        alone = whole_run(str(tmp_path / "one"), {3: "gradient"})
    assert [row["step"] for row in alone["rows"] if row["skipped"]] == [3]
    for mine, theirs in zip(alone["rows"], found[0]["once"]["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE[torch.float32])


def test_steps_apart_do_not_stop_a_run_and_three_in_a_row_do(found, folder):
    for rank in found:
        assert rank["apart"]["status"] == "finished"
        kind, text = rank["in a row"]["fault"]
        assert kind == "NumericFault" and "step 5" in text and "3 steps in a row" in text and "samples 24 to 29" in text
        assert rank["in a row"]["fault"] == found[0]["in a row"]["fault"]
    whole = sorted(path.name for path in (folder / "row" / "checkpoints").iterdir())
    assert whole == ["step-00000002", "step-00000004", "step-00000006"]
    assert found[0]["in a row, again"]["first"] == 4 and found[0]["in a row, again"]["status"] == "finished"
    assert [row["step"] for row in found[0]["in a row, again"]["rows"] if row["skipped"]] == [3, 4]
    assert all(bool(value.isfinite().all()) for value in found[0]["in a row, again"]["state"].values())


@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_state_that_is_not_finite_is_never_saved(found, folder, kind):
    faults = {rank[f"spoilt {kind}"]["fault"] for rank in found}
    ((name, text),) = faults
    assert name == "NumericFault" and "step 4" in text and "ranks [1]" in text
    assert ("exp_avg_sq of" in text) == (kind == "moment")
    assert [path.name for path in (folder / kind / "checkpoints").iterdir()] == ["step-00000002"]

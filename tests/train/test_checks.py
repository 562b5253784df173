"""Invariants while training: right runs keep them, and each one broken on purpose stops all ranks before an update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config, load_config
from moe_dist.errors import TrainingFault
from moe_dist.model import init
from moe_dist.moe import layer as layer_module
from moe_dist.moe import router_kinds
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.plan import Capacity, RoutingPlan
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.choices import expert_of_rows
from moe_dist.parallel.dispatch_all_to_all import AllToAllDispatcher
from moe_dist.parallel.dispatch_by_token import TokenDispatcher
from moe_dist.parallel.fsdp import local
from moe_dist.train import step as step_module
from moe_dist.train.checks import check_weights, router_learns
from moe_dist.train.digests import digests_of
from moe_dist.train.evaluate import HeldOut
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder
from moe_dist.train.step import Trainee, train_step
from tests.support.gang import run_gang
from tests.support.models import VOCAB, random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee
from tests.support.routers import ROUTERS

RANKS = 4
NO_TERMS = {"balance_loss": 0.0, "z_loss": 0.0}
PADDED = {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, "pad_to_capacity": True}


@dataclass(frozen=True)
class Run:
    """A config of four ranks, with what is given of its sections."""

    moe: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    expert: int = 2
    rows: int = 6

    def config(self, checks: str = "full") -> Config:
        train = {"checks": checks, "checks_every_steps": 1, "global_batch_sequences": self.rows, **self.train}
        optimizer = {"lr": 0.01, "warmup_steps": 0}
        model = {"num_heads": 4, "num_kv_heads": 2, **self.model}
        sections = {"parallel": self.parallel, "optimizer": optimizer, "generate": {"prompts": []}}
        return small_config(self.moe, model=model, train={"micro_batch_sequences": 2, **train}, **sections)

    def batch(self, trainee: Trainee, seed: int) -> Tensor:
        return random_rows(self.rows, seed).tensor_split(trainee.mesh.layout.data)[trainee.mesh.data_place]


RIGHT = {
    "dropless": Run(),
    "every rank all experts": Run(expert=1),
    "tensor 2": Run(parallel={"tensor": 2}),
    "tensor 2, expert-tensor 2, zero1": Run(parallel={"tensor": 2, "expert_tensor": 2, "data": "zero1"}),
    "fsdp": Run(parallel={"data": "fsdp"}),
    "fsdp in pairs, full recompute": Run({}, {"data": "fsdp", "data_shard": 2}, {"recompute": "full"}, expert=1),
    "tensor 2, fsdp, an empty rank": Run(parallel={"tensor": 2, "data": "fsdp"}, rows=1),
    "tensor 4, drops": Run({"capacity_factor": 0.8}, {"tensor": 2, "expert_tensor": 4}, expert=1),
    "uneven experts, drops": Run({"num_experts": 7, "top_k": 5, "capacity_factor": 0.9}, expert=4),
    "two ranks without rows": Run(rows=2, train={"micro_batch_sequences": 1}, expert=4),
    "unequal micro-batches, counted first": Run(
        {"balance_scope": "global"}, train={"micro_batch_sequences": 1}, rows=5
    ),
    "running demand": Run({"balance_scope": "global", "global_balance": "running"}, train={"micro_batch_sequences": 1}),
    "one expert for all": Run({"num_experts": 2, "top_k": 1, "normalize_gates": False}, rows=1),
    "every expert": Run({"top_k": 8}),
    "drops by position, renormalised, no terms": Run(
        {"capacity_factor": 0.3, "drop_policy": "position_token_major", "renormalize_after_drop": True, **NO_TERMS}
    ),
    "no terms": Run(NO_TERMS),
    "top-1 raw gate, no terms": Run({"top_k": 1, "normalize_gates": False, **NO_TERMS}),
    "padded to its capacity": Run({**PADDED, "backend": "batched"}),
    "plain experts by autograd": Run({"backend": "reference", "recompute_experts": "nothing"}),
    "gshard, drops": Run({**ROUTERS["gshard"], "capacity_factor": 1.0, "drop_policy": "position_choice_major"}),
    "hash, drops": Run({**ROUTERS["hash"], "capacity_factor": 1.0, "drop_policy": "position_token_major"}),
    "noisy, jitter, weighed ahead": Run({**ROUTERS["noisy"], "input_jitter": 0.1, "weigh": "input"}),
    "latent space, shared gate, router bias": Run({"latent_width": 6, "shared_expert_gate": True, "router_bias": True}),
    "deduplicated in parts, recompute": Run(
        {}, {"dispatch": "deduplicated", "overlap_chunks": 2}, {"recompute": "full"}
    ),
    "all-gather, selective recompute, no rows": Run({}, {"dispatch": "all_gather"}, {"recompute": "selective"}, rows=3),
    "nodes of two": Run({}, {"dispatch": "two_level", "ranks_per_node": 2}, expert=4),
    "sums beside the backward": Run({}, {"overlap_gradients": True}, rows=3),
    "dense alone": Run(model={"num_dense_layers": 2}),
    "untied, one dense": Run(model={"tie_embeddings": False, "num_dense_layers": 1}),
    "bf16": Run(train={"precision": "bf16"}),
    **{f"router {name}": Run(moe) for name, moe in ROUTERS.items()},
    **{f"router {name}, recompute": Run(moe, train={"recompute": "full"}, rows=3) for name, moe in ROUTERS.items()},
}


def steps_kept(run: Run) -> str | None:
    """What a right run of two updates is stopped for; None where it is not."""
    try:
        trainee = parallel_trainee(run.config(), run.expert, optimizer="adamw")
        for step in range(2):
            check_weights(trainee, step)
            train_step(trainee, run.batch(trainee, step), step)
        check_weights(trainee, 2, now=True)
    except TrainingFault as fault:
        return str(fault)
    return None


@dataclass(frozen=True)
class Broken:
    """A mistake, on all ranks or on one, and what the fault must say."""

    run: Run
    where: Any
    name: str
    mistake: Any
    says: tuple[str, ...]
    rank: int | None = None


def without_last_row(plan: RoutingPlan) -> RoutingPlan:
    served_E, kept_TK = plan.served_E.clone(), plan.kept_TK.clone()
    served_E[expert_of_rows(plan)[-1]] -= 1
    kept_TK.view(-1)[plan.slot_N[-1]] = False
    return replace(plan, slot_N=plan.slot_N[:-1], served_E=served_E, kept_TK=kept_TK)


announce, capacity_of, make_plan = AllToAllDispatcher.announce, Capacity.of, layer_module.make_plan
softmax_topk, gates_of_rows = router_kinds.softmax_topk, TokenDispatcher.gates_of_rows
reduction_group, initial_value = gradients_module.reduction_group, init.initial_value
move_biases = step_module.move_selection_biases


def detached_gates(*given: Any) -> Any:
    decision = softmax_topk(*given)
    return replace(decision, gate_TK=decision.gate_TK.detach())


def gates_of_one(logits_TE: Tensor, config: Any, *given: Any) -> Any:
    return softmax_topk(logits_TE, config.model_copy(update={"normalize_gates": True}), *given)


def demand_after_drops(*given: Any) -> RoutingPlan:
    plan = make_plan(*given)
    return replace(plan, demand_E=plan.served_E)


def empty_rows_served(*given: Any) -> RoutingPlan:
    plan = make_plan(*given)
    return replace(plan, served_E=plan.rows_E)


def nothing_shared(self: MoELayer, x_BSD: Tensor, places: object) -> Tensor:
    return torch.zeros_like(x_BSD)


LEFT_OUT = ("step 1, blocks.0.feed_forward.shared.gate_up.weight", "no gradient on 1 of 4 ranks", "part in the loss")
STEPS: dict[str, Broken] = {
    "dispatcher loses a row": Broken(
        Run(),
        *(AllToAllDispatcher, "announce", lambda self, plan: announce(self, without_last_row(plan))),
        ("step 1, blocks.0.feed_forward", "140 rows computed of 144", "parallel.dispatch=all_to_all"),
    ),
    "dispatcher loses a row on one rank": Broken(
        Run(),
        *(AllToAllDispatcher, "announce", lambda self, plan: announce(self, without_last_row(plan))),
        ("step 1, blocks.0.feed_forward", "rows computed of 144"),
        rank=1,
    ),
    "part of the tokens loses a row": Broken(
        Run({}, {"dispatch": "deduplicated", "overlap_chunks": 2}),
        *(RoutingPlan, "part", lambda self, *span, part=RoutingPlan.part: without_last_row(part(self, *span))),
        ("rows computed of 144", "parallel.dispatch=deduplicated"),
    ),
    "demand counted after drops": Broken(
        Run({"capacity_factor": 0.5}),
        *(layer_module, "make_plan", demand_after_drops),
        ("step 1, blocks.0.feed_forward", "each of 72 tokens asks for 2 experts"),
    ),
    "experts take no more than in evaluation": Broken(
        Run({"capacity_factor_eval": 0.5}),
        *(Capacity, "of", staticmethod(lambda config, training: capacity_of(config, False))),
        ("step 1, blocks.0.feed_forward, expert 0", "without model.moe.capacity_factor all is served"),
    ),
    "empty rows counted as served": Broken(
        Run({**PADDED, "capacity_factor": 2.0}),
        *(layer_module, "make_plan", empty_rows_served),
        ("step 1, blocks.0.feed_forward, expert", "only what is asked is served"),
    ),
    "gates detached": Broken(
        Run(),
        *(router_kinds, "softmax_topk", detached_gates),
        ("step 1, blocks.0.feed_forward", "gradient of the gate weights"),
    ),
    "gradient of the gates dropped on the way": Broken(
        Run({}, {"dispatch": "deduplicated"}),
        *(TokenDispatcher, "gates_of_rows", lambda *given: gates_of_rows(*given).detach()),
        ("step 1, blocks.0.feed_forward", "gradient of the gate weights"),
    ),
    "gates of one expert that sum to one": Broken(
        Run({"top_k": 1, "normalize_gates": False, **NO_TERMS}),
        *(router_kinds, "softmax_topk", gates_of_one),
        ("step 1, blocks.0.feed_forward.router.weight", "gradient all zero", "routers learn"),
    ),
    "shared expert left out on one rank": Broken(Run(), MoELayer, "_shared", nothing_shared, LEFT_OUT, rank=1),
    "left out, sums beside the backward": Broken(
        Run({}, {"overlap_gradients": True}), MoELayer, "_shared", nothing_shared, LEFT_OUT, rank=1
    ),
    "left out, recomputed": Broken(
        Run(train={"recompute": "full"}), MoELayer, "_shared", nothing_shared, LEFT_OUT, rank=1
    ),
}


def plant(broken: Broken) -> Any:
    if broken.rank not in (None, dist.get_rank()):
        return nullcontext()
    return mock.patch.object(broken.where, broken.name, broken.mistake)


def broken_step(broken: Broken, checks: str = "light") -> tuple[str | None, bool]:
    """(the fault, whether all weights are as before)."""
    trainee, fault = parallel_trainee(broken.run.config(checks), broken.run.expert), None
    before = [parameter.detach().clone() for parameter in trainee.model.parameters()]
    with plant(broken):
        try:
            train_step(trainee, broken.run.batch(trainee, 0), 0)
        except TrainingFault as error:
            fault = str(error)
    same = all(torch.equal(old, new) for old, new in zip(before, trainee.model.parameters(), strict=True))
    return fault, same


@dataclass(frozen=True)
class Spoilt:
    """A run with weights that break a rule: a tensor that one rank changes, or a mistake while it is made."""

    run: Run
    says: tuple[str, ...]
    tensor: str = ""
    rank: int = 0
    mistake: tuple[Any, str, Any] | None = None
    steps: int = 0


def routers_alone(model: Any, name: str, mesh: Any) -> Any:
    return mesh.tensor if "router.weight" in name else reduction_group(model, name, mesh)


def sixth_as_first(name: str, *given: Any) -> Tensor:
    return initial_value(name.replace("#6", "#1"), *given)


DRIFT, TWINS = "hold the same bits of it", "experts 1 and 6 have equal weights"
BIAS = ROUTERS["sigmoid, groups, bias"]
WEIGHTS: dict[str, Spoilt] = {
    "a norm": Spoilt(
        Run(), ("step 0, final_norm.weight", "ranks [2] differ from ranks [0, 1, 3]", DRIFT), "final_norm.weight", 2
    ),
    "a cut": Spoilt(
        Run(parallel={"tensor": 2}),
        ("step 0, blocks.1.attention.key.weight (part 2 of 2)", "ranks [3] differ from ranks [1]"),
        *("blocks.1.attention.key.weight", 3),
    ),
    "a part that two copies share out": Spoilt(
        Run(parallel={"data": "fsdp", "data_shard": 2}, expert=1),
        ("step 0, final_norm.weight (rows ", "ranks [3] differ from ranks [1]"),
        *("final_norm.weight", 3),
    ),
    "an expert": Spoilt(
        Run(),
        ("blocks.0.feed_forward.experts.down#4", "ranks [3] differ from ranks [1]"),
        "blocks.0.feed_forward.experts.down",
        3,
    ),
    "an expert of which ranks hold cuts": Spoilt(
        Run(parallel={"expert_tensor": 2}, expert=1),
        ("blocks.0.feed_forward.experts.down#0 (part 1 of 2)", "ranks [2] differ from ranks [0]"),
        *("blocks.0.feed_forward.experts.down", 2),
    ),
    "a selection bias": Spoilt(
        Run(BIAS), ("router.selection_bias", "ranks [1] differ"), "blocks.1.feed_forward.router.selection_bias", 1
    ),
    "router gradients left on their rank": Spoilt(
        Run(train={"clip_norm": None}),
        (
            "step 1, blocks.0.feed_forward.router.weight",
            "ranks [1], [2], [3] differ from ranks [0], as in 1 more tensor",
        ),
        mistake=(gradients_module, "reduction_group", routers_alone),
        steps=1,
    ),
    "the same where each rank clips by a norm of its own": Spoilt(
        Run(),
        ("step 1, embedding.weight", "differ from ranks [0], as in 51 more tensors"),
        mistake=(gradients_module, "reduction_group", routers_alone),
        steps=1,
    ),
    "equal experts on two ranks": Spoilt(
        Run(expert=4), ("step 0, blocks.0.feed_forward.experts", TWINS), mistake=(init, "initial_value", sixth_as_first)
    ),
    "equal experts of which ranks hold cuts": Spoilt(
        Run(parallel={"expert_tensor": 2}), (TWINS,), mistake=(init, "initial_value", sixth_as_first)
    ),
    "equal experts on one rank": Spoilt(Run(expert=1), (TWINS,), mistake=(init, "initial_value", sixth_as_first)),
}


def spoilt_weights(spoilt: Spoilt) -> str | None:
    """The fault that a check of weights raises."""
    with mock.patch.object(*spoilt.mistake) if spoilt.mistake else nullcontext():
        trainee = parallel_trainee(spoilt.run.config(), spoilt.run.expert, optimizer="adamw")
        for step in range(spoilt.steps):
            train_step(trainee, spoilt.run.batch(trainee, step), step)
    if spoilt.tensor and dist.get_rank() == spoilt.rank:
        tensor = local(trainee.model.state_dict()[spoilt.tensor])
        tensor.view(-1)[3] = tensor.view(-1)[3].nextafter(torch.tensor(9.0, dtype=tensor.dtype))
    try:
        check_weights(trainee, spoilt.steps)
    except TrainingFault as fault:
        return str(fault)
    return None


def drift_in_the_last_update(rank: int, folder: str) -> str | None:
    """A trainer's run whose last update is not the same on one rank."""
    run = Run(train={"steps": 3, "checks_every_steps": 100})
    config = run.config().model_copy(update={"run": run.config().run.model_copy(update={"dir": folder})})
    trainee = parallel_trainee(config, 2, optimizer="adamw")

    class Rows:
        def __next__(self) -> Tensor:
            return run.batch(trainee, 0)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def moved(model: Any, demand: Tensor) -> None:
        move_biases(model, demand)
        if rank == 1 and trainer.step == 2:
            model.final_norm.weight.data[0] += 1e-12

    held_out = HeldOut(random_rows(4, seed=99), 4, torch.ones(VOCAB, dtype=torch.int64))
    recorder = Recorder(Path(folder), rank == 0, flops_per_token=1e3, peak_flops=1e9)
    trainer = Trainer(trainee, Rows(), held_out, recorder)
    recorder.open(0, 3, [])
    try:
        with mock.patch.object(step_module, "move_selection_biases", moved):
            trainer.run(lambda: False)
    except TrainingFault as fault:
        return str(fault)
    finally:
        recorder.close()
    return None


def collectives_of_a_step(checks: str) -> int:
    """How many collectives of whatever kind a step enters."""
    run = Run(rows=3)
    trainee, calls = parallel_trainee(run.config(checks), 2), 0
    for name in ("all_reduce", "all_to_all_single", "all_gather", "all_gather_object", "broadcast_object_list"):
        original = getattr(dist, name)

        def counted(*given: Any, original: Any = original, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*given, **named)

        patch = mock.patch.object(dist, name, counted)
        patch.start()
    train_step(trainee, run.batch(trainee, 0), 0)
    mock.patch.stopall()
    return calls


def everything(rank: int, folder: str) -> dict[str, Any]:
    return {
        "right": {name: steps_kept(run) for name, run in RIGHT.items()},
        "steps": {name: broken_step(broken) for name, broken in STEPS.items()},
        "off": broken_step(STEPS["shared expert left out on one rank"], checks="off"),
        "weights": {name: spoilt_weights(spoilt) for name, spoilt in WEIGHTS.items()},
        "last update": drift_in_the_last_update(rank, folder),
        "collectives": {checks: collectives_of_a_step(checks) for checks in ("off", "light", "full")},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_gang(everything, RANKS, str(folder), timeout_seconds=280)


def test_right_run_keeps_every_rule_in_every_layout(found):
    for rank in found:
        assert {name: fault for name, fault in rank["right"].items() if fault} == {}


@pytest.mark.parametrize("name", STEPS)
def test_step_that_breaks_a_rule_stops_all_ranks_alike_before_any_update(found, name):
    faults = {rank["steps"][name] for rank in found}
    assert len(faults) == 1, faults
    fault, unchanged = faults.pop()
    assert fault is not None and unchanged
    assert [text for text in STEPS[name].says if text not in fault] == [], fault
    assert "fix    " in fault


def test_checks_that_are_off_say_nothing(found):
    assert {rank["off"] for rank in found} == {(None, False)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_break_a_rule_stop_all_ranks_alike(found, name):
    faults = {rank["weights"][name] for rank in found}
    assert len(faults) == 1, faults
    fault = faults.pop()
    assert fault is not None
    assert [text for text in WEIGHTS[name].says if text not in fault] == [], fault


def test_copies_that_part_in_the_last_update_are_not_saved(found, folder):
    assert {rank["last update"] for rank in found} != {None}
    assert all("step 3, final_norm.weight" in rank["last update"] for rank in found)
    assert not list(folder.glob("checkpoints/step-*"))


def test_light_checks_ask_the_other_ranks_nothing_of_their_own(found):
    for rank in found:
        calls = rank["collectives"]
        assert calls["off"] == calls["light"] == calls["full"] > 0


@pytest.mark.parametrize("moe", ROUTERS.values(), ids=ROUTERS)
def test_right_run_of_one_process_keeps_every_rule(moe):
    with one_rank():
        for recompute in ("none", "full"):
            assert steps_kept(Run(moe, train={"recompute": recompute}, expert=1)) is None


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({}, True),
        (NO_TERMS, True),
        ({**NO_TERMS, "top_k": 1, "normalize_gates": False}, True),
        (ROUTERS["hash"], False),
        ({**NO_TERMS, "capacity_factor": 1.0, "renormalize_after_drop": True}, False),
        ({"capacity_factor": 1.0, "renormalize_after_drop": True}, True),
    ],
)
def test_router_learns_where_gates_or_terms_have_a_gradient(moe, expected):
    assert router_learns(small_config(moe).model.moe) == expected


def test_router_of_one_expert_with_gates_of_one_learns_from_its_terms_alone():
    """The config refuses this; a config that got round its rules must not stop for it."""
    moe = small_config(NO_TERMS).model.moe.model_copy(update={"top_k": 1})
    assert not router_learns(moe)
    assert router_learns(moe.model_copy(update={"z_loss": 0.1}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_digest_sees_one_bit_two_signs_and_an_exchange(dtype):
    whole = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    (expected,) = digests_of([whole.clone()])
    changes: list[tuple[list[int], Any]] = [
        ([2**20 + 3], lambda part: part.nextafter(torch.full_like(part, 9.0))),
        ([4, 5], lambda part: -part),
        ([4, 2**20 + 4], lambda part: part.flip(0)),
        ([0, 7], lambda part: part.flip(0)),
    ]
    for places, change in changes:
        other = whole.clone()
        other[places] = change(other[places])
        assert digests_of([other]) != [expected], places
    assert digests_of([whole.view(1, -1), whole[:0]]) == [expected, 0]


def test_off_may_be_written_without_quotes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {checks: off}")
    assert load_config(path).train.checks == "off"
    assert load_config(path, ["train.checks=full"]).train.checks == "full"

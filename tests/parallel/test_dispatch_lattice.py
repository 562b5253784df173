"""Every dispatcher, weighing gates before or after experts, whole or in parts, on 1 to 4 ranks: output and every
gradient equal those of the one-device dispatcher, in fp64.

Shape letters: T tokens of a rank, D model width, R rows at the experts, L experts of a rank.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import ParallelConfig
from moe_dist.errors import LayoutError
from moe_dist.moe.dispatch import Dispatcher, LocalDispatcher, weigh_rows
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel import collectives, dispatch_all_to_all
from moe_dist.parallel.dispatch_deepep import DeepEPDispatcher, open_buffer
from moe_dist.parallel.dispatch_two_level import TwoLevelDispatcher
from moe_dist.parallel.expert import build_dispatcher
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Groups, Mesh, build_mesh
from moe_dist.parallel.wire import TwoLevelBytes, WireBytes
from tests.support import fake_deep_ep
from tests.support.gang import run_gang
from tests.support.hand_made import WIDTH, Case, Inputs, inputs_of, plan_of, weights_of
from tests.support.models import small_config
from tests.support.tolerances import RELATIVE, relative_error
from tests.support.wire import Wire

TOLERANCE = RELATIVE[torch.float64]
CASES = {
    "dropped, an empty rank, unequal experts": Case((6, 0, 9, 2), experts=7, top_k=4, kept=0.6),
    "all tokens to one expert": Case((5, 4, 1, 7), experts=12, top_k=1, only=(9,)),
    "idle experts, a rank of padding": Case((6, 8, 3, 5), experts=12, top_k=5, only=(0, 2, 3, 7, 8, 11), padded_rank=1),
}
NODE = {1: 1, 2: 1, 3: 3, 4: 2}  # ranks of a node, by ranks
DISPATCHERS = ("all_to_all", "all_gather", "deduplicated", "two_level")


@dataclass(frozen=True)
class Trial:
    """One way to run a case."""

    case: str
    dispatch: str
    weigh: str = "output"
    chunks: int = 1


def trials_of(ranks: int) -> list[Trial]:
    whole = [Trial(c, d, w, n) for c in CASES for d in DISPATCHERS for w in ("output", "input") for n in (1, 2, 3)]
    equal = [case for case, made in CASES.items() if made.experts % ranks == 0]
    deepep = [Trial(c, "deepep", w) for c in equal for w in ("output", "input") if ranks in (2, 4)]
    return whole + deepep


def dispatcher_of(trial: Trial, mesh: Mesh) -> Dispatcher:
    mesh = replace(mesh, layout=replace(mesh.layout, num_experts=CASES[trial.case].experts))
    if trial.dispatch == "deepep":  # the types of the proof, instead of the narrow ones of the real kernels
        owners = [mesh.layout.experts_of(place) for place in range(mesh.layout.expert)]
        with mock.patch.dict(sys.modules, {"deep_ep": fake_deep_ep}):
            buffer = open_buffer(mesh.expert, owners, WIDTH)
        return DeepEPDispatcher(buffer, trial.weigh == "input", torch.float64, torch.float64)
    model = small_config({"num_experts": CASES[trial.case].experts, "weigh": trial.weigh}).model
    return build_dispatcher(mesh, ParallelConfig(dispatch=trial.dispatch, overlap_chunks=trial.chunks), model)


def pass_of(dispatcher: Dispatcher, given: Inputs, weights_LDD: Tensor, experts: int) -> dict[str, Any]:
    """Output and gradients of one rank, and the bytes of its forward pass: told and counted."""

    def apply(rows_RD: Tensor, counts_L: list[int]) -> Tensor:
        parts = zip(rows_RD.split(counts_L), weights_LDD, strict=True)
        return torch.cat([(rows @ weight).tanh() for rows, weight in parts])

    x_TD, gate_TK = given.x_TD.clone().requires_grad_(), given.gate_TK.clone().requires_grad_()
    plan = plan_of(given.expert_TK, given.kept_TK, experts)
    with Wire().tapped() as wire:
        out_TD, journey = dispatcher.run(x_TD, gate_TK, plan, apply)
    weights_LDD.grad = None
    (out_TD * given.slope_TD).sum().backward()
    tensors = {"out": out_TD.detach(), "x": x_TD.grad, "gate": gate_TK.grad, "experts": weights_LDD.grad}
    return tensors | {"told": journey.bytes_sent, "sent": wire.taken()}


def trial_of_rank(rank: int, trial: Trial, mesh: Mesh) -> dict[str, Any]:
    case = CASES[trial.case]
    own = replace(mesh.layout, num_experts=case.experts).experts_of(rank)
    weights_LDD = weights_of(case)[own.start : own.stop].requires_grad_()
    return pass_of(dispatcher_of(trial, mesh), inputs_of(case, rank), weights_LDD, case.experts)


def trials_of_rank(rank: int, ranks: int) -> dict[Any, dict[str, Any]]:
    layout = Layout(ranks, ranks, ranks, NODE[ranks])
    mesh = build_mesh(layout, Groups(60))
    found: dict[Any, dict[str, Any]] = {trial: trial_of_rank(rank, trial, mesh) for trial in trials_of(ranks)}
    if ranks == 4:
        found |= {name: planted(rank, name, mesh) for name in MISTAKES}
        found |= {case: {"levels": levels_of(rank, case, mesh)} for case in CASES}
    return found


@cache
def found_on(ranks: int) -> list[dict[Any, dict[str, Any]]]:
    return run_gang(trials_of_rank, ranks, ranks)


@cache
def expected_on(ranks: int, case: str, weigh: str) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Output and gradients of every rank's tokens, and of all experts, by the one-device dispatcher."""
    made = CASES[case]
    weights = weights_of(made).requires_grad_()
    local = LocalDispatcher(weigh == "input")
    found = [pass_of(local, inputs_of(made, rank), weights, made.experts) for rank in range(ranks)]
    return found, torch.stack([f["experts"] for f in found]).sum(0)


def difference(found: list[dict[str, Any]], ranks: int, case: str, weigh: str) -> str | None:
    """The first tensor that differs."""
    expected, experts = expected_on(ranks, case, weigh)
    for rank in range(ranks):
        for key in ("out", "x", "gate"):
            if not relative_error(found[rank][key], expected[rank][key]) <= TOLERANCE:
                return f"rank {rank}: {key}"
    return None if relative_error(torch.cat([f["experts"] for f in found]), experts) <= TOLERANCE else "experts"


@pytest.mark.parametrize("ranks", NODE)
def test_every_dispatcher_gives_the_output_and_gradients_of_one_device(ranks):
    for trial in trials_of(ranks):
        by_rank = [found[trial] for found in found_on(ranks)]
        assert difference(by_rank, ranks, trial.case, trial.weigh) is None, trial


def test_one_device_with_weighed_inputs_gives_the_sums_of_single_tokens():
    for case in CASES.values():
        given, weights = inputs_of(case, 2), weights_of(case)
        x_TD, gate_TK = given.x_TD.clone().requires_grad_(), given.gate_TK.clone().requires_grad_()
        scaled = torch.einsum("td,tk->tkd", x_TD, gate_TK)
        y_TKD = torch.einsum("tkd,tkdf->tkf", scaled, weights[given.expert_TK]).tanh()
        ((y_TKD * given.kept_TK[..., None]).sum(1) * given.slope_TD).sum().backward()
        found = pass_of(LocalDispatcher(weigh_input=True), given, weights.requires_grad_(), case.experts)
        assert relative_error(found["x"], x_TD.grad) <= TOLERANCE
        assert relative_error(found["gate"], gate_TK.grad) <= TOLERANCE


@pytest.mark.parametrize("ranks", NODE)
def test_journey_tells_the_bytes_that_a_forward_pass_sends(ranks):
    for trial in trials_of(ranks):
        for found in found_on(ranks):
            assert found[trial]["told"] == found[trial]["sent"] or trial.dispatch == "deepep", trial


def levels_of(rank: int, case: str, mesh: Mesh) -> dict[str, Any]:
    """Bytes of a two-level forward pass on each level, by the wire and by the formula."""
    made = CASES[case]
    dispatcher = dispatcher_of(Trial(case, "two_level"), mesh)
    assert isinstance(dispatcher, TwoLevelDispatcher) and mesh.rail is not None and mesh.node is not None
    given = inputs_of(made, rank)
    with Wire().tapped() as wire:
        ticket = dispatcher.announce(plan_of(given.expert_TK, given.kept_TK, made.experts))
        dispatched = dispatcher.arrive(dispatcher.launch(given.x_TD, given.gate_TK, ticket))
        there = [wire.taken(group) for group in (mesh.rail, mesh.node)]
        dispatcher.collect(dispatcher.send_back(dispatched.rows_RD, dispatched))
        back = [wire.taken(group) for group in (mesh.rail, mesh.node)]
    between, inside = (WireBytes(*both) for both in zip(there, back, strict=True))
    return {"sent": TwoLevelBytes(between, inside), "formula": dispatcher.bytes_sent(ticket, made.item)}


@pytest.mark.parametrize("case", CASES)
def test_two_level_bytes_equal_the_formula_and_a_count_choice_by_choice(case):
    for rank, found in enumerate(found_on(4)):
        levels = found[case]["levels"]
        assert levels["sent"] == levels["formula"] == counted_levels(CASES[case], rank)


def counted_levels(case: Case, rank: int) -> TwoLevelBytes:
    """Bytes of a rank of two nodes of two, counted from the choices of all ranks."""
    layout, item = Layout(4, 4, case.experts), case.item
    owner = {expert: place for place in range(4) for expert in layout.experts_of(place)}
    outer, inner = [], []  # (from, to, source of the token, token) of every choice, on each level
    for source in range(4):
        given = inputs_of(case, source)
        for token, slot in given.kept_TK.nonzero().tolist():
            at = owner[int(given.expert_TK[token, slot])]
            gateway = at // 2 * 2 + source % 2
            outer.append((source, gateway, source, token))
            inner.append((gateway, at, source, token))

    def bytes_of(moves: list[tuple[int, int, int, int]]) -> WireBytes:
        choices = sum(move[0] == rank != move[1] for move in moves)
        out, back = ({m for m in moves if m[way] == rank != m[1 - way]} for way in (0, 1))
        return WireBytes(16 + (8 + item.gate) * choices + item.token * len(out), item.result * len(back))

    return TwoLevelBytes(bytes_of(outer), bytes_of(inner))


def _start_slowly(self: Any, rows_ND: Tensor) -> Tensor:
    if dist.get_rank() == 0:
        time.sleep(0.01)  # so that the others certainly look before anything came
    return _really_start(self, rows_ND)


_really_start = collectives.Voyage.start


def _read_too_early(ctx: Any, buffer_RD: Tensor, out: Any, back: Any) -> Tensor:
    ctx.back = back
    early_RD = buffer_RD.clone()
    out.wait()
    return early_RD


def _gradient_too_early(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
    early_ND = ctx.back._held[0].clone()
    ctx.back.wait()
    return early_ND, None, None


def _slots_off(plan: Any, first: int, last: int) -> Any:
    right = original_part(plan, first, last)
    return replace(right, slot_N=right.slot_N.flip(0), row_TK=right.slot_N.numel() - 1 - right.row_TK)


def _not_from_zero(plan: Any, first: int, last: int) -> Any:
    right = original_part(plan, first, last)
    return replace(right, row_TK=plan.row_TK[first:last].clamp(max=max(right.slot_N.numel() - 1, 0)))


def _weighed_twice(rows_ND: Tensor, gate_TK: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
    return weigh_rows(rows_ND, gate_TK.reshape(-1)[plan.slot_N]), gate_TK


def _constant(value: Tensor) -> Tensor:
    return value.detach() + 0 * value  # its gradient is zero, not missing


original_part = RoutingPlan.part
gates_at_gateway = TwoLevelDispatcher.gates_at_gateway
SLOW = (collectives.Voyage, "start", _start_slowly)
FIRST = "idle experts, a rank of padding"
# name: (the trial, what is replaced by what)
MISTAKES: dict[str, tuple[Trial, list[tuple[Any, str, Any]]]] = {
    "slow, but right": (Trial(FIRST, "deduplicated", chunks=2), [SLOW]),
    "result read before it is there": (
        Trial(FIRST, "deduplicated"),
        [SLOW, (collectives._Wait, "forward", staticmethod(_read_too_early))],
    ),
    "gradient read before it is there": (
        Trial(FIRST, "all_to_all", chunks=2),
        [SLOW, (collectives._Start, "backward", staticmethod(_gradient_too_early))],
    ),
    "slots of a part in the wrong order": (
        Trial(FIRST, "deduplicated", chunks=2),
        [(RoutingPlan, "part", _slots_off)],
    ),
    "rows of a part counted from the whole": (
        Trial(FIRST, "all_to_all", chunks=3),
        [(RoutingPlan, "part", _not_from_zero)],
    ),
    "gates lost at the gateway": (
        Trial(FIRST, "two_level"),
        [(TwoLevelDispatcher, "gates_at_gateway", lambda *given: torch.ones_like(gates_at_gateway(*given)))],
    ),
    "gradient of gates lost at the gateway": (
        Trial(FIRST, "two_level"),
        [(TwoLevelDispatcher, "gates_at_gateway", lambda *given: _constant(gates_at_gateway(*given)))],
    ),
    "gates before and after experts": (
        Trial(FIRST, "all_to_all", "input"),
        [(dispatch_all_to_all, "weigh_ahead", _weighed_twice)],
    ),
}


def planted(rank: int, name: str, mesh: Mesh) -> dict[str, Any]:
    trial, replaced = MISTAKES[name]
    with ExitStack() as bugs:
        for where, attribute, wrong in replaced:
            bugs.enter_context(mock.patch.object(where, attribute, wrong))
        return trial_of_rank(rank, trial, mesh)


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(name):
    trial, _ = MISTAKES[name]
    found = difference([by_rank[name] for by_rank in found_on(4)], 4, trial.case, trial.weigh)
    assert (found is None) == (name == "slow, but right"), f"{name}: {found}"


def refusals(rank: int) -> dict[str, tuple[str, str]]:
    """What DeepEP's buffer refuses: module missing, unequal experts, a number of ranks that it has no table for."""
    assert dist.group.WORLD is not None
    found = {}
    for name, modules, owners in (
        ("missing", {"deep_ep": None}, [range(2)]),
        ("unequal", {"deep_ep": fake_deep_ep}, [range(2), range(2, 5)]),
        ("ranks", {"deep_ep": fake_deep_ep}, [range(2)]),
    ):
        with mock.patch.dict(sys.modules, modules), pytest.raises(LayoutError) as caught:
            open_buffer(dist.group.WORLD, owners, WIDTH)
        assert caught.value.where == "parallel.dispatch" and caught.value.value == "deepep"
        found[name] = (caught.value.rule, caught.value.fix)
    return found


def test_deepep_that_cannot_be_had_says_why_and_what_to_do():
    (found,) = run_gang(refusals, 1)
    assert "cannot be imported" in found["missing"][0] and found["missing"][1].startswith("install DeepEP")
    assert "equally many experts, not 2 or 3" in found["unequal"][0]
    assert "1 ranks" in found["ranks"][0] and found["ranks"][1] == "parallel.dispatch=deduplicated"

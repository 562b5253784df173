"""Dispatchers on hand-made choices: outputs, every gradient, rows at the experts and bytes on the wire.

Shape letters: T tokens of a rank, D model width, K experts per token, E experts, R rows at the experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.config import ParallelConfig
from moe_dist.parallel.choices import arrange_arrivals, crossing_tokens, encode_choices, list_departures
from moe_dist.parallel.expert import build_dispatcher
from moe_dist.parallel.fan import Fan, fan_in, fan_of_crossings, fan_out
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Groups, Mesh, build_mesh
from moe_dist.parallel.phases import PhasedDispatcher
from moe_dist.parallel.wire import WireBytes, expected_share_of_plain
from tests.support.gang import run_gang
from tests.support.hand_made import Case, inputs_of, plan_of, weights_of
from tests.support.models import small_config
from tests.support.tolerances import assert_close
from tests.support.wire import Wire

RANKS = 3
DISPATCHERS = ("all_to_all", "all_gather", "deduplicated")


CASES = {
    "uniform": Case(),
    "a rank without tokens": Case(tokens=(5, 0, 7)),
    "no rank has a token": Case(tokens=(0, 0, 0)),
    "all tokens to one expert": Case(top_k=1, only=(6,)),
    "all choices on one rank": Case(top_k=2, only=(2, 3)),
    "one expert of every rank": Case(only=(0, 2, 4)),
    "every expert": Case(top_k=7),
    "top-1": Case(top_k=1),
    "half of the choices dropped": Case(top_k=4, kept=0.5),
    "a rank of padding": Case(padded_rank=1),
    "nothing kept": Case(kept=0.0),
    "as many experts as ranks": Case(experts=3, top_k=2),
    "fp32": Case(top_k=5, dtype=torch.float32),
    "bf16 experts": Case(top_k=5, dtype=torch.float32, experts_dtype=torch.bfloat16),
}


def expected_of(case: Case) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Output and gradients of every rank, and the gradient of every expert, token by token in one process."""
    weights = weights_of(case).requires_grad_()
    found = []
    for rank in range(RANKS):
        given = inputs_of(case, rank)
        x_TD, gate_TK = given.x_TD.clone().requires_grad_(), given.gate_TK.clone().requires_grad_()
        y_TKD = torch.einsum("td,tkdf->tkf", x_TD, weights[given.expert_TK]).tanh()
        out_TD = (y_TKD * (gate_TK * given.kept_TK)[..., None]).sum(1)
        (out_TD * given.slope_TD).sum().backward()
        found.append({"out": out_TD.detach(), "x": x_TD.grad, "gate": gate_TK.grad})
    assert weights.grad is not None
    return found, weights.grad


def one_pass(rank: int, case: Case, dispatch: str, mesh: Mesh) -> dict[str, Any]:
    """Forward and backward of one dispatcher around simple experts, with the bytes of each part."""
    layout = Layout(RANKS, RANKS, case.experts)
    model = small_config({"num_experts": case.experts, "top_k": 1, "normalize_gates": False}).model
    dispatcher = build_dispatcher(replace(mesh, layout=layout), ParallelConfig(dispatch=dispatch), model)
    assert isinstance(dispatcher, PhasedDispatcher)
    given, own = inputs_of(case, rank), layout.experts_of(rank)
    x_TD, gate_TK = given.x_TD.requires_grad_(), given.gate_TK.requires_grad_()
    weights_LDD = weights_of(case)[own.start : own.stop].requires_grad_()
    plan = plan_of(given.expert_TK, given.kept_TK, case.experts)
    with Wire().tapped() as wire:
        ticket = dispatcher.announce(plan)
        dispatched = dispatcher.arrive(dispatcher.launch(x_TD, gate_TK, ticket))
        on_the_way = wire.taken()
        narrow = case.experts_dtype or case.dtype
        inputs = dispatched.rows_RD.to(narrow).split(dispatched.counts_L)
        parts = zip(inputs, weights_LDD.to(narrow), strict=True)
        y_RD = torch.cat([(rows @ weight).tanh() for rows, weight in parts])
        out_TD = dispatcher.collect(dispatcher.send_back(y_RD, dispatched))
        sent = WireBytes(on_the_way, wire.taken())
        (out_TD * given.slope_TD).sum().backward()
    return {
        "tensors": {"out": out_TD.detach(), "x": x_TD.grad, "gate": gate_TK.grad},
        "experts": weights_LDD.grad,
        "rows": dispatched.rows_RD.detach(),
        "sent": sent,
        "sent_backward": wire.taken(),
        "formula": dispatcher.bytes_sent(ticket, case.item),
        "traffic": ticket.traffic,
    }


def all_passes(rank: int) -> dict[Any, dict[str, Any]]:
    mesh = build_mesh(Layout(RANKS, RANKS, RANKS), Groups(60))
    keys = [(name, dispatch, go) for name in CASES for dispatch in DISPATCHERS for go in (0, 1)]
    return {(name, dispatch, go): one_pass(rank, CASES[name], dispatch, mesh) for name, dispatch, go in keys}


@cache
def passes() -> list[dict[Any, dict[str, Any]]]:
    return run_gang(all_passes, RANKS)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("name", CASES)
def test_dispatcher_gives_the_sums_and_gradients_of_single_tokens(name, dispatch):
    expected, expected_experts = expected_of(CASES[name])
    found = [by_case[name, dispatch, 0] for by_case in passes()]
    precision = CASES[name].experts_dtype or CASES[name].dtype  # decides the tolerance
    for rank in range(RANKS):
        for key, tensor in expected[rank].items():
            assert_close(found[rank]["tensors"][key], tensor.to(precision), f"rank {rank}: {key}")
    assert_close(torch.cat([f["experts"] for f in found]), expected_experts.to(precision), "experts")


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_dispatcher_run_twice_is_bit_identical(dispatch):
    for by_case in passes():
        for name in CASES:
            first, second = (by_case[name, dispatch, go]["tensors"] for go in (0, 1))
            assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize("name", CASES)
def test_experts_see_the_same_rows_in_the_same_order_from_every_dispatcher(name):
    for by_case in passes():
        plain, *others = (by_case[name, dispatch, 0]["rows"] for dispatch in DISPATCHERS)
        assert all(torch.equal(plain, rows) for rows in others)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("name", CASES)
def test_bytes_sent_equal_the_closed_formula(name, dispatch):
    for rank, by_case in enumerate(passes()):
        found = by_case[name, dispatch, 0]
        assert found["sent"] == found["formula"] == counted_bytes(CASES[name], rank, dispatch)
        traffic, item = found["traffic"], CASES[name].item
        results, tokens = (sum(n) - n[rank] for n in (traffic.tokens_out, traffic.tokens_in))
        gates = 0 if dispatch == "all_to_all" else sum(traffic.choices_in) - traffic.choices_in[rank]
        assert found["sent_backward"] == results * item.result + tokens * item.token + gates * item.gate


def counted_bytes(case: Case, rank: int, dispatch: str) -> WireBytes:
    """Bytes of a rank, counted choice by choice from the choices of all ranks."""
    layout = Layout(RANKS, RANKS, case.experts)
    owner = {expert: place for place in range(RANKS) for expert in layout.experts_of(place)}
    choices: dict[tuple[int, int], int] = {}
    tokens: dict[tuple[int, int], set[int]] = {}
    for source in range(RANKS):
        given = inputs_of(case, source)
        for token, slot in given.kept_TK.nonzero().tolist():
            pair = (source, owner[int(given.expert_TK[token, slot])])
            choices[pair] = choices.get(pair, 0) + 1
            tokens.setdefault(pair, set()).add(token)
    item, others = case.item, [w for w in range(RANKS) if w != rank]
    sent = sum(choices.get((rank, w), 0) for w in others)
    received = sum(choices.get((w, rank), 0) for w in others)
    if dispatch == "all_to_all":
        experts_elsewhere = case.experts - len(layout.experts_of(rank))
        return WireBytes(8 * experts_elsewhere + item.token * sent, item.result * received)
    if dispatch == "all_gather":
        there, back = case.tokens[rank] * len(others), sum(case.tokens[w] for w in others)
    else:
        there = sum(len(tokens.get((rank, w), ())) for w in others)
        back = sum(len(tokens.get((w, rank), ())) for w in others)
    return WireBytes(16 * len(others) + (8 + item.gate) * sent + item.token * there, item.result * back)


def test_deduplicated_sends_one_row_where_all_experts_of_a_token_live_on_one_rank():
    found = [by_case["all choices on one rank", "deduplicated", 0]["traffic"] for by_case in passes()]
    assert [t.tokens_out for t in found] == [[0, tokens, 0] for tokens in (6, 4, 9)]
    assert [t.choices_out for t in found] == [[0, 2 * tokens, 0] for tokens in (6, 4, 9)]


def test_expected_share_of_uniform_routing_is_that_of_the_closed_formula():
    assert expected_share_of_plain(8, 4) == pytest.approx(4 * (1 - 0.75**8) / 8)
    assert expected_share_of_plain(1, 4) == expected_share_of_plain(1, 4, 64) == 1.0
    assert expected_share_of_plain(2, 2, 4) == pytest.approx(1 - 1 / 6)  # one of six pairs misses a rank


def test_choices_of_two_tokens_match_the_table_worked_by_hand():
    # Three experts: 0 on rank 0; 1 and 2 on rank 1. Token 0 chose 2 then 0, token 1 chose 1 then 2.
    plan = plan_of(torch.tensor([[2, 0], [1, 2]]), torch.ones(2, 2, dtype=torch.bool), 3)
    departures = list_departures(plan, [1, 2])
    crosses_WT = crossing_tokens(plan, departures.owner_N, 2)
    assert departures.counts == [1, 3] and departures.slot_N.tolist() == [1, 0, 2, 3]
    assert crosses_WT.tolist() == [[True, False], [True, True]]
    code_N = encode_choices(plan, departures, [1, 2], crosses_WT.cumsum(1) - 1)
    assert code_N.tolist() == [0, 0 * 2 + 1, 1 * 2 + 0, 1 * 2 + 1]
    arrivals = arrange_arrivals(code_N[1:], [2], [3], 2)  # as rank 1 sees them
    assert arrivals.counts_L == [1, 2] and arrivals.order_R.tolist() == [1, 0, 2]
    assert arrivals.fan.source_R.tolist() == [1, 0, 1]
    assert [rows.tolist() for rows in arrivals.fan.passes] == [[0, 1], [2]]
    assert fan_of_crossings(crosses_WT).source_R.tolist() == [0, 0, 1]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.integers(0, 4), max_size=8), seed=st.integers(0, 9))
def test_fan_sums_and_gradients_equal_loops(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    order_R = torch.randperm(sum(rows), generator=draw)
    fan = Fan.of(torch.tensor(rows, dtype=torch.int64), order_R)
    lists = order_R.split(rows) if rows else ()
    x_MD, slope_RD = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (len(rows), sum(rows)))
    weight_R = torch.randn(sum(rows), generator=draw, dtype=torch.float64)
    sums_MD = torch.zeros_like(x_MD)
    for source, mine in enumerate(lists):
        assert torch.equal(fan_out(x_MD, fan)[mine], x_MD[source].expand(len(mine), 3))
        for row in mine:
            sums_MD[source] += weight_R[row] * slope_RD[row]
    assert_close(fan_in(slope_RD, weight_R, fan), sums_MD, "sums")
    for function, tensors in ((fan_out, (x_MD,)), (fan_in, (slope_RD, weight_R)), (fan_in, (slope_RD, None))):
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, (*leaves, fan))

"""Routing as a value: cut and joined, compared, and followed by a second forward."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_dist.model.block import Block
from moe_dist.model.places import places_of
from moe_dist.moe import layer as layer_module
from moe_dist.moe import ledger, router_kinds
from moe_dist.moe.decision import RoutingContext, RoutingDecision
from moe_dist.moe.layer import MoERecord
from moe_dist.moe.ledger import Choices, compare, decide_once, join
from moe_dist.moe.randomness import Draw
from tests.support.models import VOCAB, plain_model, small_config
from tests.support.planted import failure_with
from tests.support.routers import ROUTERS

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, FIRST_ROW = 3, 10, 4

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"capacity_factor": 1.0},
    "sigmoid, groups, bias": {
        **ROUTERS["sigmoid, groups, bias"],
        "capacity_factor": 1.0,
        "renormalize_after_drop": True,
    },
    "switch": {**ROUTERS["switch"], "capacity_factor": 1.0},
    "gshard": {**ROUTERS["gshard"], "capacity_factor": 1.0, "drop_policy": "position_choice_major"},
    "noisy, jitter": {**ROUTERS["noisy"], "input_jitter": 0.2, "capacity_factor": 1.0},
    "expert choice": ROUTERS["expert choice"],
    "hash": ROUTERS["hash"],
}


def block_of(kind: str) -> tuple[Block, torch.Tensor, RoutingContext]:
    """A block, hidden states for it and the context of a training forward."""
    config = small_config(KINDS[kind], generate={"prompts": ()})
    block = plain_model(config).blocks[1].train()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, S, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, VOCAB, (B, S), generator=generator)
    return block, x, RoutingContext(tokens, Draw(seed=1, step=2, first_row=FIRST_ROW))


def run(block: Block, x: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, MoERecord]:
    return block(x, places_of(None, S, small_config().model, x), None, context)


def replayed(block: Block, x: torch.Tensor, context: RoutingContext, choices: Choices) -> tuple[Any, MoERecord]:
    return run(block, x, dataclasses.replace(context, replay={1: choices}))


def equal(a: Choices, b: Choices) -> bool:
    pairs = [(a.expert_TK, b.expert_TK), (a.kept_TK, b.kept_TK)]
    if a.asks_TK is not None and b.asks_TK is not None:
        pairs.append((a.asks_TK, b.asks_TK))
    return (a.asks_TK is None) == (b.asks_TK is None) and all(torch.equal(mine, theirs) for mine, theirs in pairs)


def moved(block: Block) -> None:
    """Other router weights and another bias, by which free choices would be others."""
    router, generator = block.feed_forward.router, torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_replay_follows_experts_asks_and_drops_whatever_the_weights(kind: str) -> None:
    block, x, context = block_of(kind)
    out, record = run(block, x, context)
    taken = Choices.of(record, FIRST_ROW * S)
    again, following = replayed(block, x, context, taken)
    assert torch.equal(again, out)
    for name in ("slot_N", "row_TK", "kept_TK", "demand_E", "served_E"):
        assert torch.equal(getattr(following.plan, name), getattr(record.plan, name)), name
    moved(block)
    _, other = replayed(block, x, context, taken)
    assert equal(Choices.of(other, FIRST_ROW * S), taken)
    _, free = run(block, x, context)
    if kind != "hash":
        assert not equal(Choices.of(free, FIRST_ROW * S), taken), "the case must be one where free choices differ"
        assert not torch.equal(other.decision.gate_TK, record.decision.gate_TK)


def test_replay_takes_the_part_of_its_own_tokens() -> None:
    block, x, context = block_of("gshard")
    taken = Choices.of(run(block, x, context)[1], FIRST_ROW * S)
    moved(block)
    last = RoutingContext(context.token_BS[2:], Draw(1, 2, FIRST_ROW + 2))
    _, record = replayed(block, x[2:], last, taken)
    assert equal(Choices.of(record, 0), taken.part((FIRST_ROW + 2) * S, S))
    with pytest.raises(AssertionError, match="outside the choices"):
        replayed(block, x, RoutingContext(context.token_BS, Draw(1, 2, FIRST_ROW + 1)), taken)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hash"])
def test_replay_gates_teach_the_router_as_finite_differences_say(kind: str) -> None:
    block, x, context = block_of(kind)
    taken = Choices.of(run(block, x, context)[1], FIRST_ROW * S)
    moved(block)
    router = block.feed_forward.router
    weigh = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def loss() -> torch.Tensor:
        return (replayed(block, x, context, taken)[0] * weigh).sum()

    (gradient,) = torch.autograd.grad(loss(), router.weight)
    assert gradient.abs().max() > 1e-6
    direction = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            router.weight.add_(direction, alpha=sign * step)
            values.append(loss().item())
            router.weight.sub_(direction, alpha=sign * step)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def differentiated(kind: str, recompute: bool, between: Any = lambda block: None) -> dict[str, torch.Tensor]:
    """Counts, balance terms and gradients of a block; `between` happens after the forward, before the backward."""
    block, x, context = block_of(kind)
    x.requires_grad_()
    if recompute:
        once = decide_once(lambda hidden, told: run(block, hidden, told), context, 1)
        out, record = checkpoint(once, x, use_reentrant=False)
    else:
        out, record = run(block, x, context)
    between(block)
    (out.sin().sum() + 0.1 * record.balance_sum + 0.01 * record.z_sum).backward()
    found = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    scalars = {"balance": record.balance_sum.detach(), "z": record.z_sum.detach()}
    return found | scalars | {"x": x.grad, "demand": record.plan.demand_E, "served": record.plan.served_E, "out": out}


def drift_of_bias(block: Block) -> None:
    block.feed_forward.router.selection_bias.add_(torch.randn(8, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_follows_the_first_decision_and_changes_no_bit(kind: str) -> None:
    whole, again = differentiated(kind, False), differentiated(kind, True)
    assert whole.keys() == again.keys()
    for name, expected in whole.items():
        assert torch.equal(again[name], expected), name


def test_recompute_after_the_bias_moved_still_follows() -> None:
    whole, again = (differentiated("sigmoid, groups, bias", recompute, drift_of_bias) for recompute in (False, True))
    for name, expected in whole.items():
        assert torch.equal(again[name], expected), name


def test_choices_cut_and_joined_in_any_order_are_the_whole() -> None:
    block, x, context = block_of("gshard")
    whole = Choices.of(run(block, x, context)[1], FIRST_ROW * S)
    parts = [whole.part(FIRST_ROW * S + start, count) for start, count in ((20, 10), (0, 13), (13, 0), (13, 7))]
    assert equal(join(parts), whole) and join(parts).first == whole.first
    assert torch.equal(join(parts).gate_TK, whole.gate_TK)
    for torn in (parts[:2], [*parts, parts[0]]):
        with pytest.raises(ValueError, match="after position"):
            join(torn)


def hand_made(**changed: Any) -> Choices:
    values = {
        "first": 0,
        "expert_TK": torch.tensor([[0, 1], [2, 3], [1, 0]]),
        "kept_TK": torch.tensor([[True, True], [True, False], [True, True]]),
        "gate_TK": torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.6, 0.4]]),
    }
    return Choices(**{**values, **changed})


def test_compare_finds_a_single_flipped_choice() -> None:
    base = hand_made()
    assert compare(base, hand_made()) == ledger.Difference(0, 0, 0.0, None)
    experts = base.expert_TK.clone()
    experts[1, 1] = 4
    assert compare(base, hand_made(expert_TK=experts)) == ledger.Difference(1, 0, 0.0, 1)
    asks = torch.tensor([[True, True], [True, True], [True, False]])
    assert compare(base, hand_made(asks_TK=asks)) == ledger.Difference(1, 0, 0.0, 2)
    assert compare(base, hand_made(asks_TK=torch.ones_like(asks))) == ledger.Difference(0, 0, 0.0, None)
    kept = base.kept_TK.clone()
    kept[0, 1] = False
    assert compare(base, hand_made(kept_TK=kept)) == ledger.Difference(0, 1, 0.0, 0)
    gates = base.gate_TK.clone()
    gates[2, 0] += 0.125
    found = compare(base, hand_made(gate_TK=gates))
    assert (found.experts, found.first) == (0, None) and found.gate == pytest.approx(0.125)
    turned = {name: getattr(base, name).flip(1) for name in ("expert_TK", "kept_TK", "gate_TK")}
    assert compare(base, hand_made(**turned)) == ledger.Difference(0, 0, 0.0, None)


def gshard_that_draws_again(logits_TE: Any, config: Any, uniform_T: Any, follow: Any = None) -> RoutingDecision:
    told = None if follow is None else dataclasses.replace(follow, asks_TK=None)
    return original_gshard(logits_TE, config, uniform_T, told)


def routes_again(run: Any, context: RoutingContext, block: int) -> Any:
    return lambda x: run(x, context)


def drops_again(self: Any, decision: Any, shape: Any, counted_BS: Any, follow: Any) -> Any:
    return original_plan(self, decision, shape, counted_BS, None)


original_gshard, original_plan = router_kinds.gshard_top2, layer_module.MoELayer._plan
THIS = sys.modules[__name__]

PLANTED = {
    "replay ignores asks": (
        *(router_kinds, "gshard_top2", gshard_that_draws_again),
        lambda: test_replay_follows_experts_asks_and_drops_whatever_the_weights("gshard"),
    ),
    "replay drops anew": (
        *(layer_module.MoELayer, "_plan", drops_again),
        lambda: test_replay_follows_experts_asks_and_drops_whatever_the_weights("expert choice"),
    ),
    "recompute routes again": (THIS, "decide_once", routes_again, test_recompute_after_the_bias_moved_still_follows),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistake_is_caught(mistake: str) -> None:
    assert failure_with(PLANTED[mistake]) is not None

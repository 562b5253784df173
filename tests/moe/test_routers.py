"""Every router under every capacity rule against the oracle, and what sets each of them apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe_dist.config import MoEConfig
from moe_dist.config.load import find_problems
from moe_dist.errors import ConfigError
from moe_dist.generate.sampling import Sampling, continue_prompts
from moe_dist.model.flops import count_parameters, training_flops_per_token
from moe_dist.moe import balance
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.randomness import Draw
from moe_dist.moe.reference import moe_reference
from moe_dist.moe.reference_routing import Occasion
from moe_dist.moe.router_kinds import gshard_top2, hash_routing, sigmoid_topk, softmax_topk
from tests.support.models import plain_model, small_config
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, D, E = 3, 9, 16, 8
SEED, STEP, FIRST_ROW = 11, 5, 4

GROUPS = {"num_groups": 4, "groups_per_token": 2, "top_k": 3}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, raw gates": {"normalize_gates": False},
    "softmax, groups and bias": {**GROUPS, "selection_bias": True},
    "softmax, jitter": {"input_jitter": 0.3},
    "softmax, router bias": {"router_bias": True},
    "sigmoid": {"router": "sigmoid_topk", "gate_scale": 2.5},
    "sigmoid, raw top-1": {"router": "sigmoid_topk", "top_k": 1, "normalize_gates": False},
    "sigmoid, groups and bias": {"router": "sigmoid_topk", **GROUPS, "selection_bias": True, "gate_scale": 2.5},
    "switch": {"router": "switch", "top_k": 1, "normalize_gates": False},
    "gshard": {"router": "gshard"},
    "gshard, jitter": {"router": "gshard", "input_jitter": 0.2},
    "noisy": {"router": "noisy_topk"},
    "noisy, router bias": {"router": "noisy_topk", "router_bias": True},
    "expert choice": {"router": "expert_choice", "normalize_gates": False, "capacity_factor_eval": 1.5},
    "hash": {"router": "hash", "balance_loss": 0.0, "z_loss": 0.0},
}
CAPACITIES: list[dict[str, Any]] = [
    {},
    {"capacity_factor": 1.0},
    {"capacity_factor": 1.0, "drop_policy": "position_token_major"},
    {"capacity_factor": 1.0, "drop_policy": "position_choice_major", "renormalize_after_drop": True},
]


def tree_of(router: str, capacity: dict[str, Any]) -> dict[str, Any]:
    moe = {"num_experts": E, "shared_expert_width": 0, **ROUTERS[router], **capacity}
    if router == "expert choice":
        moe["balance_loss"] = 0.0
    return moe


def legal(router: str, capacity: dict[str, Any]) -> bool:
    return not find_problems({"model": {"moe": tree_of(router, capacity)}, "generate": {"prompts": []}})


CASES = [
    (router, capacity, training)
    for router, capacity, training in itertools.product(ROUTERS, CAPACITIES, [True, False])
    if legal(router, capacity) and (training or not capacity or router == "expert choice")
]


def layer_of(router: str, **capacity: Any) -> MoELayer:
    """The second layer of a small model, with a selection bias of both signs where it has one."""
    config = small_config(tree_of(router, capacity), generate={"prompts": ()})
    layer = list(plain_model(config).moe_layers())[1][1]
    if layer.config.selection_bias:
        layer.router.selection_bias.copy_(torch.linspace(-1.5, 0.4, E)[torch.randperm(E)])
    return layer


def inputs(padded: bool) -> tuple[torch.Tensor, torch.Tensor, RoutingContext, Occasion]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 300, (B, S), generator=generator)
    counted = torch.rand(B, S, generator=generator) > (0.3 if padded else -1.0)
    if padded:
        counted[1] = False  # a sequence of nothing but padding
    occasion = Occasion(tokens.tolist(), SEED, STEP, layer=1, first_row=FIRST_ROW)
    return x, counted, RoutingContext(tokens, Draw(SEED, STEP, FIRST_ROW)), occasion


def weights_of(layer: MoELayer) -> dict[str, torch.Tensor]:
    """The layer's weights by the oracle's names."""
    weights = {"gate_up": layer.experts.gate_up, "down": layer.experts.down}
    for name, tensor in [*layer.router.named_parameters(), *layer.router.named_buffers()]:
        weights[{"weight": "router", "bias": "router_bias", "noise_weight": "noise"}.get(name, name)] = tensor
    return weights


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("router", "capacity", "training"), CASES)
def test_router_any_capacity_equals_the_oracle(router, capacity, training, padded):
    torch.manual_seed(0)
    layer = layer_of(router, **capacity).train(training)
    x, counted, context, occasion = inputs(padded)
    y, record = layer(x, counted if padded else None, context)
    weights = weights_of(layer)
    expected, stats = moe_reference(weights, x, counted, layer.config, training, occasion)
    assert torch.equal(record.plan.demand_E, stats["demand_E"])
    assert torch.equal(record.plan.served_E, stats["served_E"])
    assert not capacity or not torch.equal(stats["demand_E"], stats["served_E"]), "the case must drop something"
    assert_close(y, expected, "output")
    assert_close(record.balance_sum, stats["balance_sum"], "balance")
    assert_close(record.z_sum, stats["z_sum"], "z")
    judged = {"x": x} | {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    towards = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)

    def gradients(out, balance_sum, z_sum):
        total = (out * towards).sum() + 0.1 * balance_sum + 0.01 * z_sum
        return torch.autograd.grad(total, list(judged.values()), allow_unused=True, materialize_grads=True)

    found = gradients(y, record.balance_sum, record.z_sum)
    wanted = gradients(expected, stats["balance_sum"], stats["z_sum"])
    for name, mine, theirs in zip(judged, found, wanted, strict=True):
        assert_close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize("router", ROUTERS)
def test_router_gets_gradient_from_the_output_alone(router):
    layer = layer_of(router, **({"capacity_factor": 1.0} if router == "expert choice" else {}))
    x, _, context, _ = inputs(padded=False)
    layer(x, None, context)[0].square().sum().backward()
    for name, parameter in layer.router.named_parameters():
        assert float(parameter.grad.norm()) > 1e-6, name


def test_top1_with_normalised_gates_would_leave_the_router_without_gradient():
    """Why rules.py refuses it (trap 7): the gate is 1 whatever the router says."""
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    for kind in (softmax_topk, sigmoid_topk):
        gate = kind(logits, MoEConfig(num_experts=E, top_k=1, normalize_gates=True)).gate_TK
        (grad,) = torch.autograd.grad(gate.square().sum(), logits)
        assert torch.equal(gate, torch.ones_like(gate)) and float(grad.abs().max()) == 0


RANDOM = ["gshard", "noisy", "softmax, jitter", "gshard, jitter"]


@pytest.mark.parametrize("router", RANDOM)
def test_router_that_draws_does_not_depend_on_how_the_batch_is_cut(router):
    layer = layer_of(router)
    x, _, context, _ = inputs(padded=False)
    whole = layer(x, None, context)[0]
    parts = []
    for b in range(B):
        draw = Draw(SEED, STEP, FIRST_ROW + b)
        parts.append(layer(x[b : b + 1], None, RoutingContext(context.token_BS[b : b + 1], draw))[0])
    assert_close(torch.cat(parts), whole, "output")
    for other in (Draw(SEED + 1, STEP, FIRST_ROW), Draw(SEED, STEP + 1, FIRST_ROW), Draw(SEED, STEP, FIRST_ROW + 1)):
        assert not torch.equal(layer(x, None, RoutingContext(context.token_BS, other))[0], whole)


@pytest.mark.parametrize("router", RANDOM)
def test_router_that_draws_is_still_in_evaluation_and_asks_for_a_draw_in_training(router):
    layer = layer_of(router)
    x, _, context, _ = inputs(padded=False)
    with pytest.raises(AssertionError, match="RoutingContext with a Draw"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x, None, context)[0])


def test_gshard_asks_the_second_expert_as_often_as_its_weight_says():
    torch.manual_seed(1)
    logits = torch.tensor([[2.0, 1.0, -9.0]]).repeat(20_000, 1)
    config = MoEConfig(num_experts=3, router="gshard")
    decision = gshard_top2(logits, config, torch.rand(len(logits), dtype=torch.float64))
    second = float(torch.tensor([2.0, 1.0]).softmax(0)[1])
    asked = decision.asks_TK[:, 1].double().mean()
    assert abs(float(asked) - 2 * second) < 0.015
    assert bool(decision.asks_TK[:, 0].all())
    assert torch.equal(decision.gate_TK[:, 1] == 0, ~decision.asks_TK[:, 1])
    assert gshard_top2(logits, config, None).asks_TK is None


def test_expert_choice_every_expert_takes_its_most_probable_tokens_of_each_sequence():
    layer = layer_of("expert choice", capacity_factor=1.0)
    x, _, _, _ = inputs(padded=False)
    record = layer(x)[1]
    rows = -(-S * 2 // E)
    assert record.plan.served_E.tolist() == [B * rows] * E
    for b, probability_SE in enumerate(record.decision.probability_TE.view(B, S, E)):
        best = probability_SE.topk(rows, dim=0).indices
        kept = record.plan.kept_TK.view(B, S, E)[b]
        assert torch.equal(kept, torch.zeros_like(kept).scatter(0, best, True))


def test_expert_choice_cannot_generate_text():
    layered = small_config(tree_of("expert choice", {"capacity_factor": 1.0}), generate={"prompts": ()})
    model = plain_model(layered).eval()
    with pytest.raises(ConfigError, match=r"model\.moe\.router"):
        continue_prompts(model, [[5]], Sampling(1, 0.0, 0, 0), window=8, end_token=299)


def test_hash_routing_is_a_function_of_token_and_layer_and_spreads_evenly():
    config = MoEConfig(num_experts=E, router="hash", top_k=2, gate_scale=3.0)
    tokens = torch.arange(8000)
    first = hash_routing(tokens, 0, config, torch.float64)
    assert torch.equal(first.expert_TK, hash_routing(tokens.flip(0), 0, config, torch.float64).expert_TK.flip(0))
    assert not torch.equal(first.expert_TK, hash_routing(tokens, 1, config, torch.float64).expert_TK)
    assert bool((first.expert_TK[:, 0] != first.expert_TK[:, 1]).all())
    assert balance.max_violation(torch.bincount(first.expert_TK.reshape(-1))) < 0.1
    assert first.gate_TK.unique().tolist() == [1.5]
    assert first.probability_TE.sum(1).unique().tolist() == [1.0]


# Worked out once: a change of the hash would silently send trained tokens to other experts.
def test_hash_routing_keeps_its_table():
    chosen = hash_routing(torch.arange(6), 3, MoEConfig(num_experts=E, router="hash", top_k=1), torch.float32).expert_TK
    assert chosen.flatten().tolist() == HASH_TABLE


HASH_TABLE = [1, 4, 4, 1, 3, 2]


@pytest.mark.parametrize("kind", [softmax_topk, sigmoid_topk])
@pytest.mark.parametrize("shift", [-1000.0, -80.0, -20.0, 0.0, 20.0, 80.0, 1000.0])
def test_balance_does_not_fall_below_one_when_all_logits_shift(kind, shift):
    """A small epsilon in the normalisation would let the router shrink all scores and cheat the term (trap 17)."""
    config = MoEConfig(num_experts=4, top_k=1, normalize_gates=False)
    logits = 5 * torch.eye(4, dtype=torch.float64).repeat(3, 1) + shift
    even = kind(logits, config)
    assert torch.equal(torch.bincount(even.expert_TK.reshape(-1)), torch.full((4,), 3))
    assert_close(even.probability_TE.sum(-1), torch.ones(12, dtype=torch.float64), "sum of probabilities")
    assert mean_balance(even) == pytest.approx(1.0, rel=1e-12)
    assert mean_balance(kind(logits[:1].repeat(12, 1), config)) >= 1 - 1e-12


@pytest.mark.parametrize("kind", [softmax_topk, sigmoid_topk])
@pytest.mark.parametrize("shift", [-60.0, 0.0])
def test_normalised_gates_sum_to_one_however_low_the_scores(kind, shift):
    logits = torch.randn(20, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    gate = kind(logits, MoEConfig(num_experts=E, top_k=3)).gate_TK
    assert_close(gate.sum(-1), torch.ones(20, dtype=torch.float64), "sum of gates")
    scores = logits.softmax(-1) if kind is softmax_topk else logits.sigmoid()
    best = scores.topk(3).values
    assert_close(gate, best / best.sum(-1, keepdim=True), "gates")


def test_sigmoid_choice_is_right_where_the_sigmoid_is_rounded_to_one():
    logits = torch.tensor([[20.0, 21.0, 40.0, 30.0]])
    assert logits.sigmoid().unique().numel() == 1
    assert sigmoid_topk(logits, MoEConfig(num_experts=4)).expert_TK.tolist() == [[2, 3]]


def mean_balance(decision) -> float:
    tokens = decision.expert_TK.shape[0]
    demand = balance.demand_by_sequence(decision.expert_TK, None, tokens, 4)
    probability = balance.probability_by_sequence(decision.probability_TE, None, tokens)
    return float(balance.balance_sum(probability, demand)) / tokens


@pytest.mark.parametrize("router", ["noisy", "hash", "sigmoid, groups and bias", "softmax, router bias"])
def test_parameters_are_counted_whatever_the_router_holds(router):
    config = small_config(tree_of(router, {}))
    assert count_parameters(config.model).total == sum(p.numel() for p in plain_model(config).parameters())


def test_router_bias_is_no_product_that_flops_would_count():
    with_bias, without = (small_config(tree_of(name, {})).model for name in ("softmax, router bias", "softmax"))
    assert count_parameters(with_bias).total > count_parameters(without).total
    assert training_flops_per_token(with_bias, 9) == training_flops_per_token(without, 9)


def test_noisy_router_spread_is_softplus_of_its_own_weights():
    layer = layer_of("noisy")
    x, _, context, _ = inputs(padded=False)
    clean = x.view(-1, D) @ layer.router.weight.T
    spread = F.softplus(x.view(-1, D) @ layer.router.noise_weight.T)
    noise = (layer.router(x.view(-1, D), context).logits_TE - clean) / spread
    assert 0.7 < float(noise.std()) < 1.3 and abs(float(noise.mean())) < 0.3

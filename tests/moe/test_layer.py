"""The layer against the oracle that loops over tokens, and the traps of NUMERICS that live in one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_dist.moe.balance import max_violation
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.reference import moe_reference
from moe_dist.moe.router_kinds import softmax_topk
from tests.support.models import plain_model, small_config
from tests.support.tolerances import RELATIVE, assert_close, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

B, S = 3, 10


def layer_of(dtype=torch.float64, **moe):
    """The first layer of a small model with large router weights, so that routing is decided and uneven."""
    precision = "fp64" if dtype == torch.float64 else "fp32"
    config = small_config({"num_experts": 4, "shared_expert_width": 0, **moe}, train={"precision": precision})
    _, layer = next(plain_model(config).moe_layers())
    return layer


def inputs(dtype=torch.float64, padded=False, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, 16, generator=generator, dtype=dtype, requires_grad=True)
    counted = torch.rand(B, S, generator=generator) > (0.3 if padded else -1.0)
    if padded:
        counted[1] = False  # a sequence of nothing but padding
    return x, counted


def objective(y, balance_sum, z_sum, group_balance_sum=0.0):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weights).sum() + 0.1 * balance_sum + 0.01 * z_sum + 0.2 * group_balance_sum


def gradients(layer: MoELayer, x, total):
    return torch.autograd.grad(total, [x, layer.router.weight, layer.experts.gate_up, layer.experts.down])


SCOPES = ("sequence", "micro_batch", "global")
POLICIES = ("probability", "position_token_major", "position_choice_major")
CASES = [
    *itertools.product([(None, "probability")], [False], [False, True], SCOPES, [False, True]),
    *itertools.product(
        [(1.0, policy) for policy in POLICIES], [False, True], [False, True], ["sequence", "global"], [False, True]
    ),
]


@pytest.mark.parametrize(("capacity", "renormalize", "padded", "scope", "normalize"), CASES)
def test_layer_any_options_equal_the_oracle(capacity, renormalize, padded, scope, normalize):
    factor, policy = capacity
    layer = layer_of(
        capacity_factor=factor,
        drop_policy=policy,
        renormalize_after_drop=renormalize,
        balance_scope=scope,
        normalize_gates=normalize,
        gate_scale=1.7,
        num_groups=2,
        groups_per_token=2,
    )
    x, counted = inputs(padded=padded)
    y, record = layer(x, counted if padded else None)
    weights = {"router": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
    expected, stats = moe_reference(weights, x, counted, layer.config)
    assert torch.equal(record.plan.demand_E, stats["demand_E"])
    assert torch.equal(record.plan.served_E, stats["served_E"])
    assert factor is None or not torch.equal(stats["demand_E"], stats["served_E"]), "the case must drop something"
    assert_close(y, expected, "output")
    assert_close(record.balance_sum, stats["balance_sum"], "balance")
    assert_close(record.group_balance_sum, stats["group_balance_sum"], "group balance")
    assert_close(record.z_sum, stats["z_sum"], "z")
    found = gradients(layer, x, objective(y, record.balance_sum, record.z_sum, record.group_balance_sum))
    wanted = gradients(
        layer, x, objective(expected, *(stats[f"{name}_sum"] for name in ("balance", "z", "group_balance")))
    )
    for name, mine, theirs in zip(("x", "router", "gate_up", "down"), found, wanted, strict=True):
        assert_close(mine, theirs, f"gradient of {name}")


def test_layer_evaluation_uses_its_own_capacity():
    layer = layer_of(capacity_factor=0.5, capacity_factor_eval=None)
    x, _ = inputs()
    assert not layer(x)[1].plan.keeps_all
    assert layer.eval()(x)[1].plan.keeps_all


def test_layer_router_gets_gradient_from_either_loss_alone():
    layer = layer_of()
    x, _ = inputs()
    for part in (lambda y, r: y.square().sum(), lambda y, r: r.balance_sum, lambda y, r: r.z_sum):
        y, record = layer(x)
        (grad,) = torch.autograd.grad(part(y, record), layer.router.weight)
        assert float(grad.norm()) > 1e-6


def test_layer_gradients_agree_with_finite_differences():
    layer = layer_of(balance_scope="global", capacity_factor=1.0)
    x, _ = inputs()
    x = (x[:1, :4] * 0.5).detach().requires_grad_()

    def function(x, router, gate_up, down):
        y, record = torch.func.functional_call(
            layer, {"router.weight": router, "experts.gate_up": gate_up, "experts.down": down}, (x,)
        )
        return y, record.balance_sum, record.z_sum

    weights = [p.detach().clone().requires_grad_() for p in (layer.router.weight, *layer.experts.parameters())]
    assert torch.autograd.gradcheck(function, (x, *weights), eps=1e-7, atol=1e-5)


def test_layer_added_padding_changes_nothing():
    layer = layer_of(capacity_factor=1.0)
    x, _ = inputs()
    longer = torch.cat([x, torch.randn(B, 7, 16, dtype=x.dtype)], dim=1)
    counted = torch.zeros(B, S + 7, dtype=torch.bool)
    counted[:, :S] = True
    y, record = layer(x)
    padded_y, padded = layer(longer, counted)
    assert_close(padded_y[:, :S], y, "output")
    assert torch.equal(padded.plan.demand_E, record.plan.demand_E)
    for name in ("balance_sum", "z_sum", "group_balance_sum", "probability_E", "entropy_sum"):
        assert_close(getattr(padded, name), getattr(record, name), name)


def test_layer_drops_do_not_reach_demand_or_balance():
    x, _ = inputs()
    records = [layer_of(capacity_factor=factor)(x)[1] for factor in (None, 1.0, 0.3)]
    assert len({int(r.plan.served_E.sum()) for r in records}) == 3
    for record in records[1:]:
        assert torch.equal(record.plan.demand_E, records[0].plan.demand_E)
        assert torch.equal(record.balance_sum, records[0].balance_sum)


def test_layer_all_tokens_to_one_expert_gives_zero_gradient_to_the_others():
    layer = layer_of(top_k=1, normalize_gates=False)
    x, _ = inputs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 5.0
    y, record = layer(x.abs())
    assert record.plan.served_E.tolist() == [0, 0, B * S, 0]
    y.sum().backward()
    for parameter in layer.experts.parameters():
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert norms[2] > 0 and norms[[0, 1, 3]].tolist() == [0, 0, 0]


def test_layer_without_sequences_has_zero_gradients_everywhere():
    layer = layer_of(capacity_factor=1.0)
    x = torch.empty(0, S, 16, dtype=torch.float64, requires_grad=True)
    y, record = layer(x)
    objective(y, record.balance_sum, record.z_sum).backward()
    assert y.shape == x.shape and record.plan.demand_E.sum() == 0
    assert all(p.grad is not None for p in layer.parameters()), "a collective would wait for what is missing"
    assert all(float(p.grad.abs().max()) == 0 for p in layer.parameters())


def test_router_stays_in_fp32_under_autocast_and_after_casting_the_module():
    layer = layer_of(dtype=torch.float32)
    x, _ = inputs(dtype=torch.float32)
    exact, record = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, under = layer(x)
    assert under.decision.logits_TE.dtype == under.decision.gate_TK.dtype == torch.float32
    assert torch.equal(under.decision.expert_TK, record.decision.expert_TK)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 3e-2 * exact.abs().max()
    cast = layer.to(torch.bfloat16)(x.bfloat16())[1]
    assert cast.decision.probability_TE.dtype == torch.float32
    assert cast.plan.demand_E.dtype == torch.int64


def test_bf16_autocast_backward_inside_and_outside_agree():
    results = []
    for inside in (True, False):
        layer = layer_of(dtype=torch.float32)
        x, _ = inputs(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x)[0].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append([p.grad for p in layer.parameters()])
    for inside_grad, outside_grad in zip(*results, strict=True):
        assert relative_error(inside_grad, outside_grad) < RELATIVE[torch.bfloat16]


def test_balance_is_one_for_even_load_and_experts_for_collapse():
    layer = layer_of(balance_scope="global", top_k=1, normalize_gates=False)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :4] = 50 * torch.eye(4)
    even = torch.eye(4, 16, dtype=torch.float64).repeat(3, 1)[None]
    collapsed = torch.eye(4, 16, dtype=torch.float64)[:1].repeat(12, 1)[None]
    assert float(layer(even)[1].balance_sum) / 12 == pytest.approx(1.0)
    assert float(layer(collapsed)[1].balance_sum) / 12 == pytest.approx(4.0)
    assert max_violation(layer(even)[1].plan.demand_E) == 0
    assert max_violation(layer(collapsed)[1].plan.demand_E) == 3


def test_gates_do_not_move_when_all_logits_shift():
    layer = layer_of()
    x, _ = inputs()
    with torch.no_grad():
        decision = layer.router(x.view(-1, 16))
        again = softmax_topk(decision.logits_TE + 1000.0, layer.config).gate_TK
    assert_close(again, decision.gate_TK, "gates")
    assert_close(again.sum(-1), torch.ones(B * S, dtype=torch.float64), "sum of gates")

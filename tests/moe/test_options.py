"""Every router with every capacity rule, through every back end, against the oracle; and each option of the experts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_dist.config.rules import broken_rules
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.expert_loop import _Kept
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.randomness import Draw
from moe_dist.moe.reference import moe_reference
from moe_dist.moe.reference_routing import Occasion
from tests.support.models import plain_model, small_config
from tests.support.routers import ROUTERS
from tests.support.tolerances import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, D = 3, 6, 16

KINDS: dict[str, dict[str, Any]] = {
    **ROUTERS,
    "groups by their best": {"num_groups": 4, "groups_per_token": 2, "group_score_experts": 1},
    "softmax raw": {"normalize_gates": False, "gate_scale": 1.5},
    "noisy": {**ROUTERS["noisy"], "input_jitter": 0.1},
    # The capacity rule says the factor.
    "expert choice": {"router": "expert_choice", "normalize_gates": False, "balance_loss": 0.0},
}
CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    **{
        f"{policy} {group}": {"capacity_factor": 1.0, "drop_policy": policy, "capacity_group": group}
        for policy in ("probability", "position_token_major", "position_choice_major")
        for group in ("sequence", "rank")
    },
    "renormalised": {"capacity_factor": 0.8, "renormalize_after_drop": True},
    "padded": {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, "pad_to_capacity": True},
    "padded rank": {
        "capacity_factor": 1.0,
        "capacity_factor_eval": 1.0,
        "pad_to_capacity": True,
        "capacity_group": "rank",
        "drop_policy": "position_token_major",
    },
}
# Of the pairs, those that must be refused, and by the rule on which key.
REFUSED = {
    ("expert choice", "dropless"): "capacity_factor",
    ("expert choice", "renormalised"): "renormalize_after_drop",
    **{("expert choice", name): "drop_policy" for name in CAPACITIES if "position" in name or name == "padded rank"},
    **{
        ("hash", name): "drop_policy" for name in ("probability sequence", "probability rank", "renormalised", "padded")
    },
}
BACKENDS = ("loop", "loop by rows", "reference", "batched", "grouped")


def config_of(moe, precision="fp64"):
    """Unchecked: the tests of refusals need what the config would not let through."""
    checked = small_config({"shared_expert_width": 0}, train={"precision": precision}, generate={"prompts": []})
    evaluated = {"capacity_factor_eval": 1.0} if moe.get("router") == "expert_choice" else {}
    moe = checked.model.moe.model_copy(update={**evaluated, **moe})
    return checked.model_copy(update={"model": checked.model.model_copy(update={"moe": moe})})


def layer_of(moe, backend="loop", precision="fp64") -> MoELayer:
    """The first layer; `loop by rows` is the loop as an exchange uses it."""
    config = config_of({**moe, "backend": "loop" if backend == "loop by rows" else backend}, precision)
    _, layer = next(plain_model(config).moe_layers())
    if backend == "loop by rows":
        layer.experts.takes_tokens = lambda x_TD: False
    bias_E = getattr(layer.router, "selection_bias", None)
    if bias_E is not None:
        bias_E.copy_(torch.linspace(-0.2, 0.2, 8))
    return layer


def batch(dtype=torch.float64):
    """Three sequences: one padded in part, one of padding alone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    counted = torch.ones(B, S, dtype=torch.bool)
    counted[0, 4:] = False
    counted[1] = False
    return x, counted, torch.randint(0, 300, (B, S), generator=generator)


def outcome(layer, x, y, stats):
    """Everything that is compared."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    total = (y * weights).sum() + 0.1 * stats["balance_sum"] + 0.01 * stats["z_sum"]
    names = dict(layer.named_parameters())
    grads = torch.autograd.grad(total, [x, *names.values()], allow_unused=True)
    found = {"output": y, "balance": stats["balance_sum"], "z": stats["z_sum"]}
    named = zip(("x", *names), (x, *names.values()), grads, strict=True)
    return found | {f"gradient of {n}": torch.zeros_like(p) if g is None else g for n, p, g in named}


def of_layer(layer, dtype=torch.float64):
    x, counted, tokens = batch(dtype)
    y, record = layer(x, counted, RoutingContext(tokens, Draw(0, 5, 2)))
    stats = {"balance_sum": record.balance_sum, "z_sum": record.z_sum}
    return outcome(layer, x, y, stats), record.plan


def of_oracle(layer):
    x, counted, tokens = batch()
    names = {"router.weight": "router", "router.noise_weight": "noise", "latent_in.weight": "latent_in"}
    names |= {"latent_out.weight": "latent_out", "router.selection_bias": "selection_bias"}
    weights = {
        names.get(name, name.removeprefix("experts.")): value
        for name, value in layer.state_dict(keep_vars=True).items()
    }
    y, stats = moe_reference(weights, x, counted, layer.config, occasion=Occasion(tokens.tolist(), 0, 5, 0, 2))
    return outcome(layer, x, y, stats), stats


PAIRS = list(itertools.product(KINDS, CAPACITIES))


@pytest.mark.parametrize(("router", "capacity"), [pair for pair in PAIRS if pair not in REFUSED])
def test_options_every_router_capacity_and_backend_equal_the_oracle(router, capacity):
    moe = {**KINDS[router], **CAPACITIES[capacity]}
    assert not [error for error in broken_rules(config_of(moe)) if "moe" in str(error)]
    wanted, stats = of_oracle(layer_of(moe))
    for backend in BACKENDS:
        if backend == "batched" and not moe.get("pad_to_capacity"):
            continue
        precision, dtype = ("fp32", torch.float32) if backend == "grouped" else ("fp64", torch.float64)
        found, plan = of_layer(layer_of(moe, backend, precision), dtype)
        assert torch.equal(plan.demand_E, stats["demand_E"]), backend
        assert torch.equal(plan.served_E, stats["served_E"]), backend
        assert moe.get("pad_to_capacity", False) == (plan.rows_each is not None)
        for name, value in wanted.items():
            assert_close(found[name], value.to(dtype), f"{backend}: {name}")


@pytest.mark.parametrize(("router", "capacity"), list(REFUSED))
def test_options_pairs_without_meaning_are_refused_with_the_key(router, capacity):
    errors = list(broken_rules(config_of({**KINDS[router], **CAPACITIES[capacity]})))
    assert any(REFUSED[router, capacity] in str(error) for error in errors)


EXPERTS = {
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "geglu": {"activation": "geglu"},
    "clamped": {"activation": "clamped_swiglu"},
    "squared relu": {"activation": "squared_relu"},
    "biases": {"expert_bias": True},
    "biases of one product, clamped": {"expert_bias": True, "activation": "clamped_swiglu", "weigh": "input"},
    "biases, relu, latent": {"expert_bias": True, "activation": "relu", "latent_width": 6},
    "padded biases": {"expert_bias": True, **CAPACITIES["padded"]},
    "input": {"weigh": "input"},
    "input sigmoid top-1 of Llama 4": {
        "weigh": "input",
        "router": "sigmoid_topk",
        "top_k": 1,
        "normalize_gates": False,
    },
    "latent": {"latent_width": 6},
    "latent input relu": {"latent_width": 6, "weigh": "input", "activation": "relu", "capacity_factor": 1.0},
    "fine-grained": {"num_experts": 32, "top_k": 8, "expert_width": 4},
    "padded input": {"weigh": "input", **CAPACITIES["padded"]},
}


@pytest.mark.parametrize("recompute", ["nothing", "activation", "projections"])
@pytest.mark.parametrize("name", EXPERTS)
def test_options_of_experts_equal_the_oracle(name, recompute):
    moe = {**EXPERTS[name], "recompute_experts": recompute}
    wanted, _ = of_oracle(layer_of(moe))
    for backend in ("loop", "loop by rows", "reference", *(["batched"] if "padded" in name else [])):
        found, _ = of_layer(layer_of(moe, backend))
        for what, value in wanted.items():
            assert_close(found[what], value, f"{backend}: {what}")


def test_options_shared_expert_gate_weighs_by_a_sigmoid():
    plain = layer_of({"shared_expert_width": 8})
    gated = layer_of({"shared_expert_width": 8, "shared_expert_gate": True})
    x, _, tokens = batch()
    alone = {name: value for name, value in gated.state_dict().items() if name != "shared_gate.weight"}
    plain.load_state_dict(alone)
    weight_1D = gated.shared_gate.weight
    routed = gated(x, context=RoutingContext(tokens, Draw(0, 0, 0)))[0] - plain(x)[0]
    share = torch.sigmoid(x @ weight_1D.T)
    assert_close(routed, (share - 1) * plain.shared(x), "what the gate changes")
    assert relative_error(share, torch.ones_like(share)) > 1e-3


def test_options_recompute_keeps_less_and_changes_no_bit():
    results, kept = [], []
    for recompute in ("nothing", "activation", "projections"):
        layer = layer_of({"recompute_experts": recompute})
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        x, counted, tokens = batch()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y, record = layer(x, counted, RoutingContext(tokens, Draw(0, 5, 2)))
        results.append(outcome(layer, x, y, {"balance_sum": record.balance_sum, "z_sum": record.z_sum}))
        kept.append(sum(sizes))
    rows, inner = int(record.plan.served_E.sum()), layer.config.expert_width
    assert kept[0] - kept[1] == 2 * rows * inner, "the activation and its by-product"
    assert kept[1] - kept[2] == 2 * rows * inner, "the two projections"
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_options_padded_shapes_do_not_depend_on_routing_or_padding():
    moe = {**CAPACITIES["padded"], "min_capacity": 3}
    x, counted, _ = batch()
    rows = {layer_of(moe)(value, mask)[1].plan.slot_N.numel() for value in (x, x * 0, -x) for mask in (counted, None)}
    assert rows == {8 * 3 * B}


def test_options_a_row_that_is_empty_reaches_neither_output_nor_gradient():
    layer = layer_of(CAPACITIES["padded"], "batched")
    x, counted, _ = batch()
    y, record = layer(x, counted)
    assert int((record.plan.slot_N < 0).sum()) > 0
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad[1], torch.zeros_like(grad[1])), "a sequence of padding"


def test_planted_mistakes_of_the_loop_are_each_caught(monkeypatch):
    def stale(self, expert, x_RD, first_HD):
        return original(self, expert, x_RD.flip(0), first_HD)

    original = _Kept.read
    monkeypatch.setattr(_Kept, "read", stale)
    with pytest.raises(AssertionError, match="gradient of"):
        test_options_of_experts_equal_the_oracle("gelu", "projections")

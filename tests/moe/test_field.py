"""Routers and layers of the field on random weights: transformers, and fairscale's GShard gate."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.config.load import find_problems
from moe_dist.moe import balance
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.router import Router
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers", reason="parity needs the dev extra with transformers")

B, S, D, F, E = 2, 20, 16, 12, 8


def fill(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)


def sizes(top_k: int, **others: Any) -> dict[str, Any]:
    return {"hidden_size": D, "num_experts_per_tok": top_k, "hidden_act": "silu", **others}


def mixtral(top_k: int) -> nn.Module:
    from transformers.models.mixtral import modeling_mixtral as family

    config = transformers.MixtralConfig(**sizes(top_k), num_local_experts=E, intermediate_size=F)
    return family.MixtralSparseMoeBlock(config)


def qwen3(top_k: int, normalised: bool) -> nn.Module:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as family

    others = {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": normalised}
    return family.Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(**sizes(top_k, **others)))


def olmoe(top_k: int, normalised: bool) -> nn.Module:
    from transformers.models.olmoe import modeling_olmoe as family

    others = {"num_experts": E, "intermediate_size": F, "norm_topk_prob": normalised}
    return family.OlmoeSparseMoeBlock(transformers.OlmoeConfig(**sizes(top_k, **others)))


def deepseek(top_k: int, groups: int, opened: int, normalised: bool) -> nn.Module:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as family

    others = {"n_routed_experts": E, "moe_intermediate_size": F, "norm_topk_prob": normalised, "n_shared_experts": 1}
    others |= {"n_group": groups, "topk_group": opened, "routed_scaling_factor": 2.5}
    return family.DeepseekV3MoE(transformers.DeepseekV3Config(**sizes(top_k, **others)))


def grouped(groups: int, opened: int) -> dict[str, Any]:
    moe = {"router": "sigmoid_topk", "selection_bias": True, "gate_scale": 2.5}
    return {**moe, "num_groups": groups, "groups_per_token": opened}


FAMILIES = {
    "Mixtral": (lambda: mixtral(2), {"top_k": 2}),
    "Qwen3-MoE": (lambda: qwen3(3, True), {"top_k": 3}),
    "Qwen3-MoE, raw": (lambda: qwen3(3, False), {"top_k": 3, "normalize_gates": False}),
    "OLMoE": (lambda: olmoe(4, False), {"top_k": 4, "normalize_gates": False}),
    "OLMoE, normalised": (lambda: olmoe(4, True), {"top_k": 4}),
    "DeepSeek-V3": (lambda: deepseek(3, 4, 2, True), {"top_k": 3, **grouped(4, 2)}),
    "DeepSeek-V3, k / groups is 2": (lambda: deepseek(4, 4, 2, True), {"top_k": 4, **grouped(4, 2)}),
    "DeepSeek-V3, one group open": (
        lambda: deepseek(1, 4, 1, False),
        {"top_k": 1, "normalize_gates": False} | grouped(4, 1),
    ),
    "DeepSeek-V3, no groups": (lambda: deepseek(3, 1, 1, True), {"top_k": 3, **grouped(1, 1)}),
}


def layer_like(block: nn.Module, moe: dict[str, Any]) -> MoELayer:
    """Our layer with the weights of theirs."""
    tree = {"num_experts": E, "expert_width": F, "shared_expert_width": 0, **moe}
    assert not find_problems({"model": {"moe": tree}})
    layer = MoELayer(D, MoEConfig(**tree), getattr(block, "shared_experts", None)).eval()
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        layer.experts.gate_up.copy_(block.experts.gate_up_proj)
        layer.experts.down.copy_(block.experts.down_proj.transpose(1, 2))
        if layer.config.selection_bias:
            layer.router.selection_bias.copy_(block.gate.e_score_correction_bias)
    return layer


def spread(expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gate weights as [T, E]: the order in which a token's experts are listed does not matter."""
    return torch.zeros(len(expert_TK), E, dtype=gate_TK.dtype).scatter(1, expert_TK, gate_TK)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_and_layer_equal_those_of_transformers(family):
    make, moe = FAMILIES[family]
    block = make().eval()
    fill(block)
    layer = layer_like(block, moe)
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
    logits, gates, experts = block.gate(x)
    found, record = layer(x)
    assert_close(record.decision.logits_TE, logits.view(-1, E), "logits")
    assert torch.equal(record.decision.expert_TK.sort(-1).values, experts.sort(-1).values)
    assert_close(spread(record.decision.expert_TK, record.decision.gate_TK), spread(experts, gates), "gates")
    wanted = block(x)
    assert_close(found, wanted[0] if isinstance(wanted, tuple) else wanted, "output")


@pytest.mark.parametrize("top_k", [1, 2])
def test_sigmoid_raw_scores_equal_those_of_llama4(top_k):
    from transformers.models.llama4 import modeling_llama4 as family

    config = transformers.Llama4TextConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k)
    theirs = family.Llama4Router(config)
    fill(theirs)
    ours = Router(D, MoEConfig(num_experts=E, router="sigmoid_topk", top_k=top_k, normalize_gates=False))
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    x = torch.randn(B * S, D, generator=torch.Generator().manual_seed(1))
    decision = ours(x)
    scores, logits = theirs(x)
    assert_close(decision.logits_TE, logits, "logits")
    assert_close(spread(decision.expert_TK, decision.gate_TK), scores, "scores")
    towards = torch.linspace(-1, 1, scores.numel()).view_as(scores)
    (spread(decision.expert_TK, decision.gate_TK) * towards).sum().backward()
    (scores * towards).sum().backward()
    assert_close(ours.weight.grad, theirs.weight.grad, "gradient of the weight")


@pytest.mark.parametrize("top_k", [1, 4])
def test_softmax_router_with_bias_equals_that_of_gpt_oss(top_k):
    from transformers.models.gpt_oss import modeling_gpt_oss as family

    theirs = family.GptOssTopKRouter(transformers.GptOssConfig(**sizes(top_k), num_local_experts=E))
    fill(theirs)
    ours = Router(D, MoEConfig(num_experts=E, top_k=top_k, router_bias=True))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B * S, D, generator=torch.Generator().manual_seed(1))
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    decision = ours(xs[0])
    logits, scores, experts = theirs(xs[1])
    assert_close(decision.logits_TE, logits, "logits")
    assert torch.equal(decision.expert_TK, experts), "the experts of a token stand in the same order"
    assert_close(decision.gate_TK, scores, "gates")
    towards = torch.linspace(-1, 1, B * S * E).view(-1, E)
    for x_TD, router, chosen, gate in (
        (xs[0], ours, decision.expert_TK, decision.gate_TK),
        (xs[1], theirs, experts, scores),
    ):
        (towards.gather(1, chosen) * gate.square()).sum().backward()
        assert top_k == 1 or float(router.bias.grad.norm()) > 1e-3
        assert x_TD.grad is not None
    assert_close(xs[0].grad, xs[1].grad, "gradient of x")
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, f"gradient of {name}")


@pytest.mark.parametrize(("family", "top_k"), [("mixtral", 2), ("qwen3_moe", 3)])
def test_balance_is_that_of_transformers_over_top_k(family, top_k):
    """Theirs sums over the K choices without dividing by K, so that even load gives K; ours gives 1. Layers: theirs
    takes all of a model's as one set of tokens, so that it compares with ours layer by layer only."""
    theirs = importlib.import_module(f"transformers.models.{family}.modeling_{family}").load_balancing_loss_func
    router = Router(D, MoEConfig(num_experts=E, top_k=top_k))
    fill(router)
    decision = router(torch.randn(B * S, D, generator=torch.Generator().manual_seed(1)))
    for counted_BS in (None, torch.arange(B * S).view(B, S) % 3 > 0):
        tokens = B * S if counted_BS is None else int(counted_BS.sum())
        probability_BE = balance.probability_by_sequence(decision.probability_TE, counted_BS, S)
        demand_BE = balance.demand_by_sequence(decision.expert_TK, counted_BS, S, E)
        ours = balance.balance_sum(probability_BE, demand_BE.sum(0, keepdim=True)) / tokens
        assert_close(top_k * ours, theirs((decision.logits_TE,), E, top_k, counted_BS), "balance")


def test_gshard_gates_and_drops_equal_those_of_fairscale(monkeypatch):
    """fairscale's gate: capacity 2 T / E, first choices first, gates normalised again after drops.

    It draws the second expert by Gumbel noise on the logits, which is silenced here; ours is asked always.
    """
    top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device))
    moe = {"num_experts": E, "router": "gshard", "drop_policy": "position_choice_major", "renormalize_after_drop": True}
    config = MoEConfig(**moe, capacity_factor_eval=1.0, shared_expert_width=0, expert_width=F)
    layer = MoELayer(D, config, None).eval()
    fill(layer)
    x = torch.randn(1, 32, D, generator=torch.Generator().manual_seed(1))
    _, record = layer(x)
    assert not record.plan.keeps_all
    _, combine_TEC, _ = top2gate.top2gating(record.decision.logits_TE.detach())
    gates = layer._weights(record.decision, record.plan) * record.plan.kept_TK
    assert_close(spread(record.decision.expert_TK, gates), combine_TEC.sum(-1), "gates")


class SwiGLU(nn.Module):
    """One expert of fairscale's layer, which takes any module, with weights laid out as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(2 * F, D)), nn.Parameter(torch.empty(F, D))

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = (rows @ self.gate_up.T).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down


@pytest.fixture
def group_of_one(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tokens", [32, 128])
def test_gshard_layer_and_gradients_equal_those_of_fairscale(tokens, monkeypatch, group_of_one):
    """The whole MOELayer: gate, capacity, dispatch, experts and combine, and every gradient through them.

    Its capacity counts all tokens of a call, ours those of a sequence: the call is one sequence. Its first axis must be
    a multiple of the experts.
    """
    moe_layer = pytest.importorskip("fairscale.nn.moe.moe_layer")
    top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device))
    theirs = moe_layer.MOELayer(top2gate.Top2Gate(D, E), nn.ModuleList([SwiGLU() for _ in range(E)]))
    fill(theirs)
    moe = {"num_experts": E, "router": "gshard", "drop_policy": "position_choice_major", "renormalize_after_drop": True}
    config = MoEConfig(**moe, capacity_factor_eval=1.0, shared_expert_width=0, expert_width=F)
    ours = MoELayer(D, config, None).eval()
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.wg.weight)
        for e, expert in enumerate(theirs.experts):
            ours.experts.gate_up[e].copy_(expert.gate_up)
            ours.experts.down[e].copy_(expert.down)
    x = torch.randn(1, tokens, D, generator=torch.Generator().manual_seed(1))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, record = ours(x_ours)
    wanted = theirs(x_theirs.view(E, -1, D)).view_as(x)
    assert not record.plan.keeps_all, "the case must drop something"
    assert_close(found, wanted, "output")
    towards = torch.linspace(-1, 1, x.numel()).view_as(x)
    (found * towards).sum().backward()
    (wanted * towards).sum().backward()
    assert_close(x_ours.grad, x_theirs.grad, "gradient of x")
    assert_close(ours.router.weight.grad, theirs.gate.wg.weight.grad, "gradient of the router")
    for name in ("gate_up", "down"):
        stacked = torch.stack([getattr(expert, name).grad for expert in theirs.experts])
        assert_close(getattr(ours.experts, name).grad, stacked, f"gradient of {name}")

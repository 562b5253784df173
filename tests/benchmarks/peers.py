"""The layers that are compared: ours, MoE layers of the field, and a dense one of equal active FLOPs.

All are SwiGLU experts without a shared expert behind a softmax top-k router whose gates sum to one, in fp32.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.model.feed_forward import FeedForward
from moe_dist.moe.layer import MoELayer


@dataclass(frozen=True)
class Shape:
    """A layer: experts, experts per token, expert width, model width."""

    experts: int
    top_k: int
    expert_width: int
    width: int

    def __str__(self) -> str:
        return f"E{self.experts} k{self.top_k} F{self.expert_width} D{self.width}"


SHAPES = (Shape(4, 2, 1408, 512), Shape(64, 8, 256, 512), Shape(64, 8, 128, 512), Shape(8, 2, 3584, 1024))


@dataclass(frozen=True)
class Implementation:
    """How a layer is built.

    Attributes:
        build: From a shape to the layer, which takes [1, T, D].
        needs: A module that must import; empty for none.
        note: What sets its work apart from that of the others.
    """

    build: Callable[[Shape], nn.Module]
    needs: str = ""
    note: str = ""


def dense(shape: Shape) -> nn.Module:
    """SwiGLU as wide as the experts of one token together."""
    return FeedForward(ModelConfig(width=shape.width), shape.top_k * shape.expert_width)


def ours(shape: Shape) -> nn.Module:
    """The whole layer of this project: router, plan, dispatch, experts, combine, and its record."""
    config = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, expert_width=shape.expert_width, shared_expert_width=0
    )
    return MoELayer(shape.width, config, None)


def transformers_block(implementation: str) -> Callable[[Shape], nn.Module]:
    """The Qwen3-MoE block of `transformers` with one of its expert implementations."""

    def build(shape: Shape) -> nn.Module:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        return Qwen3MoeSparseMoeBlock(config)

    return build


def torchtitan_layer(shape: Shape) -> nn.Module:
    """torchtitan's MoE with its one-device dispatcher; its experts without their casts to bf16."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    # Its router asks for autocast to fp32, which a CPU does not know and leaves out: all is fp32 here.
    warnings.filterwarnings("ignore", message="In CPU autocast")

    class Fp32Experts(GroupedExperts):
        """Its own three grouped products, in the type of the rows: bf16 products are far slower on a CPU."""

        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
            w1, w2, w3 = (w.transpose(-2, -1) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
            hidden_RF = nn.functional.silu(self._grouped_mm(A=x_RD, B_t=w1, offs=ends_E))
            hidden_RF = hidden_RF * self._grouped_mm(A=x_RD, B_t=w3, offs=ends_E)
            return self._grouped_mm(A=hidden_RF, B_t=w2, offs=ends_E)

    experts = Fp32Experts.Config(dim=shape.width, hidden_dim=shape.expert_width, num_experts=shape.experts)
    dispatcher = LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k)
    router = TokenChoiceTopKRouter.Config(
        num_experts=shape.experts,
        gate=Linear.Config(in_features=shape.width, out_features=shape.experts),
        top_k=shape.top_k,
        score_func="softmax",
        route_norm=True,
    )
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
    return MoE.Config(num_experts=shape.experts, routed_experts=routed, router=router, load_balance_coeff=None).build()


def litgpt_layer(shape: Shape) -> nn.Module:
    """litgpt's LLaMAMoE, as it serves Mixtral."""
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    config = Config(
        n_embd=shape.width,
        n_layer=1,
        n_head=1,
        n_expert=shape.experts,
        n_expert_per_token=shape.top_k,
        moe_intermediate_size=shape.expert_width,
        mlp_class_name="LLaMAMoE",
        bias=False,
    )
    return LLaMAMoE(config)


class FairscaleLayer(nn.Module):
    """fairscale's MOELayer behind its Top2Gate; in need of a process group (`process_group_of_one`)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from fairscale.nn.moe import MOELayer, Top2Gate

        self.experts = shape.experts

        def dense_of(inner: int) -> FeedForward:
            return FeedForward(ModelConfig(width=shape.width), inner)

        experts = nn.ModuleList(dense_of(shape.expert_width) for _ in range(shape.experts))
        self.layer = MOELayer(Top2Gate(shape.width, shape.experts), experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Its first axis must be a multiple of the experts; what lies along it makes no difference."""
        return self.layer(x_BTD.view(self.experts, -1, x_BTD.shape[-1])).view_as(x_BTD)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Implementation(dense),
    "ours": Implementation(ours),
    "transformers grouped": Implementation(transformers_block("grouped_mm"), "transformers"),
    "transformers eager": Implementation(transformers_block("eager"), "transformers"),
    "torchtitan": Implementation(
        torchtitan_layer, "torchtitan.models.common.moe", "its experts without their casts to bf16"
    ),
    "litgpt": Implementation(litgpt_layer, "litgpt.model"),
    "fairscale": Implementation(
        FairscaleLayer,
        "fairscale.nn.moe",
        "always two experts a token whatever k, with capacity 2 T / E: rows beyond it are dropped",
    ),
}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Of these implementations those that cannot be imported here, with the reason."""
    reasons = {}
    for name in names:
        needs = IMPLEMENTATIONS[name].needs
        try:
            importlib.import_module(needs or "torch")
        except ImportError as error:
            reasons[name] = f"{needs}: {error}"
    return reasons


def build(name: str, shape: Shape) -> nn.Module:
    """A layer with weights from one seed; every router has the same, so that all layers carry the same loads."""
    generator = torch.Generator().manual_seed(0)
    router_ED = torch.randn(shape.experts, shape.width, generator=generator) * 0.02
    layer = IMPLEMENTATIONS[name].build(shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02, generator=generator)
            if parameter.shape == router_ED.shape:
                parameter.copy_(router_ED)
    return layer


def tokens_and_gradient(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Input [1, T, D] and the gradient that comes back, the same for every implementation."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, width, generator=generator)
    return x.requires_grad_(), torch.randn(x.shape, generator=generator)


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """One forward and backward pass; gradients are left in `.grad`."""
    out = layer(x)
    (out[0] if isinstance(out, tuple) else out).backward(grad)


@contextlib.contextmanager
def process_group_of_one() -> Iterator[None]:
    """A gloo group of this process alone, which fairscale's layer asks for."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

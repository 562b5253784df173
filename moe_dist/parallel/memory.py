"""What a rank holds in a layout, counted without any process.

Weights, gradients and moments are exact: the model is built on `meta`, and every parameter is divided as `apply.py`
divides it. Activations are an estimate: what one block keeps of a token for the backward pass, by widths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from moe_dist.config import Config, ModelConfig
from moe_dist.model.naming import stacked_parameters
from moe_dist.model.transformer import Transformer
from moe_dist.moe.activation import activation_of
from moe_dist.parallel.layout import Layout

_HEADS = ("query", "key", "value", "query_up", "kv_up")
_BYTES = {"fp32": 4, "bf16": 4, "fp64": 8}  # bf16 is autocast over fp32 weights


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the rank that holds most.

    Attributes:
        parameters: How many parameters it holds.
        weights: Bytes of these.
        gradients: Bytes of their gradients.
        moments: Bytes of both of AdamW's moments.
        activations: Estimate of what a micro-batch keeps for the backward pass.
    """

    parameters: int
    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; what a kernel needs for itself is not in it."""
        return self.weights + self.gradients + self.moments + self.activations


class Size(NamedTuple):
    """A parameter of the model: its numbers (of one expert, where it has some), and how it is divided."""

    numbers: int
    kind: Literal["whole", "cut", "expert"]


def sizes_of(config: ModelConfig) -> list[Size]:
    """Every parameter of a model, which is built on `meta`."""
    with torch.device("meta"):
        model = Transformer(config)
    stacked, found = stacked_parameters(model), []
    for name, parameter in model.named_parameters():
        if name in stacked:
            found.append(Size(parameter[0].numel(), "expert"))
        else:
            found.append(Size(parameter.numel(), "cut" if _is_cut(name, config) else "whole"))
    return found


def memory_of_rank(config: Config, layout: Layout, sizes: list[Size]) -> RankMemory:
    """What the rank with most experts holds while it trains; `sizes` are those of its model."""
    most = max(len(layout.experts_of(place)) for place in range(layout.expert))
    dense = sum(size.numbers // (layout.tensor if size.kind == "cut" else 1) for size in sizes if size.kind != "expert")
    experts = sum(size.numbers * most // layout.expert_tensor for size in sizes if size.kind == "expert")
    each, parallel = _BYTES[config.train.precision], config.parallel.data
    held = dense + experts
    if parallel == "fsdp":
        held = -(-dense // layout.data_shard) - (-experts // layout.expert_shard)
    moments = held
    if parallel == "zero1":
        moments = -(-dense // layout.data) - (-experts // layout.expert_data)
    kept = config.train.micro_batch_sequences * config.data.sequence_length_tokens // layout.tensor
    per_token = sum(_kept_of_block(config, block) for block in range(config.model.num_layers))
    width = 2 if config.train.precision == "bf16" else each
    return RankMemory(held, held * each, held * each, 2 * moments * each, kept * per_token * width)


def _is_cut(name: str, config: ModelConfig) -> bool:
    """Whether a tensor group cuts a dense parameter (`tensor.py`)."""
    if name in ("embedding.weight", "output.weight") or name.endswith("attention.sinks"):
        return True
    part, _, last = name.rpartition(".")
    module = part.rpartition(".")[2]
    if part.endswith(f"attention.{module}"):
        if module in ("query_norm", "key_norm"):
            return config.attention.kind == "grouped" and config.attention.qk_norm == "whole"
        return module in _HEADS or (module == "output" and last == "weight")
    if ".feed_forward.mix." in name:
        return True
    in_dense = part.endswith(f"feed_forward.{module}") and module in ("gate_up", "up", "down")
    return in_dense and (module != "down" or last == "weight")


def _kept_of_block(config: Config, block: int) -> int:
    """Numbers that a block keeps of a token, about."""
    model, moe = config.model, config.model.moe
    if config.train.recompute == "full":
        return model.width
    latent, grouped = model.attention.latent, model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
    heads = model.num_heads * (2 * model.head_width + 2 * latent.rope_width + 2 * latent.value_width)
    attention = 3 * model.width + (heads if model.attention.kind == "latent" else grouped)
    if not model.has_experts(block):
        dense = 2 * model.width + _kept_of_feed_forward(model, model.ffn_width)
        return model.width if config.train.recompute == "selective" else attention + dense
    inside = moe.latent_width or model.width
    experts = moe.top_k * (2 * inside + activation_of(moe.activation).parts * moe.expert_width) + 2 * moe.num_experts
    shared = _kept_of_feed_forward(model, moe.shared_expert_width)
    if config.train.recompute == "selective":
        return 2 * model.width + experts
    return attention + 2 * model.width + experts + shared


def _kept_of_feed_forward(model: ModelConfig, inner: int) -> int:
    """Numbers that a dense or shared feed-forward keeps of a token's inner channels, about."""
    parts, asked = activation_of(model.ffn_activation).parts, model.mix
    mix = {"none": 0, "conv": asked.kernel_tokens * parts * inner}.get(
        asked.kind, (asked.kernel_tokens + 2) * asked.rank
    )
    return (parts + 1) * inner + (mix if inner else 0)

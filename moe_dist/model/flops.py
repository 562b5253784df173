"""Counting parameters and floating-point operations of the plain model.

A multiply-add is two operations. Matrix products and attention are counted; norms, softmax and the like are not.
Attention is counted causally: half of the S x S scores. Work that a capacity drops is still counted as asked for.
Source: Chowdhery et al. 2022 (PaLM), appendix B, for "model FLOPs" (no recompute), here with the causal half.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.config import ModelConfig
from moe_dist.model.attention import window_of
from moe_dist.moe.activation import activation_of


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in total, and those that take part in one token's forward."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts from the config alone; equal to summing the model's parameters (tested)."""
    moe, width = config.moe, config.width
    expert, sparse = sum(_expert(config)), len(config.moe_blocks)
    fixed = config.num_layers * (sum(_attention(config)) + 2 * _norm(config)) + _norm(config)
    fixed += (config.num_layers - sparse) * sum(_dense(config, config.ffn_width)) + sparse * sum(_beside(config))
    fixed += config.vocab_size * width * (1 if config.tie_embeddings else 2) + _positions(config)
    return ParameterCounts(total=fixed + sparse * moe.num_experts * expert, active=fixed + sparse * moe.top_k * expert)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward operations of one token in a row of `sequence_length` tokens."""
    return sum(flops_by_component(config, sequence_length).values())


def flops_by_component(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Forward and backward operations of one token in a row of `sequence_length` tokens, by what they are for."""
    sparse = len(config.moe_blocks)
    seen = sum(_mean_seen(window_of(config, number), sequence_length) for number in range(config.num_layers))
    products = {
        "attention projections": config.num_layers * _attention(config)[0],
        "attention scores and values": config.num_heads * sum(_score_and_value_widths(config)) * seen,
        "dense feed-forwards": (config.num_layers - sparse) * _dense(config, config.ffn_width)[0],
        "routed experts": sparse * config.moe.top_k * _expert(config)[0],
        "router and shared experts": sparse * _beside(config)[0],
        "output": config.vocab_size * config.width,
    }
    return {name: 6.0 * count for name, count in products.items()}


def cached_numbers_per_token(config: ModelConfig) -> tuple[int, int]:
    """Numbers that a cache keeps of a token: in layers that see all tokens, and in those with a window."""
    latent = config.attention.latent
    grouped = 2 * config.num_kv_heads * config.head_width
    each = latent.kv_rank + latent.rope_width if config.attention.kind == "latent" else grouped
    near = sum(window_of(config, number) is not None for number in range(config.num_layers))
    return each * (config.num_layers - near), each * near


def _norm(config: ModelConfig) -> int:
    """Parameters of a norm of the residual stream."""
    return config.width * (2 if config.norm == "layer" else 1)


def _positions(config: ModelConfig) -> int:
    return config.max_positions_tokens * config.width if config.positions == "learned" else 0


def _dense(config: ModelConfig, inner: int) -> tuple[int, int]:
    """Parameters of a dense feed-forward: those of its matrices, and biases."""
    if not inner:
        return 0, 0
    parts = activation_of(config.ffn_activation).parts
    matrices = (parts + 1) * config.width * inner + _mix(config, parts * inner)
    return matrices, (parts * inner + config.width if config.ffn_bias else 0)


def _mix(config: ModelConfig, channels: int) -> int:
    """Parameters of what a feed-forward sees of the tokens before; each multiplies once a token, as in a matrix."""
    asked = config.mix
    sizes = {"none": 0, "conv": channels * asked.kernel_tokens}
    return sizes.get(asked.kind, asked.rank * (2 * config.width + asked.kernel_tokens))


def _expert(config: ModelConfig) -> tuple[int, int]:
    """Parameters of one routed expert: those of its matrices, and biases."""
    moe = config.moe
    parts, inside = activation_of(moe.activation).parts, moe.latent_width or config.width
    return (parts + 1) * inside * moe.expert_width, (parts * moe.expert_width + inside if moe.expert_bias else 0)


def _beside(config: ModelConfig) -> tuple[int, int]:
    """Parameters of a mixture-of-experts layer beside its routed experts: those of its matrices, and biases."""
    moe, width = config.moe, config.width
    routers = {"hash": 0, "noisy_topk": 2}.get(moe.router, 1)  # matrices [E, D]
    shared, biases = _dense(config, moe.shared_expert_width)
    matrices = routers * width * moe.num_experts + shared
    matrices += 2 * width * moe.latent_width if moe.latent_width else 0
    matrices += width if moe.shared_expert_gate else 0
    return matrices, biases + (moe.num_experts if moe.router_bias else 0)


def _attention(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the attention of one block: those of its matrices, and biases, norms and sinks."""
    asked, width = config.attention, config.head_width
    beside = (config.width if asked.output_bias else 0) + (config.num_heads if asked.sinks else 0)
    if asked.kind == "latent":
        matrices, norms = _latent_attention(config)
        return matrices, norms + beside
    query, kv = config.num_heads * width, config.num_kv_heads * width
    vectors = (query + 2 * kv if asked.qkv_bias else 0) + {"none": 0, "head": 2 * width, "whole": query + kv}[
        asked.qk_norm
    ]
    return config.width * (2 * query + 2 * kv), vectors + beside


def _latent_attention(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the matrices and the norms of latent attention."""
    latent, heads, rank = config.attention.latent, config.num_heads, config.attention.latent.query_rank
    query = heads * (config.head_width + latent.rope_width)
    matrices = config.width * query if rank is None else rank * (config.width + query)
    matrices += config.width * (latent.kv_rank + latent.rope_width)
    matrices += latent.kv_rank * heads * (config.head_width + latent.value_width)
    return matrices + config.width * heads * latent.value_width, latent.kv_rank + (rank or 0)


def _score_and_value_widths(config: ModelConfig) -> tuple[int, int]:
    """Channels of a head that a score is made of, and those of its values."""
    if config.attention.kind == "grouped":
        return config.head_width, config.head_width
    return config.head_width + config.attention.latent.rope_width, config.attention.latent.value_width


def _mean_seen(window: int | None, length: int) -> float:
    """Tokens that a token of a row sees in the mean, as areas: half the row, less what lies before a window."""
    before = 0 if window is None else max(0, length - window)
    return (length - before * before / length) / 2

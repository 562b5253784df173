"""Counting parameters and floating-point operations of the plain model.

A multiply-add is two operations. Matrix products and attention are counted; norms, softmax and the like are not.
Attention is counted causally: half of the S x S scores. Work that a capacity drops is still counted as asked for.
Source: Chowdhery et al. 2022 (PaLM), appendix B, for "model FLOPs" (no recompute), here with the causal half.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.config import ModelConfig
from moe_dist.model.attention import window_of


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in total, and those that take part in one token's forward."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts from the config alone; equal to summing the model's parameters (tested)."""
    moe, width = config.moe, config.width
    attention = sum(_attention(config)) + 2 * width
    inside = moe.latent_width or width
    expert = (3 if moe.activation == "swiglu" else 2) * inside * moe.expert_width
    routers = {"hash": 0, "noisy_topk": 2}.get(moe.router, 1)  # matrices [E, D]
    beside = routers * width * moe.num_experts + 3 * width * moe.shared_expert_width
    beside += 2 * width * moe.latent_width if moe.latent_width else 0
    beside += width if moe.shared_expert_gate else 0
    beside += _router_biases(config)
    dense = 3 * width * config.ffn_width
    sparse_layers = config.num_layers - config.num_dense_layers
    embedding = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    fixed = config.num_layers * attention + config.num_dense_layers * dense + sparse_layers * beside + embedding + width
    return ParameterCounts(
        total=fixed + sparse_layers * moe.num_experts * expert,
        active=fixed + sparse_layers * moe.top_k * expert,
    )


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward operations of one token in a row of `sequence_length` tokens."""
    active = count_parameters(config).active
    norms = config.width * (2 * config.num_layers + 1)
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.width
    biases = (config.num_layers - config.num_dense_layers) * _router_biases(config)
    products = active - norms - lookup - biases - config.num_layers * _attention(config)[1]
    seen = sum(_mean_seen(window_of(config, number), sequence_length) for number in range(config.num_layers))
    return 6.0 * products + 6.0 * config.num_heads * sum(_score_and_value_widths(config)) * seen


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


def _router_biases(config: ModelConfig) -> int:
    """Parameters of the bias of one router; an addition and no product."""
    return config.moe.num_experts if config.moe.router_bias else 0

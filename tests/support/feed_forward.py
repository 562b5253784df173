"""Choices of feed-forwards, norms and positions for small models, in which every option is on somewhere."""

from __future__ import annotations

from typing import Any

_SHAPE = {"num_layers": 3, "num_dense_layers": 1, "num_heads": 4, "num_kv_heads": 2}
MIX: dict[str, dict[str, Any]] = {
    "a convolution in dense and shared feed-forwards, documents apart": {
        "model": {**_SHAPE, "mix": {"kind": "conv", "kernel_tokens": 4}},
        "moe": {"shared_expert_width": 8, "shared_expert_gate": True},
        "data": {"documents": "separate"},
    },
    "adapters beside dense and shared feed-forwards": {
        "model": {**_SHAPE, "mix": {"kind": "adapter", "rank": 4}, "ffn_activation": "relu", "ffn_bias": True},
        "moe": {"shared_expert_width": 8},
    },
}
FEED_FORWARD: dict[str, dict[str, Any]] = {
    "layer norms, gelu with biases, learned positions, experts in every other block": {
        "model": {
            "num_layers": 4,
            "moe_every_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "norm": "layer",
            "ffn_activation": "gelu",
            "ffn_bias": True,
            "positions": "learned",
            "max_positions_tokens": 16,
            "tie_embeddings": False,
        },
        "moe": {"activation": "gelu", "expert_bias": True, "shared_expert_width": 0},
    },
    "centred norms, geglu, clamped experts with biases, a shared expert with biases": {
        "model": {
            "num_layers": 3,
            "num_dense_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "norm": "centred_rms",
            "ffn_activation": "geglu",
            "ffn_bias": True,
        },
        "moe": {"activation": "clamped_swiglu", "expert_bias": True, "shared_expert_width": 8},
    },
    "squared relu everywhere, no positions": {
        "model": {
            "num_layers": 3,
            "num_dense_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_activation": "squared_relu",
            "positions": "none",
        },
        "moe": {"activation": "squared_relu", "shared_expert_width": 8},
    },
    **MIX,
}

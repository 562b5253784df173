"""Choices of attention for small models, in which every option is on somewhere."""

from __future__ import annotations

from typing import Any

# Turns of a head of 8 channels in a context of 8 tokens lie between these bounds.
YARN = {"kind": "yarn", "factor": 4.0, "original_tokens": 8, "beta_fast": 2.0, "beta_slow": 0.25}

ATTENTION: dict[str, dict[str, Any]] = {
    "norms of the whole, biases, sinks, windows, yarn": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "attention": {
            "qk_norm": "whole",
            "qkv_bias": True,
            "output_bias": True,
            "sinks": True,
            "window_tokens": 4,
            "full_every_layers": 2,
        },
        "rope_scaling": {**YARN, "whole_bounds": False},
    },
    "norms of heads, interleaved pairs, a larger base, windows everywhere": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "attention": {"qk_norm": "head", "qkv_bias": True, "window_tokens": 5},
        "rope_pairing": "interleaved",
        "rope_scaling": {"kind": "ntk", "factor": 4.0},
    },
    "latent, compressed queries, temperatures": {
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_width": 6,
        "attention": {
            "kind": "latent",
            "output_bias": True,
            "latent": {"query_rank": 10, "kv_rank": 12, "rope_width": 4, "value_width": 5},
        },
        "rope_pairing": "interleaved",
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "latent, plain queries, sinks, windows, divided positions": {
        "num_heads": 4,
        "num_kv_heads": 4,
        "attention": {
            "kind": "latent",
            "sinks": True,
            "window_tokens": 4,
            "full_every_layers": 2,
            "latent": {"kv_rank": 12, "rope_width": 4, "value_width": 16},
        },
        "rope_scaling": {"kind": "linear", "factor": 4.0},
    },
}

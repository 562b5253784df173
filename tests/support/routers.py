"""The least that each kind of router needs of `model.moe` to be legal, and what makes it show its own way."""

from __future__ import annotations

from typing import Any

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid, groups, bias": {
        "router": "sigmoid_topk",
        "num_groups": 4,
        "groups_per_token": 2,
        "selection_bias": True,
    },
    "switch": {"router": "switch", "top_k": 1, "normalize_gates": False},
    "gshard": {"router": "gshard"},
    "noisy": {"router": "noisy_topk"},
    "expert choice": {
        "router": "expert_choice",
        "normalize_gates": False,
        "capacity_factor": 1.0,
        "capacity_factor_eval": 1.0,
        "balance_loss": 0.0,
    },
    "hash": {"router": "hash", "balance_loss": 0.0, "z_loss": 0.0},
}

"""The user's config cut down to a size at which hundreds of steps take seconds, with every choice of kind kept."""

from __future__ import annotations

import math
from typing import Any

from moe_dist.config import Config, parse_config

_MOST_EXPERTS = 64
# Most of each size; even multiples of 4, so that degrees of 2 and 4 can cut them.
_SIZES = {
    "vocab_size": 264,
    "num_layers": 2,
    "width": 16,
    "num_kv_heads": 4,
    "head_width": 8,
    "ffn_width": 16,
}
_LATENT_SIZES = {"query_rank": 8, "kv_rank": 8, "rope_width": 4, "value_width": 4}
_EXPERT_SIZES = ("expert_width", "shared_expert_width", "latent_width")
_MOST_EXPERT_WIDTH = 8
_MOST_MIX_RANK = 4
_LENGTH_TOKENS, _ROWS = 12, 8
_MOST_WINDOW_TOKENS = 4  # less than a row


def shrunk(config: Config) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """The small config of a proof, and what was changed: (before, after) by key.

    Sizes shrink. Precision is fp64, the optimizer one step of SGD with learning rate 1, and first weights are spread
    so that a narrow router decides firmly. The seed, the router's kind, groups, bias, top_k, capacity, drops, balance,
    the shared expert, tying, activation and clipping stay.
    """
    tree = config.model_dump(mode="json")
    model, moe = tree["model"], tree["model"]["moe"]
    dense = model["num_dense_layers"]
    per_key_head = model["num_heads"] > model["num_kv_heads"]
    for name, most in _SIZES.items():
        model[name] = min(model[name], most)
    model["num_heads"] = model["num_kv_heads"] * (2 if per_key_head else 1)
    asked = model["attention"]
    asked["window_tokens"] = asked["window_tokens"] and min(asked["window_tokens"], _MOST_WINDOW_TOKENS)
    for name, most in _LATENT_SIZES.items():
        asked["latent"][name] = asked["latent"][name] and min(asked["latent"][name], most)
    asked["full_every_layers"] = min(asked["full_every_layers"], model["num_layers"])
    layers, all_dense = model["num_layers"], not config.model.moe_blocks
    model["num_dense_layers"] = layers if all_dense else min(dense, layers - 1)
    if not all_dense:
        model["moe_every_layers"] = min(model["moe_every_layers"], layers - model["num_dense_layers"])
    model["max_positions_tokens"] = min(model["max_positions_tokens"], _LENGTH_TOKENS)
    model["mix"]["rank"] = min(model["mix"]["rank"], _MOST_MIX_RANK)
    model["mix"]["kernel_tokens"] = min(model["mix"]["kernel_tokens"], _MOST_WINDOW_TOKENS)
    model["init_std"] = max(model["init_std"], 0.3)
    for name in _EXPERT_SIZES:
        moe[name] = moe[name] and min(moe[name], _MOST_EXPERT_WIDTH)
    moe["num_experts"] = _experts(moe)
    if moe["backend"] == "grouped":
        moe["backend"] = "auto"  # it has no fp64
    data, train = tree["data"], tree["train"]
    data["sequence_length_tokens"] = min(data["sequence_length_tokens"], _LENGTH_TOKENS)
    train |= {"precision": "fp64", "global_batch_sequences": _ROWS, "micro_batch_sequences": _ROWS}
    train |= {"routing_ledger": "none", "routing_replay": None, "threads_per_rank": 1}
    tree["optimizer"] |= {"lr": 1.0, "warmup_steps": 0, "min_lr_fraction": 1.0}
    # The lattice names a layout and a dispatcher of its own for every cell.
    tree["parallel"] = {name: tree["parallel"][name] for name in ("overlap_chunks", "overlap_gradients")}
    small = parse_config(tree)
    return small, {
        key: (old, new) for key, (old, new) in _changes(config, small) if not key.startswith(("parallel.", "run."))
    }


def _experts(moe: dict[str, Any]) -> int:
    """At most 64 experts, or as few as the groups and the choices of a token need."""
    if moe["num_experts"] <= _MOST_EXPERTS:
        return moe["num_experts"]
    groups = moe["num_groups"]
    in_group = max(_MOST_EXPERTS // groups, math.ceil(moe["top_k"] / moe["groups_per_token"]))
    return groups * in_group


def _changes(before: Config, after: Config) -> list[tuple[str, tuple[Any, Any]]]:
    """Every key whose value differs."""
    old, new = (_leaves(config.model_dump(mode="json")) for config in (before, after))
    return [(key, (old[key], new[key])) for key in old if old[key] != new[key]]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found

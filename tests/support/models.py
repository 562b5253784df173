"""Small models and batches for proofs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_dist.config import Config, parse_config
from moe_dist.model import Transformer
from moe_dist.model.init import initialise

VOCAB, LENGTH = 300, 12


def small_config(moe: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A two-layer decoder of eight experts in fp64, with anything of it replaced."""
    experts = {"num_experts": 8, "top_k": 2, "expert_width": 12, "shared_expert_width": 8, **(moe or {})}
    model = {"vocab_size": VOCAB, "num_layers": 2, "width": 16, "num_heads": 2, "num_kv_heads": 1, "head_width": 8}
    model |= {"init_std": 0.3, "ffn_width": 20, "moe": experts, **sections.pop("model", {})}
    train = {"steps": 8, "precision": "fp64", "global_batch_sequences": 6, **sections.pop("train", {})}
    data = {"sequence_length_tokens": LENGTH, **sections.pop("data", {})}
    return parse_config({"model": model, "train": train, "data": data, **sections})


def dtype_of(config: Config) -> torch.dtype:
    """Type of the weights."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def plain_model(config: Config, seed: int = 0) -> Transformer:
    """The whole model in this process."""
    with torch.device("meta"):
        model = Transformer(config.model)
    initialise(model, seed, torch.device("cpu"), dtype_of(config))
    return model


def random_rows(count: int, seed: int = 1, length: int = LENGTH) -> Tensor:
    """Token rows [count, length + 1]."""
    return torch.randint(0, VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(seed))

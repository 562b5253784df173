"""Rules of the model's own keys that join several of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.attention_rules import attention_rules
from moe_dist.config.model_schema import ModelConfig
from moe_dist.errors import ConfigError


def model_option_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What the options of a model demand of each other."""
    yield from attention_rules(model)
    yield from _mix_rules(model)


def _mix_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What feed-forwards that see the tokens before demand."""
    if model.mix.kind == "none":
        return
    if len(model.moe_blocks) == model.num_layers and not model.moe.shared_expert_width:
        yield ConfigError(
            "model.mix.kind",
            model.mix.kind,
            "is for dense feed-forwards and the shared expert, and this model has neither: a routed expert does not "
            "see a token's neighbours",
            "model.mix.kind=none, or model.moe.shared_expert_width=256, or model.num_dense_layers=1",
        )

"""Rules of the model's own keys that join several of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.attention_rules import attention_rules
from moe_dist.config.model_schema import ModelConfig
from moe_dist.config.section import Section
from moe_dist.errors import ConfigError

# Keys of the model, below `model`, that nothing reads yet. A value other than the default is refused.
_NOT_BUILT = ("mtp_layers",)


def model_option_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """Options that are declared and not built, and what those that are built demand of each other."""
    yield from attention_rules(model)
    yield from _mix_rules(model)
    plain = type(model)()
    for path in _NOT_BUILT:
        value, default = _value(model, path), _value(plain, path)
        if value != default:
            yield ConfigError(f"model.{path}", value, "is not built yet", f"model.{path}={default}")


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


def _value(section: Section, path: str) -> object:
    found: object = section
    for name in path.split("."):
        found = getattr(found, name)
    return found

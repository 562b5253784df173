"""Rules of the model's own keys that join several of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.attention_rules import attention_rules
from moe_dist.config.model_schema import ModelConfig
from moe_dist.config.section import Section
from moe_dist.errors import ConfigError

# Keys of the model, below `model`, that nothing reads yet. A value other than the default is refused.
_NOT_BUILT = (
    "mix.kind",
    "mtp_layers",
)


def model_option_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """Options that are declared and not built, and what those that are built demand of each other."""
    yield from attention_rules(model)
    plain = type(model)()
    for path in _NOT_BUILT:
        value, default = _value(model, path), _value(plain, path)
        if value != default:
            yield ConfigError(f"model.{path}", value, "is not built yet", f"model.{path}={default}")


def _value(section: Section, path: str) -> object:
    found: object = section
    for name in path.split("."):
        found = getattr(found, name)
    return found

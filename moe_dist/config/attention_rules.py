"""Rules of the keys of attention and of the rotary embedding that join several of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.model_schema import ModelConfig
from moe_dist.errors import ConfigError


def attention_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What options of attention demand of each other."""
    asked = model.attention
    if asked.full_every_layers and asked.window_tokens is None:
        yield ConfigError(
            "model.attention.full_every_layers",
            asked.full_every_layers,
            "says which blocks have no window; without model.attention.window_tokens none has one",
            "model.attention.full_every_layers=0, or model.attention.window_tokens=128",
        )
    if asked.full_every_layers == 1:
        yield ConfigError(
            "model.attention.full_every_layers",
            1,
            "with 1 no block has the window that model.attention.window_tokens asks for",
            "model.attention.full_every_layers=2, or model.attention.window_tokens=null",
        )
    yield from _scaling_rules(model)


def _scaling_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What stretching the rotary embedding demands."""
    scaling = model.rope_scaling
    plain = type(scaling)()
    read = {"none": (), "linear": ("factor",), "ntk": ("factor",)}.get(scaling.kind)
    for name in type(scaling).model_fields:
        value = getattr(scaling, name)
        if read is not None and name not in ("kind", *read) and value != getattr(plain, name):
            yield ConfigError(
                f"model.rope_scaling.{name}",
                value,
                f"is not read with model.rope_scaling.kind={scaling.kind}",
                f"model.rope_scaling.{name}={_written(getattr(plain, name))}",
            )
    if scaling.kind == "ntk" and model.head_width < 4:
        yield ConfigError(
            "model.rope_scaling.kind",
            "ntk",
            f"stretches the base by what the slowest of several pairs needs; a head turns {model.head_width} channels",
            "model.rope_scaling.kind=linear",
        )
    if scaling.kind != "yarn":
        return
    if scaling.beta_slow >= scaling.beta_fast:
        yield ConfigError(
            "model.rope_scaling.beta_slow",
            scaling.beta_slow,
            f"must be less than model.rope_scaling.beta_fast ({scaling.beta_fast})",
            f"model.rope_scaling.beta_slow={scaling.beta_fast / 2}",
        )
    if (scaling.mscale is None) != (scaling.mscale_all_dim is None):
        yield ConfigError(
            "model.rope_scaling.mscale",
            scaling.mscale,
            f"goes with model.rope_scaling.mscale_all_dim ({scaling.mscale_all_dim}): both or none",
            f"model.rope_scaling.mscale={'null' if scaling.mscale_all_dim is None else scaling.mscale_all_dim}",
        )
    if scaling.mscale_all_dim is not None and model.attention.kind != "latent":
        yield ConfigError(
            "model.rope_scaling.mscale_all_dim",
            scaling.mscale_all_dim,
            f"is read by latent attention only; model.attention.kind is {model.attention.kind}",
            "model.rope_scaling.mscale_all_dim=null model.rope_scaling.mscale=null",
        )


def _written(value: object) -> str:
    """A value as it is written in an override."""
    return "null" if value is None else str(value).lower()

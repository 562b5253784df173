"""Rules of the keys of attention and of the rotary embedding that join several of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.model_schema import ModelConfig
from moe_dist.errors import ConfigError


def attention_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What options of attention demand of each other."""
    asked = model.attention
    name = "model.attention.latent.rope_width" if asked.kind == "latent" else "model.head_width"
    turned = asked.latent.rope_width if asked.kind == "latent" else model.head_width
    if turned % 2:
        rule = "must be even: the rotary embedding turns pairs of channels"
        yield ConfigError(name, turned, rule, f"{name}={turned + 1}")
    if asked.kind == "latent":
        yield from _latent_rules(model)
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
    yield from _scaling_rules(model, turned)


def _latent_rules(model: ModelConfig) -> Iterator[ConfigError]:
    """What latent attention has no place for."""
    asked = model.attention
    if model.num_kv_heads != model.num_heads:
        yield ConfigError(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"latent attention makes keys and values for each of model.num_heads ({model.num_heads})",
            f"model.num_kv_heads={model.num_heads}",
        )
    if asked.qk_norm != "none":
        yield ConfigError(
            "model.attention.qk_norm",
            asked.qk_norm,
            "latent attention norms what queries, keys and values are made from, and not these",
            "model.attention.qk_norm=none",
        )
    if asked.qkv_bias:
        yield ConfigError(
            "model.attention.qkv_bias",
            True,
            "the projections of latent attention have no bias",
            "model.attention.qkv_bias=false",
        )


def _scaling_rules(model: ModelConfig, turned: int) -> Iterator[ConfigError]:
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
    if scaling.kind == "ntk" and turned < 4:
        yield ConfigError(
            "model.rope_scaling.kind",
            "ntk",
            f"stretches the base by what the slowest of several pairs needs; a head turns {turned} channels",
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
    weights = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    given = [name for name, value in weights.items() if value is not None]
    for name in given if model.attention.kind != "latent" else ():
        yield ConfigError(
            f"model.rope_scaling.{name}",
            weights[name],
            f"is read by latent attention only; model.attention.kind is {model.attention.kind}",
            f"model.rope_scaling.{name}=null",
        )
    if len(given) == 1 and model.attention.kind == "latent":
        (other,) = weights.keys() - given
        yield ConfigError(
            f"model.rope_scaling.{other}",
            None,
            f"goes with model.rope_scaling.{given[0]} ({weights[given[0]]}): both or none",
            f"model.rope_scaling.{other}={weights[given[0]]}",
        )


def _written(value: object) -> str:
    """A value as it is written in an override."""
    return "null" if value is None else str(value).lower()

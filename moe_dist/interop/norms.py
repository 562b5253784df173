"""From a pre-LN model to the same function with RMSNorm, or with CRMSNorm of one channel less.

Shape letters: D width, V vocabulary, L experts, F inner width.

LayerNorm takes the mean off what RMSNorm takes as it is: on vectors of mean zero they are equal, but for the bias. So

    what writes into the residual stream   loses its mean over the D channels: embedding, positions, output, down
    the norm's bias b                      goes into the bias of every map that reads it: W x + (W b + bias)

and then its mean is zero everywhere, and the stream itself was only moved along (1, ..., 1), which no LayerNorm sees.
For CRMSNorm the last channel, minus the sum of the others, is not kept: it leaves what writes, and a map that reads,
with the norm's weight w taken into it (U = W diag(w)), becomes `U[:, :-1] - U[:, -1:]`.

The embedding cannot stay tied to the output projection, which reads the normed stream and keeps its mean.
Source: Jiang et al. 2023 (arXiv 2305.14858), sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.errors import ConfigError

_WRITERS = ("embedding.weight", "positions.weight", "down_bias", "experts.down", "attention.output.bias", "down.bias")
_WRITING_MATRICES = ("attention.output.weight", "down.weight")  # [D, in]: the others have D last


def without_layer_norm(
    config: ModelConfig, weights: Mapping[str, Tensor], kind: Literal["rms", "centred_rms"]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of a model that computes the same logits without LayerNorm.

    Args:
        config: Of a model with `norm: layer`.
        weights: Its parameters and buffers by name, experts stacked; these stay as they are.
        kind: The norm of the new model; `centred_rms` makes it one channel narrower.

    Raises:
        ConfigError: Something that reads a normed vector has no place for the norm's bias.
    """
    for error in _hindrances(config, weights):
        raise error
    new = {name: value.clone() for name, value in weights.items()}
    new.setdefault("output.weight", weights["embedding.weight"].clone())
    for name in list(new):
        if name.endswith(_WRITERS):
            new[name] -= new[name].mean(-1, keepdim=True)
        elif name.endswith(_WRITING_MATRICES):
            new[name] -= new[name].mean(0, keepdim=True)
    for norm, readers in _readers(config):
        weight_D, bias_D = new[f"{norm}.weight"], new.pop(f"{norm}.bias")
        for matrix, bias in readers:
            if bias is not None:
                new[bias] = new.get(bias, 0) + new[matrix] @ bias_D
            if kind == "centred_rms":
                scaled = new[matrix] * weight_D
                new[matrix] = scaled[..., :-1] - scaled[..., -1:]
        if kind == "centred_rms":
            new[f"{norm}.weight"] = torch.ones_like(weight_D[:-1])
    for name in list(new) if kind == "centred_rms" else ():
        if name.endswith(_WRITERS):
            new[name] = new[name][..., :-1].clone()
        elif name.endswith(_WRITING_MATRICES):
            new[name] = new[name][:-1].clone()
    changed = _changed(config, kind)
    _fill_biases(changed, new)
    return changed, new


def _changed(config: ModelConfig, kind: str) -> ModelConfig:
    """With a place for every bias."""
    update: dict[str, Any] = {"norm": kind, "tie_embeddings": False, "ffn_bias": True}
    update["width"] = config.width - (kind == "centred_rms")
    update["attention"] = config.attention.model_copy(update={"qkv_bias": True})
    if config.moe_blocks:
        update["moe"] = config.moe.model_copy(update={"router_bias": True, "expert_bias": True})
    return config.model_copy(update=update)


def _fill_biases(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """What the new model has beside the biases that something went into: those of the second products, 0."""
    for name in list(weights):
        if name.endswith("down.weight"):
            bias = f"{name.removesuffix('weight')}bias"
            weights.setdefault(bias, weights[name].new_zeros(config.width))
        elif name.endswith("experts.down"):
            weights.setdefault(f"{name}_bias", weights[name].new_zeros(len(weights[name]), config.width))


def _readers(config: ModelConfig) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Every norm, and the (matrix, bias) of what reads it; matrices have D last."""
    gated = ("swiglu", "geglu", "clamped_swiglu")
    dense = "gate_up" if config.ffn_activation in gated else "up"
    stacked = "gate_up" if config.moe.activation in gated else "up"
    for block in range(config.num_layers):
        at, inside = f"blocks.{block}.attention", f"blocks.{block}.feed_forward"
        yield f"{at}_norm", [(f"{at}.{name}.weight", f"{at}.{name}.bias") for name in ("query", "key", "value")]
        if not config.has_experts(block):
            yield f"{inside}_norm", [(f"{inside}.{dense}.weight", f"{inside}.{dense}.bias")]
            continue
        readers: list[tuple[str, str | None]] = [(f"{inside}.router.weight", f"{inside}.router.bias")]
        readers.append((f"{inside}.experts.{stacked}", f"{inside}.experts.{stacked}_bias"))
        if config.moe.shared_expert_width:
            readers.append((f"{inside}.shared.{dense}.weight", f"{inside}.shared.{dense}.bias"))
        yield f"{inside}_norm", readers
    yield "final_norm", [("output.weight", None)]


def _hindrances(config: ModelConfig, weights: Mapping[str, Tensor]) -> Iterator[ConfigError]:
    no_bias = "reads a normed vector and has no bias that the norm's could go into"
    wanted: list[tuple[str, object, tuple[object, ...], str]] = [
        ("norm", config.norm, ("layer",), "LayerNorm is what is replaced"),
        ("attention.kind", config.attention.kind, ("grouped",), no_bias),
        ("mix.kind", config.mix.kind, ("none", "conv"), no_bias),
    ]
    if config.moe_blocks:
        moe = config.moe
        wanted += [
            ("moe.router", moe.router, ("softmax_topk", "sigmoid_topk"), no_bias),
            ("moe.weigh", moe.weigh, ("output",), "a gate weight on what an expert receives is not on its bias"),
            ("moe.latent_width", moe.latent_width, (None,), no_bias),
            ("moe.shared_expert_gate", moe.shared_expert_gate, (False,), no_bias),
            (
                "moe.input_jitter",
                moe.input_jitter,
                (0.0,),
                "it multiplies the norm's bias, too",
            ),
        ]
    for name, value, allowed, rule in wanted:
        if value not in allowed:
            yield ConfigError(f"model.{name}", value, rule, f"a model with model.{name}={allowed[0]}")
    if config.norm == "layer" and weights["final_norm.bias"].any():
        rule = "the output projection, which reads it, has no bias that it could go into"
        yield ConfigError("final_norm.bias", "not 0", rule, "a model whose last norm has no bias")

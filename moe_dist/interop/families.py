"""The families that are carried: their names of tensors, and the parts of their config.json.

A family holds a model exactly if reading what it writes gives the same model. `write_fields` asks just that, so that an
option which a family lacks is never lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moe_dist.config.model_schema import ModelConfig
from moe_dist.errors import ExchangeError
from moe_dist.interop import names
from moe_dist.interop.hub_config import Fields, put
from moe_dist.interop.names import Table
from moe_dist.interop.parts import (
    Always,
    BestExpertGroups,
    Biases,
    ConstantGate,
    Dense,
    Fixed,
    Heads,
    LatentHeads,
    NoWindows,
    Pairing,
    Part,
    Predictors,
    Rope,
    Row,
    SharedExperts,
    SparseSteps,
    Tree,
    Windows,
)


@dataclass(frozen=True)
class Family:
    """One `model_type` of the hub.

    Attributes:
        model_type: Its name in config.json.
        architecture: The class that transformers, vLLM and SGLang know it by.
        table: Our tensors by theirs.
        parts: Of its config.json, in the order in which they are read.
    """

    model_type: str
    architecture: str
    table: Table
    parts: tuple[Part, ...]


_NO_DROPOUT = Fixed("attention_dropout", (0.0, 0))
_SIZES: tuple[Part, ...] = (
    Row("vocab_size", "vocab_size"),
    Row("hidden_size", "width"),
    Row("num_hidden_layers", "num_layers"),
    Row("tie_word_embeddings", "tie_embeddings", False),
    Fixed("hidden_act", ("silu", "swish")),
    _NO_DROPOUT,
)
_EPS = Row("rms_norm_eps", "norm_eps")
_TOP_K = Row("num_experts_per_tok", "moe.top_k")
_SOFTMAX = Always({"moe.router": "softmax_topk", "moe.shared_expert_width": 0})
_EXPERTS = Row("num_experts", "moe.num_experts", also="num_local_experts")
_LOCAL_EXPERTS = Row("num_local_experts", "moe.num_experts")
_MIXTRAL_WIDTHS = Row("intermediate_size", "moe.expert_width")
_LATENT: tuple[Part, ...] = (
    *_SIZES,
    LatentHeads(),
    Rope(),
    Always({"attention.kind": "latent", "norm_eps": 1e-6}),
    Fixed("rms_norm_eps", (1e-6,)),  # the norms inside attention have no other
    Row("q_lora_rank", "attention.latent.query_rank", None),
    Row("kv_lora_rank", "attention.latent.kv_rank"),
    Row("qk_nope_head_dim", "head_width"),
    Row("qk_rope_head_dim", "attention.latent.rope_width"),
    Row("v_head_dim", "attention.latent.value_width"),
    Row("first_k_dense_replace", "num_dense_layers", 0),
    Row("intermediate_size", "ffn_width"),
    Row("n_routed_experts", "moe.num_experts"),
    Row("routed_scaling_factor", "moe.gate_scale", 1.0),
    SharedExperts(),
    _TOP_K,
    Fixed("attention_bias", (False,)),
    Fixed("mlp_bias", (None, False)),
    Fixed("moe_layer_freq", (1,)),
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    names.LLAMA,
    (*_SIZES, _EPS, Heads(), Biases(), Rope(), Dense(), Fixed("mlp_bias", (False,))),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    names.QWEN3,
    (*_SIZES, _EPS, Heads(), Biases(), Rope(), NoWindows(), Dense(), Always({"attention.qk_norm": "head"})),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    names.QWEN3_MOE,
    (
        *_SIZES,
        _EPS,
        Heads(),
        Biases(),
        Rope(),
        NoWindows(),
        SparseSteps(),
        Row("intermediate_size", "ffn_width"),
        _EXPERTS,
        Row("moe_intermediate_size", "moe.expert_width"),
        Row("norm_topk_prob", "moe.normalize_gates", False),
        _TOP_K,
        ConstantGate(),
        _SOFTMAX,
        Always({"attention.qk_norm": "head"}),
    ),
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    names.MIXTRAL,
    (
        *_SIZES,
        _EPS,
        Heads(),
        Rope(1e6),
        Row("sliding_window", "attention.window_tokens", None),
        _LOCAL_EXPERTS,
        _MIXTRAL_WIDTHS,
        _TOP_K,
        _SOFTMAX,
        Always({"moe.normalize_gates": True}),
        Fixed("router_jitter_noise", (0.0, 0)),
    ),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    names.QWEN3_MOE,
    (
        *_SIZES,
        _EPS,
        Heads(),
        Biases(),
        Rope(),
        _EXPERTS,
        _MIXTRAL_WIDTHS,
        Row("norm_topk_prob", "moe.normalize_gates", False),
        _TOP_K,
        _SOFTMAX,
        Always({"attention.qk_norm": "whole"}),
        Fixed("clip_qkv", ()),
    ),
)
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    names.GPT_OSS,
    (
        *_SIZES,
        _EPS,
        Heads(),
        Rope(150_000.0),
        Windows(),
        _LOCAL_EXPERTS,
        _MIXTRAL_WIDTHS,
        _TOP_K,
        _SOFTMAX,
        Fixed("attention_bias", (True,)),
        Fixed("swiglu_limit", (7.0,)),
        Fixed("swiglu_alpha", (1.702,)),
        Always({"attention.qkv_bias": True, "attention.output_bias": True, "attention.sinks": True}),
        Always({"moe.router_bias": True, "moe.expert_bias": True, "moe.activation": "clamped_swiglu"}),
        Always({"moe.normalize_gates": True}),
    ),
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    names.DEEPSEEK,
    (
        *_LATENT,
        Always({"rope_pairing": "interleaved", "moe.router": "softmax_topk", "moe.normalize_gates": False}),
        BestExpertGroups(),
        Fixed("scoring_func", ("softmax",)),
        Fixed("norm_topk_prob", (False,)),
    ),
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    names.DEEPSEEK,
    (
        *_LATENT,
        Pairing(),
        Predictors(),
        Row("n_group", "moe.num_groups", 1),
        Row("topk_group", "moe.groups_per_token", 1),
        Row("norm_topk_prob", "moe.normalize_gates", True),
        Always({"moe.router": "sigmoid_topk", "moe.selection_bias": True}),
        Fixed("topk_method", ("noaux_tc",)),
        Fixed("scoring_func", ("sigmoid",)),
    ),
)
FAMILIES = (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)

# What only training reads, and what none but learned positions read.
_TRAINING = ("init_std", "max_positions_tokens")
_MOE_TRAINING = (
    "backend", "balance_loss", "balance_scope", "bias_update_rate", "capacity_factor", "capacity_group", "drop_policy",
    "global_balance", "group_balance_loss", "input_jitter", "min_capacity", "pad_to_capacity", "recompute_experts",
    "renormalize_after_drop", "z_loss",
)  # fmt: skip


def family_of(model_type: object, where: str) -> Family:
    """A family by its name.

    Raises:
        ExchangeError: It is none that is carried.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ExchangeError(where, f"{model_type!r}"[:200], f"one of the families that are carried: {known}", _OTHER)


def read_fields(family: Family, tree: Mapping[str, Any], where: str, ignored: Iterable[str] = ()) -> Tree:
    """The plain tree of our model section, from a config.json; balance terms are off, as in a plain forward pass.

    Raises:
        ExchangeError: A field that may change the mathematics is not carried, not known or missing.
    """
    fields, ours = _read(family, tree, where)
    fields.finish(ignored)
    put(ours, "moe.balance_loss", 0.0)
    put(ours, "moe.z_loss", 0.0)
    return ours


def other_fields(family: Family, tree: Mapping[str, Any]) -> Tree:
    """Those of a config.json that do not say what the model is."""
    return _read(family, tree, "config.json")[0].left


def _read(family: Family, tree: Mapping[str, Any], where: str) -> tuple[Fields, Tree]:
    fields = Fields(tree, where)
    if fields.left.pop("quantization_config", None):
        fix = "a directory of bf16 weights (transformers and the model's own scripts make one)"
        raise fields.error("quantization_config", tree["quantization_config"], "weights are plain float numbers", fix)
    ours: Tree = {}
    for part in family.parts:
        part.read(fields, ours)
    return fields, ours


def write_fields(family: Family, model: ModelConfig) -> Tree:
    """The fields of config.json that say what a model is.

    Raises:
        ExchangeError: The family has no such model; the first key that it would lose is named.
    """
    theirs: Tree = {"architectures": [family.architecture], "model_type": family.model_type}
    for part in family.parts:
        part.write(model, theirs)
    try:
        again = ModelConfig.model_validate(read_fields(family, theirs, family.model_type))
    except (ExchangeError, ValidationError) as error:
        rule = f"the family {family.model_type} has such models"
        raise ExchangeError("model", str(error).splitlines()[0][:200], rule, _OTHER) from None
    asked, kept = _leaves(_essence(model)), _leaves(_essence(again))
    for path in sorted(asked.keys() | kept.keys()):
        if asked.get(path) != kept.get(path):
            rule = f"models of the family {family.model_type} have {kept.get(path)}"
            raise ExchangeError(f"model.{path}", asked.get(path), rule, _OTHER)
    return theirs


_OTHER = "another --family, or docs/interop.md for what is carried"


def _essence(model: ModelConfig) -> Tree:
    """The keys that the mathematics of this model reads outside training."""
    tree = model.model_dump()
    sparse = (model.num_layers - model.num_dense_layers) // model.moe_every_layers > 0
    dropped = list(_TRAINING)
    if not sparse:
        dropped += ["moe"]
    if model.num_dense_layers == 0 and model.moe_every_layers == 1:
        dropped += ["ffn_width"]
    for name in dropped:
        del tree[name]
    for name in _MOE_TRAINING if sparse else ():
        del tree["moe"][name]
    if sparse and model.moe.num_groups == 1:
        del tree["moe"]["group_score_experts"]
    if model.attention.kind != "latent":
        del tree["attention"]["latent"]
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    found: Tree = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found

"""Which of their tensors each of ours is made of: tables from our global names to theirs.

`{n}` is the number of a block and `{e}` that of an expert. A name of theirs that ends in `[e]` means row e of
a tensor in which all experts are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.errors import ExchangeError
from moe_dist.interop.forms import ALTERNATING, ALTERNATING_COLUMNS, GATE_AND_UP, SAME, TRANSPOSED, Form

Table = dict[str, tuple[tuple[str, ...], Form]]


@dataclass(frozen=True)
class Key:
    """One of their tensors, or one row of it."""

    name: str
    row: int | None = None


@dataclass(frozen=True)
class Source:
    """What one of our tensors is made of."""

    keys: tuple[Key, ...]
    form: Form


def source_of(name: str, table: Table, family: str) -> Source:
    """What our tensor is made of.

    Raises:
        ExchangeError: The family has no such tensor.
    """
    block, expert = re.match(r"blocks\.(\d+)\.", name), re.search(r"#(\d+)\Z", name)
    line = re.sub(r"\Ablocks\.\d+\.", "blocks.{n}.", name)
    line = re.sub(r"#\d+\Z", "#{e}", line)
    if line not in table:
        raise ExchangeError(name, "no tensor of theirs", f"the family {family} holds every tensor of the model", _OTHER)
    theirs, form = table[line]
    numbers = {"n": block and block[1], "e": expert and expert[1]}
    return Source(tuple(_key(pattern, numbers) for pattern in theirs), form)


_OTHER = "another --family, or a model with the options of this one (docs/interop.md)"


def _key(pattern: str, numbers: Mapping[str, str | None]) -> Key:
    stacked = pattern.endswith("[e]")
    name = pattern.removesuffix("[e]").format(**numbers)
    return Key(name, int(numbers["e"] or 0) if stacked else None)


def _same(pairs: Mapping[str, str]) -> Table:
    return {ours: ((theirs,), SAME) for ours, theirs in pairs.items()}


def _in_block(table: Table) -> Table:
    """The same for every block."""
    return {
        f"blocks.{{n}}.{ours}": (tuple(f"model.layers.{{n}}.{name}" for name in theirs), form)
        for ours, (theirs, form) in table.items()
    }


def gated(ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Table:
    """A gated feed-forward of linear maps."""
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    return {f"{ours}.gate_up.weight": ((gate, up), GATE_AND_UP), f"{ours}.down.weight": ((down,), SAME)}


def experts(theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Table:
    """Routed experts, each with tensors of its own."""
    gate, up, down = (f"{theirs}.experts.{{e}}.{name}.weight" for name in names)
    ours = "feed_forward.experts"
    return {f"{ours}.gate_up#{{e}}": ((gate, up), GATE_AND_UP), f"{ours}.down#{{e}}": ((down,), TRANSPOSED)}


_ENDS = _same(
    {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_GROUPED = {
    f"attention.{ours}.{kind}": f"self_attn.{theirs}.{kind}"
    for ours, theirs in _PROJECTIONS.items()
    for kind in ("weight", "bias")
}
_QK_NORM = {
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
}
_ROUTER = {"feed_forward.router.weight": "mlp.gate.weight"}

LLAMA: Table = _ENDS | _in_block(_same(_NORMS | _GROUPED) | gated("feed_forward", "mlp"))
QWEN3: Table = LLAMA | _in_block(_same(_QK_NORM))
QWEN3_MOE: Table = QWEN3 | _in_block(_same(_ROUTER) | experts("mlp"))
MIXTRAL: Table = _ENDS | _in_block(
    _same(_NORMS | _GROUPED | {"feed_forward.router.weight": "block_sparse_moe.gate.weight"})
    | experts("block_sparse_moe", ("w1", "w3", "w2"))
)
GPT_OSS: Table = _ENDS | _in_block(
    _same(_NORMS | _GROUPED)
    | _same(
        {
            "attention.sinks": "self_attn.sinks",
            "feed_forward.router.weight": "mlp.router.weight",
            "feed_forward.router.bias": "mlp.router.bias",
            "feed_forward.experts.down#{e}": "mlp.experts.down_proj[e]",
            "feed_forward.experts.down_bias#{e}": "mlp.experts.down_proj_bias[e]",
        }
    )
    | {
        "feed_forward.experts.gate_up#{e}": (("mlp.experts.gate_up_proj[e]",), ALTERNATING_COLUMNS),
        "feed_forward.experts.gate_up_bias#{e}": (("mlp.experts.gate_up_proj_bias[e]",), ALTERNATING),
    }
)
_LATENT = {
    "attention.query_down.weight": "self_attn.q_a_proj.weight",
    "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query_up.weight": "self_attn.q_b_proj.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
}
_SELECTION_BIAS = {"feed_forward.router.selection_bias": "mlp.gate.e_score_correction_bias"}
DEEPSEEK: Table = _ENDS | _in_block(
    _same(_NORMS | _LATENT | _ROUTER | _SELECTION_BIAS)
    | gated("feed_forward", "mlp")
    | gated("feed_forward.shared", "mlp.shared_experts")
    | experts("mlp")
)

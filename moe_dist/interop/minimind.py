"""MiniMind's `.pth` files: a pickled dict of tensors, read by torch's weights-only loader, in three layouts of names.

    oldest    2024 and early 2025: tok_embeddings, wq, w1; the rotary embedding pairs channels 2c and 2c + 1
    minimind2 from April 2025: names of Llama, shared experts in a list
    minimind3 from 2026: names and mathematics of Qwen3 and Qwen3-MoE

The first two are Llama in their mathematics, with shared experts that no family of the hub has. A file holds no config:
what shapes do not tell (heads, base of the rotary embedding, experts of a token) is MiniMind's own default of then.
Source: the model code of github.com/jingyaogong/minimind, 3ff66f7, d9453ed, 9d89857 and d65ef2c.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ExchangeError
from moe_dist.interop.forms import SAME, joined, turned
from moe_dist.interop.names import LLAMA, QWEN3_MOE, Key, Table, experts, gated
from moe_dist.interop.parts import Tree

_FIX = "a file of model weights as MiniMind's trainers save it (not one to resume from, not LoRA)"
_OLD_NAMES = ("w1", "w3", "w2")
_OLD_BLOCK = {"attention_norm": "attention_norm", "feed_forward_norm": "ffn_norm"}
_OLD_BLOCK |= {"attention.value": "attention.wv", "attention.output": "attention.wo"}


class StateDict:
    """The tensors of a file, mapped into memory where its format allows."""

    def __init__(self, file: Path) -> None:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # noqa: BLE001 - whatever a stranger's pickle makes the loader say
            found = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ExchangeError(str(file), found, "a dict of plain tensors, loaded with weights_only", _FIX) from None
        if not isinstance(held, dict) or not held:
            raise ExchangeError(str(file), type(held).__name__, "a dict of tensors", _FIX)
        for name, value in held.items():
            plain = isinstance(name, str) and isinstance(value, Tensor)
            if not plain or value.layout != torch.strided or not value.is_contiguous():
                raise ExchangeError(f"{file}: {str(name)[:200]}", type(value).__name__, "a plain tensor", _FIX)
        status = file.stat()
        self.seen: Any = [file.name, status.st_size, status.st_mtime_ns]
        self._held: dict[str, Tensor] = held

    def names(self) -> Iterable[str]:
        return self._held

    def shape(self, key: Key) -> tuple[int, ...]:
        return tuple(self._held[key.name].shape)

    def rows(self, name: str) -> int:
        return next(iter(self._held[name].shape), 0)

    def read(self, key: Key) -> Tensor:
        return self._held[key.name]


@dataclass(frozen=True)
class Recognised:
    """What a file is.

    Attributes:
        layout: `oldest`, `minimind2` or `minimind3`.
        table: Our tensors by theirs.
        model: Our model section.
    """

    layout: str
    table: Table
    model: Tree


def recognise(weights: StateDict, heads: int | None) -> Recognised:
    """The layout of a file and the model in it.

    Args:
        weights: The file.
        heads: Query heads, where they are others than MiniMind's own.

    Raises:
        ExchangeError: The names are of none of the three layouts, or shapes do not go together.
    """
    names = set(weights.names())
    if "tok_embeddings.weight" in names:
        return _oldest(weights, names, heads)
    if "model.embed_tokens.weight" not in names:
        raise ExchangeError("names", f"{sorted(names)[:3]}"[:200], "those of one of MiniMind's three layouts", _FIX)
    if "model.layers.0.self_attn.q_norm.weight" in names:
        return _minimind3(weights, names)
    return _minimind2(weights, names, heads)


def _oldest(weights: StateDict, names: set[str], heads: int | None) -> Recognised:
    rows = [_shape(weights, f"layers.0.attention.{name}.weight")[0] for name in ("wq", "wk")]
    early = rows[0] == 2 * rows[1]  # 2024: 16 heads of which two share a key, base 1e4; then 8, four of which do, 1e6
    model = _sizes(weights, names, "tok_embeddings.weight", "layers.")
    model |= _heads(rows, heads or (16 if early else 8)) | {"rope_theta": 1e4 if early else 1e6}
    table: Table = {
        "embedding.weight": (("tok_embeddings.weight",), SAME),
        "final_norm.weight": (("norm.weight",), SAME),
        "output.weight": (("output.weight",), SAME),
    }
    block: Table = {f"{ours}.weight": ((f"{theirs}.weight",), SAME) for ours, theirs in _OLD_BLOCK.items()}
    block["attention.query.weight"] = (("attention.wq.weight",), turned(int(model["num_heads"])))
    block["attention.key.weight"] = (("attention.wk.weight",), turned(int(model["num_kv_heads"])))
    block |= gated("feed_forward", "feed_forward", _OLD_NAMES) | experts("feed_forward", _OLD_NAMES)
    block |= gated("feed_forward.shared", "feed_forward.shared_experts", _OLD_NAMES)
    block["feed_forward.router.weight"] = (("feed_forward.gate.weight",), SAME)
    for ours, (theirs, form) in block.items():
        table[f"blocks.{{n}}.{ours}"] = tuple(f"layers.{{n}}.{name}" for name in theirs), form
    if "layers.0.feed_forward.gate.weight" in names:
        shared = 1 if "layers.0.feed_forward.shared_experts.w1.weight" in names else 0
        model |= _routed(weights, "layers.0.feed_forward", "w1", {"top_k": 2, "shared": shared})
    else:
        model |= _dense(weights, model, "layers.0.feed_forward.w1.weight")
    return Recognised("oldest", table, model)


def _minimind2(weights: StateDict, names: set[str], heads: int | None) -> Recognised:
    rows = [_shape(weights, f"model.layers.0.self_attn.{name}.weight")[0] for name in ("q_proj", "k_proj")]
    model = _sizes(weights, names, "model.embed_tokens.weight", "model.layers.")
    model |= _heads(rows, heads or 8) | {"rope_theta": 1e6}
    table = dict(LLAMA)
    if "model.layers.0.mlp.gate.weight" not in names:
        return Recognised("minimind2", table, model | _dense(weights, model, "model.layers.0.mlp.gate_proj.weight"))
    shared = len({name for name in names if re.match(r"model\.layers\.0\.mlp\.shared_experts\.\d+\.up_proj\.", name)})
    for ours in ("feed_forward.router.weight", "feed_forward.experts.gate_up#{e}", "feed_forward.experts.down#{e}"):
        table[f"blocks.{{n}}.{ours}"] = QWEN3_MOE[f"blocks.{{n}}.{ours}"]
    each = [f"model.layers.{{n}}.mlp.shared_experts.{number}" for number in range(shared)]
    first = [f"{path}.{name}.weight" for name in ("gate_proj", "up_proj") for path in each]
    table["blocks.{n}.feed_forward.shared.gate_up.weight"] = tuple(first), joined(2 * shared)
    down = tuple(f"{path}.down_proj.weight" for path in each)
    table["blocks.{n}.feed_forward.shared.down.weight"] = down, joined(shared, dim=1)
    routed = _routed(weights, "model.layers.0.mlp", "gate_proj", {"top_k": 2, "shared": shared})
    return Recognised("minimind2", table, model | routed)


def _minimind3(weights: StateDict, names: set[str]) -> Recognised:
    rows = [_shape(weights, f"model.layers.0.self_attn.{name}.weight")[0] for name in ("q_proj", "k_proj")]
    width = _shape(weights, "model.layers.0.self_attn.q_norm.weight")[0]
    model = _sizes(weights, names, "model.embed_tokens.weight", "model.layers.")
    model |= _heads(rows, max(1, rows[0] // max(1, width))) | {"rope_theta": 1e6, "norm_eps": 1e-6}
    model["attention"] = {"qk_norm": "head"}
    if "model.layers.0.mlp.gate.weight" in names:
        model |= _routed(weights, "model.layers.0.mlp", "gate_proj", {"top_k": 1, "shared": 0})
    else:
        model |= _dense(weights, model, "model.layers.0.mlp.gate_proj.weight")
    return Recognised("minimind3", QWEN3_MOE, model)


def _sizes(weights: StateDict, names: set[str], embedding: str, blocks: str) -> Tree:
    pattern = re.compile(re.escape(blocks) + r"(\d{1,4})\.")
    numbers = {int(found[1]) for found in map(pattern.match, names) if found}
    vocab, width = _shape(weights, embedding)
    sizes = {"vocab_size": vocab, "width": width, "num_layers": len(numbers), "norm_eps": 1e-5}
    return {**sizes, "tie_embeddings": True, "num_dense_layers": 0}


def _heads(rows: list[int], heads: int) -> Tree:
    width = rows[0] // heads
    if not width or rows[0] % heads or rows[1] % width:
        rule = f"{heads} heads share the rows of the query projection, and as wide ones those of the key projection"
        raise ExchangeError("--heads", f"{rows[0]} and {rows[1]} rows", rule, "--heads as the model was trained with")
    return {"num_heads": heads, "num_kv_heads": rows[1] // width, "head_width": width}


def _dense(weights: StateDict, model: Tree, gate: str) -> Tree:
    return {"num_dense_layers": model["num_layers"], "ffn_width": _shape(weights, gate)[0]}


def _routed(weights: StateDict, block: str, gate: str, told: dict[str, int]) -> Tree:
    count = _shape(weights, f"{block}.gate.weight")[0]
    width = _shape(weights, f"{block}.experts.0.{gate}.weight")[0]
    moe = {"num_experts": count, "expert_width": width, "top_k": told["top_k"], "router": "softmax_topk"}
    moe |= {"shared_expert_width": told["shared"] * width, "normalize_gates": True, "balance_loss": 0.0, "z_loss": 0.0}
    return {"moe": {**moe, "constant_gate": told["top_k"] == 1}}


def _shape(weights: StateDict, name: str) -> tuple[int, int]:
    """(rows, columns or 1) of a tensor that must be there, each at most a million.

    Raises:
        ExchangeError: It is not there, or is no such tensor.
    """
    if name not in weights.names():
        raise ExchangeError(name, "missing", "the layout has it", _FIX)
    shape = weights.shape(Key(name))
    if not 1 <= len(shape) <= 2 or not all(1 <= size <= 10**6 for size in shape):
        raise ExchangeError(name, list(shape), "a matrix or vector", _FIX)
    return shape[0], shape[1] if len(shape) == 2 else 1

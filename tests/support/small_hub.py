"""Small hub directories written by hand, without `transformers`: quick to make, and to spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, VOCAB = 16, 300
_CONFIG = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_CONFIG |= {"num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e4}


def _block(number: int) -> dict[str, tuple[int, ...]]:
    heads = {"q_proj": (16, WIDTH), "k_proj": (8, WIDTH), "v_proj": (8, WIDTH), "o_proj": (WIDTH, 16)}
    found: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in heads.items()}
    found |= {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
    return {f"model.layers.{number}.{name}": shape for name, shape in found.items()}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _ends(tied: bool) -> dict[str, tuple[int, ...]]:
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    return ends if tied else ends | {"lm_head.weight": (VOCAB, WIDTH)}


def write_llama(folder: Path, **fields: Any) -> Path:
    """A dense model in one file."""
    shapes = _ends(bool(fields.get("tie_word_embeddings")))
    for number in range(2):
        mlp = {"gate_proj": (20, WIDTH), "up_proj": (20, WIDTH), "down_proj": (WIDTH, 20)}
        shapes |= _block(number) | {f"model.layers.{number}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    folder.mkdir(parents=True)
    save_file(_random(shapes), folder / "model.safetensors", {"format": "pt"})
    config = {**_CONFIG, "model_type": "llama", "intermediate_size": 20, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_mixtral(folder: Path) -> Path:
    """A model of four experts in two files, with an index and files beside."""
    ends, files = _ends(tied=False), [{}, {}]
    for number in range(2):
        moe = f"model.layers.{number}.block_sparse_moe"
        shapes = _block(number) | {f"{moe}.gate.weight": (4, WIDTH)}
        for expert in range(4):
            kinds = {"w1": (12, WIDTH), "w3": (12, WIDTH), "w2": (WIDTH, 12)}
            shapes |= {f"{moe}.experts.{expert}.{kind}.weight": shape for kind, shape in kinds.items()}
        files[number] = _random(shapes | (ends if number else {}))
    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**_CONFIG, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    config |= {"intermediate_size": 12, "eos_token_id": 2, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "run_me.py").write_text("raise SystemExit")
    return folder

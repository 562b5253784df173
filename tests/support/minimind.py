"""MiniMind's three layouts re-stated: random weights by their names, and the forward pass written out.

Shape letters: B batch, S sequence, D width, H heads, G key/value heads, C head width.
Source: the model code of github.com/jingyaogong/minimind at 3ff66f7 (oldest), 9d89857 (minimind2), d65ef2c (minimind3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, VOCAB, LAYERS, INNER, EXPERTS = 32, 300, 2, 20, 4
HEADS = {"oldest": (16, 8), "early2025": (8, 2), "minimind2": (8, 2), "minimind3": (4, 2)}
BASE = {"oldest": 1e4, "early2025": 1e6, "minimind2": 1e6, "minimind3": 1e6}
_OLD = {"self_attn": "attention", "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
_OLD |= {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "input_layernorm": "attention_norm"}
_OLD |= {"post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}


def is_old(layout: str) -> bool:
    return layout in ("oldest", "early2025")


def in_layout(name: str, layout: str) -> str:
    """The newest name in the words of a layout."""
    if not is_old(layout):
        return name
    return ".".join(_OLD.get(word, word) for word in name.removeprefix("model.").split("."))


def random_weights(layout: str, moe: bool) -> dict[str, Tensor]:
    """A state dict as MiniMind saves it: tied embeddings under both names."""
    heads, groups = HEADS[layout]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for number in range(LAYERS):
        block, head = f"model.layers.{number}", WIDTH // heads
        shapes |= {f"{block}.{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
        shapes |= {f"{block}.self_attn.{name}.weight": (count, WIDTH) for name, count in rows.items()}
        shapes[f"{block}.self_attn.o_proj.weight"] = (WIDTH, heads * head)
        if layout == "minimind3":
            shapes |= {f"{block}.self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        places = [f"{block}.mlp"]
        if moe:
            shapes[f"{block}.mlp.gate.weight"] = (EXPERTS, WIDTH)
            places = [f"{block}.mlp.experts.{expert}" for expert in range(EXPERTS)] + _shared(block, layout)
        for place in places:
            shapes |= {f"{place}.gate_proj.weight": (INNER, WIDTH), f"{place}.up_proj.weight": (INNER, WIDTH)}
            shapes[f"{place}.down_proj.weight"] = (WIDTH, INNER)
    generator = torch.Generator().manual_seed(5)
    found = {in_layout(n, layout): 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    found[in_layout("lm_head.weight", layout)] = found[in_layout("model.embed_tokens.weight", layout)]
    return found


def _shared(block: str, layout: str) -> list[str]:
    if is_old(layout):
        return [f"{block}.mlp.shared_experts"]
    return [f"{block}.mlp.shared_experts.{number}" for number in range(2)] if layout == "minimind2" else []


def forward(weights: dict[str, Tensor], layout: str, moe: bool, tokens_BS: Tensor) -> Tensor:
    """Logits [B, S, vocabulary], in fp64."""

    def weight(name: str) -> Tensor:
        return weights[in_layout(f"{name}.weight", layout)].double()

    eps = 1e-6 if layout == "minimind3" else 1e-5
    x_BSD = F.embedding(tokens_BS, weight("model.embed_tokens"))
    for number in range(LAYERS):
        block = f"model.layers.{number}"
        normed = _norm(x_BSD, weight(f"{block}.input_layernorm"), eps)
        x_BSD = x_BSD + _attention(normed, lambda name, at=block: weight(f"{at}.self_attn.{name}"), layout)
        normed = _norm(x_BSD, weight(f"{block}.post_attention_layernorm"), eps)
        x_BSD = x_BSD + (_mixture(normed, weight, block, layout) if moe else _gated(normed, weight, f"{block}.mlp"))
    return _norm(x_BSD, weight("model.norm"), eps) @ weight("model.embed_tokens").T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _attention(x_BSD, weight, layout):
    heads, groups = HEADS[layout]
    batch, length, _ = x_BSD.shape
    query, key, value = (
        (x_BSD @ weight(name).T).view(batch, length, count, -1)
        for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
    )
    if layout == "minimind3":
        query, key = _norm(query, weight("q_norm"), 1e-6), _norm(key, weight("k_norm"), 1e-6)
    query, key = (_turned(part, layout) for part in (query, key))
    key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (key, value))
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = scores + torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value).flatten(2) @ weight("o_proj").T


def _turned(x_BSHC: Tensor, layout: str) -> Tensor:
    """By complex numbers in the oldest layout, as half against half in the others."""
    width = x_BSHC.shape[-1]
    frequency = BASE[layout] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = (torch.arange(x_BSHC.shape[1], dtype=torch.float64)[:, None] * frequency)[:, None]
    if is_old(layout):
        turned = torch.view_as_complex(x_BSHC.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(3)
    first, second = x_BSHC.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_BSHC * torch.cat((angle, angle), -1).cos() + rotated * torch.cat((angle, angle), -1).sin()


def _gated(x, weight, place):
    hidden = F.silu(x @ weight(f"{place}.gate_proj").T) * (x @ weight(f"{place}.up_proj").T)
    return hidden @ weight(f"{place}.down_proj").T


def _mixture(x_BSD, weight, block, layout):
    scores = (x_BSD @ weight(f"{block}.mlp.gate").T).softmax(-1)
    gate, chosen = scores.topk(1 if layout == "minimind3" else 2, dim=-1)
    gate = gate / gate.sum(-1, keepdim=True)
    each = torch.stack([_gated(x_BSD, weight, f"{block}.mlp.experts.{e}") for e in range(EXPERTS)], dim=-2)
    out = (each.gather(-2, chosen[..., None].expand(*chosen.shape, WIDTH)) * gate[..., None]).sum(-2)
    return out + sum(_gated(x_BSD, weight, place) for place in _shared(block, layout))

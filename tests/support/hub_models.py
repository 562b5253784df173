"""Small random models of `transformers`, one of each family that is carried, and their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moe_dist.config import Config, parse_config
from moe_dist.interop.importing import match, write_checkpoint
from moe_dist.interop.origin import open_hub
from tests.support.double import Double
from tests.support.models import LENGTH, VOCAB

_BASE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_BASE, "num_key_value_heads": 2, "head_dim": 6}
_ROUTED = {"num_experts_per_tok": 2, "intermediate_size": 12}
_LATENT = {**_BASE, "num_key_value_heads": 4, "intermediate_size": 20, "moe_intermediate_size": 12}
_LATENT |= {"num_experts_per_tok": 3, "n_routed_experts": 8, "kv_lora_rank": 10, "qk_rope_head_dim": 4}
_LATENT |= {"qk_nope_head_dim": 6, "v_head_dim": 8, "first_k_dense_replace": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
_YARN |= {"beta_fast": 4.0, "beta_slow": 0.5}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "intermediate_size": 20, "attention_bias": True, "rms_norm_eps": 1e-5},
    "qwen3": {**_GROUPED, "intermediate_size": 20, "tie_word_embeddings": True},
    "mixtral": {**_GROUPED, **_ROUTED, "num_local_experts": 8, "sliding_window": 5},
    "qwen3_moe": {
        **_GROUPED,
        **_ROUTED,
        "moe_intermediate_size": 10,
        "num_experts": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    },
    # With a padding id their embedding keeps the gradient of that row at zero.
    "olmoe": {**_BASE, **_ROUTED, "num_key_value_heads": 2, "num_experts": 8, "pad_token_id": None},
    "gpt_oss": {
        **_GROUPED,
        **_ROUTED,
        "num_local_experts": 8,
        "sliding_window": 4,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "deepseek_v2": {
        **_LATENT,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_LATENT,
        "q_lora_rank": 14,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
}
SPARSE = [name for name in CONFIGS if name not in ("llama", "qwen3")]


def save_hub(family: str, folder: Path, dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    """A random model, saved as `transformers` saves it; biases, sinks and norms are random too."""
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(7)
    with Double():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(8)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            noise = torch.randn(value.shape, generator=generator).to(torch.bfloat16)  # any type of file holds it
            value.data = 1 + 0.1 * noise.double() if name.endswith("norm.weight") else 0.3 * noise.double()
            value.data = value.data.to(torch.bfloat16).double()
    model.tie_weights()
    model.to(dtype)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.data = value.data.to(torch.promote_types(dtype, torch.float32))  # as on the hub
    model.save_pretrained(folder, **more)
    return model.eval()


def hub_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of an fp64 model."""
    with Double(), torch.no_grad():
        return model(tokens, use_cache=False).logits


def hub_steps(model: PreTrainedModel, batches: list[Tensor], lr: float) -> list[float]:
    """Losses of steps of plain SGD on rows of tokens; balance terms are off."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for rows in batches:
        with Double():
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bring_in(hub: Path, root: Path, precision: str = "fp64", **model: Any) -> tuple[Config, Path]:
    """Imports a directory; returns the config and the checkpoint. `model` replaces keys of the model section's moe."""
    with open_hub(hub) as origin:
        section = {**origin.model, "moe": {**origin.model.get("moe", {}), **model}}
        train = {"precision": precision, "global_batch_sequences": 6, "steps": 10, "clip_norm": None}
        optimizer = {"lr": 0.1, "warmup_steps": 0, "min_lr_fraction": 1.0}
        data = {"sequence_length_tokens": LENGTH}
        config = parse_config({"model": section, "train": train, "optimizer": optimizer, "data": data})
        sources = match(origin.weights, config.model, origin.table, origin.name)
        return config, write_checkpoint(root, config, origin.weights, sources, origin.name, parts=2)[0]


def ours_of(hub: Path, config: Config) -> dict[str, Tensor]:
    """Our tensors, made of a directory's, by global name."""
    with open_hub(hub) as origin:
        sources = match(origin.weights, config.model, origin.table, origin.name)
        return {name: s.form.ours([origin.weights.read(k) for k in s.keys]).clone() for name, s in sources.items()}

"""Our attention against that of `transformers`, with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from moe_dist.config import ModelConfig
from moe_dist.model.attention import Attention, window_of
from moe_dist.model.latent_attention import LatentAttention
from moe_dist.model.places import places_of
from moe_dist.model.rope import frequencies, rope_table
from tests.support.models import small_config
from tests.support.tolerances import assert_close

WIDTH, HEADS, KV_HEADS, HEAD, LENGTH, WINDOW = 32, 4, 2, 8, 24, 5
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
YARN = {"factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5}
OUR_YARN = {"kind": "yarn", "original_tokens": 16, **YARN}
THEIR_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 16, **YARN}
OUR_NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
OUR_NAMES |= {"q_norm": "query_norm", "k_norm": "key_norm", "q_a_proj": "query_down", "q_a_layernorm": "query_norm"}
OUR_NAMES |= {
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up",
}
LATENT = {"kv_rank": 12, "rope_width": HEAD, "value_width": 6}
THEIR_LATENT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 12}
THEIR_LATENT |= {"qk_rope_head_dim": HEAD, "qk_nope_head_dim": 10, "v_head_dim": 6}
OUR_LATENT = {"num_kv_heads": HEADS, "head_width": 10, "norm_eps": 1e-6}


def plain_rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, **more}


# name: (their module, their config, our attention section, our other keys, number of the block)
FAMILIES: dict[str, tuple[Any, PretrainedConfig, dict[str, Any], dict[str, Any], int]] = {
    "Llama, linear": (
        (modeling_llama.LlamaAttention, modeling_llama.LlamaRotaryEmbedding),
        LlamaConfig(**SIZES, rope_parameters=plain_rope(rope_type="linear", factor=4.0)),
        {},
        {"rope_scaling": {"kind": "linear", "factor": 4.0}},
        0,
    ),
    "Qwen2": (
        (modeling_qwen2.Qwen2Attention, modeling_qwen2.Qwen2RotaryEmbedding),
        Qwen2Config(**SIZES, rope_parameters=plain_rope()),
        {"qkv_bias": True},
        {},
        0,
    ),
    "Qwen3": (
        (modeling_qwen3.Qwen3Attention, modeling_qwen3.Qwen3RotaryEmbedding),
        Qwen3Config(**SIZES, rope_parameters=plain_rope(), rms_norm_eps=1e-5),
        {"qk_norm": "head"},
        {},
        0,
    ),
    "OLMoE": (
        (modeling_olmoe.OlmoeAttention, modeling_olmoe.OlmoeRotaryEmbedding),
        OlmoeConfig(**SIZES, rope_parameters=plain_rope(), rms_norm_eps=1e-5),
        {"qk_norm": "whole"},
        {},
        0,
    ),
    **{
        f"gpt-oss, block {number}": (
            (modeling_gpt_oss.GptOssAttention, modeling_gpt_oss.GptOssRotaryEmbedding),
            GptOssConfig(
                **SIZES,
                num_hidden_layers=2,
                sliding_window=WINDOW,
                rope_parameters={**THEIR_YARN, "truncate": False},
                attention_bias=True,
            ),
            {
                "qkv_bias": True,
                "output_bias": True,
                "sinks": True,
                "window_tokens": WINDOW,
                "full_every_layers": 2,
            },
            {"rope_scaling": {**OUR_YARN, "whole_bounds": False}},
            number,
        )
        for number in (0, 1)
    },
    "DeepSeek-V2, temperatures": (
        (modeling_deepseek_v2.DeepseekV2Attention, modeling_deepseek_v2.DeepseekV2RotaryEmbedding),
        DeepseekV2Config(
            **THEIR_LATENT, q_lora_rank=14, rope_parameters={**THEIR_YARN, "mscale": 0.707, "mscale_all_dim": 0.9}
        ),
        {"kind": "latent", "latent": {**LATENT, "query_rank": 14}},
        {
            **OUR_LATENT,
            "rope_pairing": "interleaved",
            "rope_scaling": {**OUR_YARN, "mscale": 0.707, "mscale_all_dim": 0.9},
        },
        0,
    ),
    "DeepSeek-V2, plain queries": (
        (modeling_deepseek_v2.DeepseekV2Attention, modeling_deepseek_v2.DeepseekV2RotaryEmbedding),
        DeepseekV2Config(**THEIR_LATENT, q_lora_rank=None, rope_parameters=plain_rope()),
        {"kind": "latent", "latent": LATENT},
        {**OUR_LATENT, "rope_pairing": "interleaved"},
        0,
    ),
    **{
        f"DeepSeek-V3, {pairing}": (
            (modeling_deepseek_v3.DeepseekV3Attention, modeling_deepseek_v3.DeepseekV3RotaryEmbedding),
            DeepseekV3Config(
                **THEIR_LATENT,
                q_lora_rank=14,
                rope_interleave=pairing == "interleaved",
                rope_parameters={**THEIR_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            ),
            {"kind": "latent", "latent": {**LATENT, "query_rank": 14}},
            {**OUR_LATENT, "rope_pairing": pairing, "rope_scaling": {**OUR_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
            0,
        )
        for pairing in ("interleaved", "half")
    },
}


def our_config(attention: dict[str, Any], more: dict[str, Any]) -> ModelConfig:
    sizes = {"width": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_width": HEAD, "norm_eps": 1e-5}
    return small_config(model={**sizes, "attention": attention, **more}).model


def random_weights(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def with_their_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> nn.Module:
    state = {}
    for path, tensor in theirs.state_dict().items():
        first, _, rest = path.partition(".")
        state[".".join(filter(None, (names.get(first, first), rest)))] = tensor
    ours.load_state_dict(state)
    return ours


def seen(window: int | None) -> Tensor:
    """[S, S], made as the definition says."""
    pairs = [[0 <= q - k < (window or LENGTH) for k in range(LENGTH)] for q in range(LENGTH)]
    return torch.tensor(pairs)


def their_output(
    parts: Any, config: PretrainedConfig, window: int | None, x: Tensor, number: int
) -> tuple[Any, Tensor]:
    attention, rotary = parts
    config._attn_implementation = "eager"
    module = random_weights(attention(config, number)).to(x.dtype)
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=x.dtype).masked_fill(~seen(window), -torch.inf)
    table = rotary(config)(x, torch.arange(LENGTH)[None])
    return module, module(x, position_embeddings=table, attention_mask=mask)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_equals_that_of_transformers(name):
    parts, theirs, attention, more, number = FAMILIES[name]
    config = our_config(attention, more)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    module, expected = their_output(parts, theirs, window_of(config, number), x, number)
    ours = (LatentAttention if config.attention.kind == "latent" else Attention)(config, number)
    ours = with_their_weights(ours, module, OUR_NAMES)
    with torch.no_grad():
        assert_close(ours(x, places_of(None, LENGTH, config, x)), expected.detach(), name)


def scalings() -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(our scaling, their parameters, arguments of their function)."""
    yield {"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, {}
    # Theirs grows the base with the row: at 6 times the old context by 3 * 6 - 2. Ours has one base (decision 15).
    yield {"kind": "ntk", "factor": 16.0}, {"rope_type": "dynamic", "factor": 3.0}, {"seq_len": 6 * 64}
    yield {"kind": "ntk", "factor": 6.0}, {"rope_type": "dynamic", "factor": 1.0}, {"seq_len": 6 * 64}
    for factor, fast, slow in ((4.0, 32.0, 1.0), (40.0, 32.0, 1.0), (32.0, 8.0, 2.0), (2.0, 1.01, 1.0)):
        for truncate in (True, False):
            ours = {"kind": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, "original_tokens": 4096}
            theirs = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
            theirs |= {"original_max_position_embeddings": 4096, "truncate": truncate}
            yield {**ours, "whole_bounds": truncate}, theirs, {}


@pytest.mark.parametrize(("ours", "theirs", "arguments"), list(scalings()))
def test_stretched_frequencies_equal_those_of_transformers(ours, theirs, arguments):
    config = our_config({}, {"head_width": 64, "rope_theta": 1.5e5, "rope_scaling": ours})
    parameters = {"rope_theta": 1.5e5, **theirs}
    llama = LlamaConfig(**{**SIZES, "head_dim": 64}, rope_parameters=parameters, max_position_embeddings=64)
    expected, size = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](llama, **arguments)
    torch.testing.assert_close(frequencies(config), expected.double(), rtol=2e-6, atol=0.0)
    cos, sin = rope_table(torch.arange(3), config, torch.zeros((), dtype=torch.float64))
    assert_close((cos.square() + sin.square()).sqrt(), torch.full((3, 32), float(size), dtype=torch.float64), "size")


def test_slowest_pair_of_a_larger_base_is_divided_by_the_factor_and_the_fastest_kept():
    stretched = frequencies(our_config({}, {"rope_scaling": {"kind": "ntk", "factor": 5.0}}))
    ratio = frequencies(our_config({}, {})) / stretched
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 5.0], dtype=torch.float64))

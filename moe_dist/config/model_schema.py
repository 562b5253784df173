"""The sections of the config tree that say what the model is. Frozen and strict; they hold no behaviour."""

from __future__ import annotations

from typing import Literal

from moe_dist.config.section import Section, key, section


class MoEConfig(Section):
    num_experts: int = key(8, "Routed experts of a layer.", "experts", ge=2)
    router: Literal["softmax_topk", "sigmoid_topk", "switch", "gshard", "noisy_topk", "expert_choice", "hash"] = key(
        "softmax_topk", "How experts and tokens find each other; each kind is explained in docs/moe.md."
    )
    top_k: int = key(2, "Experts that each token is sent to (in the mean, with expert_choice).", "experts", ge=1)
    expert_width: int = key(256, "Inner width of a routed expert.", "channels", ge=1)
    shared_expert_width: int = key(256, "Inner width of the expert every token passes; 0 for none.", "channels", ge=0)
    shared_expert_gate: bool = key(
        False, "The shared expert's output is weighed by a sigmoid of the token (Qwen2-MoE)."
    )
    activation: Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "relu", "squared_relu"] = key(
        "swiglu",
        "Routed experts: a gated pair of projections with SiLU, GELU or a clamped SiLU (gpt-oss), or one projection "
        "with GELU, ReLU or its square.",
    )
    expert_bias: bool = key(False, "Both products of a routed expert have a learned bias (gpt-oss).")
    latent_width: int | None = key(
        None,
        "Routed experts work in a space of this width, to which tokens are projected before dispatch and from which "
        "they return after it; null is the model's own width.",
        "channels",
        ge=1,
    )
    weigh: Literal["output", "input"] = key(
        "output", "Gate weights multiply what an expert returns, or what it receives (Llama 4)."
    )
    router_bias: bool = key(False, "The router's linear map has a learned bias (gpt-oss).")
    normalize_gates: bool = key(True, "Gate weights of a token's chosen experts sum to one (before `gate_scale`).")
    constant_gate: bool = key(
        False,
        "With top_k=1 and normalize_gates: every gate weight is 1 and only balance terms teach the router, which is "
        "meant (MiniMind-3).",
    )
    gate_scale: float = key(1.0, "Factor on the gate weights.", gt=0)
    num_groups: int = key(1, "Groups of neighbouring experts, of which a token sees only the best.", "groups", ge=1)
    groups_per_token: int = key(1, "Groups that a token may choose its experts from.", "groups", ge=1)
    group_score_experts: int = key(
        2,
        "A group of experts is scored by the sum of so many of its best: 2 in DeepSeek-V3, 1 in DeepSeek-V2.",
        "experts",
        ge=1,
    )
    selection_bias: bool = key(
        False, "Balance without a loss: a bias on the scores, for the choice alone, that moves against the load."
    )
    bias_update_rate: float = key(0.001, "Step of the selection bias at each optimizer update.", ge=0)
    input_jitter: float = key(
        0.0, "In training, the router's input is multiplied by uniform numbers within 1 plus or minus this.", ge=0, lt=1
    )
    capacity_factor: float | None = key(
        None, "Rows an expert takes of each sequence, as a multiple of an even share; null drops nothing.", gt=0
    )
    capacity_factor_eval: float | None = key(None, "The same in evaluation and generation.", gt=0)
    min_capacity: int = key(1, "An expert takes at least this many rows of a capacity group.", "rows", ge=1)
    capacity_group: Literal["sequence", "rank"] = key(
        "sequence",
        "Tokens that an expert's capacity is counted for: each sequence, which no layout changes, or all that a rank "
        "takes through the model at once, as other trainers do.",
    )
    pad_to_capacity: bool = key(
        False, "Every expert always computes as many rows as its capacity, empty ones too: static shapes."
    )
    drop_policy: Literal["probability", "position_token_major", "position_choice_major"] = key(
        "probability",
        "Who loses when an expert is full: the least probable tokens; the latest, all choices of a token side by side; "
        "or the latest, where all first choices come before any second choice (GShard).",
    )
    renormalize_after_drop: bool = key(False, "After drops, the remaining gate weights of a token sum as before.")
    balance_loss: float = key(0.01, "Coefficient of the load-balancing loss (Switch form).", ge=0)
    balance_scope: Literal["sequence", "micro_batch", "global"] = key(
        "sequence",
        "Tokens over which balance is asked for: each sequence; those a rank takes through the model at once, which "
        "depends on the layout; or the whole global batch.",
    )
    global_balance: Literal["exact", "micro_step", "running"] = key(
        "exact",
        "Where balance_scope=global and micro-batches are accumulated: counts of the whole global batch, from a first "
        "pass without gradient; of this micro-batch over all ranks; or of the micro-batches so far.",
    )
    group_balance_loss: float = key(
        0.0, "Coefficient of the balance loss over num_groups groups of experts (DeepSeek-V2, device level).", ge=0
    )
    z_loss: float = key(0.001, "Coefficient of the router z-loss.", ge=0)
    backend: Literal["auto", "grouped", "loop", "batched", "reference"] = key(
        "auto",
        "How the experts multiply: F.grouped_mm, a loop of matrix products, one batched product (with "
        "pad_to_capacity), plainly by autograd, or by what the device is good at.",
    )
    recompute_experts: Literal["nothing", "activation", "projections"] = key(
        "activation",
        "What the `loop` back end computes again in the backward pass rather than keeps: nothing, the elementwise "
        "activation, or the first projections too.",
    )


class LatentConfig(Section):
    """Widths of multi-head latent attention (DeepSeek-V2, section 2.1); read where model.attention.kind is latent."""

    query_rank: int | None = key(
        None, "Width that queries are compressed to; null makes them straight from the token.", "channels", ge=1
    )
    kv_rank: int = key(512, "Width that keys and values are compressed to, and cached in.", "channels", ge=1)
    rope_width: int = key(
        64, "Channels of a head that are turned by position; their keys are shared.", "channels", ge=2
    )
    value_width: int = key(128, "Width of a head's values.", "channels", ge=1)


class AttentionConfig(Section):
    kind: Literal["grouped", "latent"] = key(
        "grouped",
        "Query heads in groups that share a key/value head; or keys and values from one compressed latent (DeepSeek), "
        "where head_width is the part of a head that position does not turn.",
    )
    qk_norm: Literal["none", "head", "whole"] = key(
        "none", "RMSNorm on queries and keys: of each head (Qwen3), or of all heads as one vector (OLMoE)."
    )
    qkv_bias: bool = key(False, "The projections to queries, keys and values have a learned bias.")
    output_bias: bool = key(False, "The projection of attention's output has a learned bias.")
    window_tokens: int | None = key(
        None, "A token sees so many tokens, itself included, and none before; null sees all.", "tokens", ge=1
    )
    full_every_layers: int = key(
        0, "With a window, every so many blocks one without a window (gpt-oss: 2); 0: none.", "layers", ge=0
    )
    sinks: bool = key(False, "A learned score for each head takes part in the softmax and carries no value (gpt-oss).")
    latent: LatentConfig = section(LatentConfig, "Multi-head latent attention.")


class RopeScalingConfig(Section):
    """How the rotary embedding is stretched beyond the context that a model was trained with."""

    kind: Literal["none", "linear", "ntk", "yarn"] = key(
        "none",
        "Not at all; positions divided by the factor; a larger base; or YaRN, which divides slow channels only and "
        "raises the temperature (Peng et al. 2023).",
    )
    factor: float = key(1.0, "Context after over context before.", ge=1)
    original_tokens: int = key(4096, "Context before, which yarn measures by.", "tokens", ge=1)
    beta_fast: float = key(32.0, "YaRN: channels that turn so often or more in the old context are kept.", gt=0)
    beta_slow: float = key(1.0, "YaRN: channels that turn so often or less are divided by the factor.", gt=0)
    whole_bounds: bool = key(True, "YaRN: the bounds between kept and divided channels are rounded (not in gpt-oss).")
    mscale: float | None = key(None, "YaRN: weight of the temperature in cosines and sines (DeepSeek).", gt=0)
    mscale_all_dim: float | None = key(None, "YaRN: weight of the temperature in all scores (DeepSeek).", gt=0)


class MixConfig(Section):
    """What a feed-forward sees of the tokens before; identity at initialisation."""

    kind: Literal["none", "conv", "adapter"] = key(
        "none",
        "Nothing; a causal depthwise convolution over the inner channels (MixFFN of SegFormer, in Primer's 1-D form); "
        "or one in a low-rank adapter beside the feed-forward.",
    )
    kernel_tokens: int = key(3, "Tokens that the convolution sees, the token itself included.", "tokens", ge=2)
    rank: int = key(16, "Width of the adapter.", "channels", ge=1)


class ModelConfig(Section):
    vocab_size: int = key(
        2048, "Rows of the embedding; a tokenizer trained by us has at most this size.", "tokens", ge=258
    )
    num_layers: int = key(4, "Decoder blocks.", "layers", ge=1)
    num_dense_layers: int = key(0, "Leading blocks with a dense feed-forward in place of experts.", "layers", ge=0)
    moe_every_layers: int = key(
        1,
        "Of the blocks after the leading dense ones, the last of every so many has experts (Switch, GLaM: 2).",
        "layers",
        ge=1,
    )
    width: int = key(256, "Width of the residual stream.", "channels", ge=2)
    num_heads: int = key(4, "Query heads.", "heads", ge=1)
    num_kv_heads: int = key(2, "Key/value heads; each serves an equal group of query heads.", "heads", ge=1)
    head_width: int = key(64, "Width of a head; even, for the rotary embedding.", "channels", ge=2)
    ffn_width: int = key(704, "Inner width of the dense feed-forward.", "channels", ge=1)
    ffn_activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"] = key(
        "swiglu", "Dense feed-forward and shared expert: a gated pair of projections, or one projection."
    )
    ffn_bias: bool = key(False, "The projections of dense feed-forwards have a learned bias (GPT-3).")
    mix: MixConfig = section(MixConfig, "Feed-forwards that see the tokens just before.")
    attention: AttentionConfig = section(AttentionConfig, "The attention of a block.")
    positions: Literal["rope", "learned", "none"] = key(
        "rope", "Rotary embedding; a learned vector a position, added to the token's (GPT-3); or none at all."
    )
    max_positions_tokens: int = key(
        2048, "Learned positions, and so the longest row; without meaning for others.", "tokens", ge=1
    )
    rope_theta: float = key(10_000.0, "Base of the rotary embedding.", gt=1)
    rope_pairing: Literal["half", "interleaved"] = key(
        "half", "Channels turned together: c and c + C/2 (Llama on the hub), or 2c and 2c + 1 (DeepSeek, RoFormer)."
    )
    rope_scaling: RopeScalingConfig = section(RopeScalingConfig, "Contexts longer than a model was trained with.")
    norm: Literal["rms", "layer", "centred_rms"] = key(
        "rms",
        "RMSNorm; LayerNorm with a learned bias; or RMSNorm of vectors whose mean is taken off implicitly (CRMSNorm, "
        "Jiang et al. 2023).",
    )
    norm_eps: float = key(1e-5, "Epsilon inside the norm.", gt=0)
    tie_embeddings: bool = key(True, "The output projection is the embedding itself.")
    init_std: float = key(0.02, "Standard deviation of initial weights; residual outputs are scaled down.", gt=0)
    moe: MoEConfig = section(MoEConfig, "The mixture-of-experts layer.")

    def has_experts(self, block: int) -> bool:
        """Whether the feed-forward of a block, counted from 0, is a mixture of experts."""
        behind = block - self.num_dense_layers
        return behind >= 0 and (behind + 1) % self.moe_every_layers == 0

    @property
    def moe_blocks(self) -> range:
        """The blocks whose feed-forward is a mixture of experts, counted from 0; no list, whatever a file may claim."""
        return range(self.num_dense_layers + self.moe_every_layers - 1, self.num_layers, self.moe_every_layers)

"""Rules that join several keys: each names the key, its value, the rule and the nearest legal value."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from moe_dist.config.cleaning_rules import decontaminate_rules, near_duplicate_rules
from moe_dist.config.data_schema import QUALITY_RULES
from moe_dist.config.model_rules import model_option_rules
from moe_dist.config.model_schema import MoEConfig
from moe_dist.config.run_rules import launch_rules, ledger_rules
from moe_dist.config.schema import Config
from moe_dist.config.source_rules import source_rules
from moe_dist.errors import ConfigError


def check_rules(config: Config) -> None:
    """Raises the first broken rule across keys.

    Raises:
        ConfigError: With the key, its value, the rule and a value that would pass.
    """
    for error in broken_rules(config):
        raise error


def broken_rules(config: Config) -> Iterator[ConfigError]:
    """Yields every broken rule, in the order of the tree."""
    yield from _data_rules(config)
    yield from source_rules(config.data)
    yield from _model_rules(config)
    yield from model_option_rules(config.model)
    yield from _moe_rules(config)
    yield from _expert_rules(config)
    yield from _parallel_rules(config)
    yield from launch_rules(config)
    yield from _precision_rules(config)
    yield from ledger_rules(config)


def _data_rules(config: Config) -> Iterator[ConfigError]:
    tokenizer = config.data.tokenizer
    if tokenizer.path is None and tokenizer.kind != "auto":
        rule = "without data.tokenizer.path a tokenizer is trained, which has no other kind"
        yield ConfigError("data.tokenizer.kind", tokenizer.kind, rule, "data.tokenizer.kind=auto, or name a path")
    for name in config.data.clean.rules:
        if name not in QUALITY_RULES:
            nearest = difflib.get_close_matches(name, QUALITY_RULES, n=1, cutoff=0.0)[0]
            yield ConfigError(
                "data.clean.rules",
                name,
                f"a quality rule is one of {', '.join(QUALITY_RULES)}",
                f"data.clean.rules=[{nearest}]",
            )
    yield from near_duplicate_rules(config.data.dedup.near)
    yield from decontaminate_rules(config.data.decontaminate)


def _model_rules(config: Config) -> Iterator[ConfigError]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        nearest = _nearest_divisor(model.num_heads, model.num_kv_heads)
        yield ConfigError(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads ({model.num_heads})",
            f"model.num_kv_heads={nearest}",
        )
    if model.num_dense_layers > model.num_layers:
        yield ConfigError(
            "model.num_dense_layers",
            model.num_dense_layers,
            f"must not exceed model.num_layers ({model.num_layers})",
            f"model.num_dense_layers={model.num_layers}",
        )


def _moe_rules(config: Config) -> Iterator[ConfigError]:
    moe = config.model.moe
    if moe.top_k > moe.num_experts:
        yield ConfigError(
            "model.moe.top_k",
            moe.top_k,
            f"a token cannot choose more experts than there are (model.moe.num_experts={moe.num_experts})",
            f"model.moe.top_k={moe.num_experts} or less",
        )
    yield from _router_rules(moe)
    if moe.router == "expert_choice":
        yield from _expert_choice_rules(config)
    if moe.router == "hash":
        yield from _hash_rules(moe)
    yield from _selection_rules(moe)
    yield from _balance_rules(moe)


def _balance_rules(moe: MoEConfig) -> Iterator[ConfigError]:
    """What the balance terms are about."""
    if moe.global_balance != "exact" and moe.balance_scope != "global":
        yield ConfigError(
            "model.moe.global_balance",
            moe.global_balance,
            f"says how the global term counts; model.moe.balance_scope is {moe.balance_scope}",
            "model.moe.global_balance=exact, or model.moe.balance_scope=global",
        )
    if moe.group_balance_loss > 0 and moe.num_groups == 1:
        yield ConfigError(
            "model.moe.group_balance_loss",
            moe.group_balance_loss,
            "balances groups of experts; model.moe.num_groups=1 makes one group, whose load is always even",
            "model.moe.group_balance_loss=0.0, or model.moe.num_groups=2 or more",
        )


def _router_rules(moe: MoEConfig) -> Iterator[ConfigError]:
    """What routers that choose for each token demand of `top_k` and `normalize_gates`."""
    if moe.router == "switch" and moe.top_k != 1:
        yield ConfigError(
            "model.moe.top_k",
            moe.top_k,
            "a Switch router sends each token to one expert",
            "model.moe.top_k=1, or model.moe.router=softmax_topk",
        )
    if moe.router == "gshard" and moe.top_k != 2:
        yield ConfigError(
            "model.moe.top_k",
            moe.top_k,
            "a GShard router sends each token to two experts",
            "model.moe.top_k=2, or model.moe.router=softmax_topk",
        )
    if moe.router == "gshard" and not moe.normalize_gates:
        yield ConfigError(
            "model.moe.normalize_gates",
            False,
            "the gate weights of a GShard router sum to one: the second expert is drawn by its normalised weight",
            "model.moe.normalize_gates=true",
        )
    if moe.constant_gate and not (moe.router == "softmax_topk" and moe.top_k == 1 and moe.normalize_gates):
        yield ConfigError(
            "model.moe.constant_gate",
            True,
            "says that a gate weight of 1 is meant, which router=softmax_topk has with top_k=1 and normalize_gates",
            "model.moe.constant_gate=false",
        )
    learns_by_gate = moe.router in ("softmax_topk", "sigmoid_topk", "switch", "noisy_topk")
    if learns_by_gate and not moe.constant_gate and (moe.top_k == 1 or moe.router == "switch") and moe.normalize_gates:
        yield ConfigError(
            "model.moe.normalize_gates",
            True,
            "with top_k=1 a normalised gate weight is always 1, so the language-model loss cannot teach the router",
            "model.moe.normalize_gates=false",
        )


def _expert_choice_rules(config: Config) -> Iterator[ConfigError]:
    moe = config.model.moe
    if moe.normalize_gates:
        yield ConfigError(
            "model.moe.normalize_gates",
            True,
            "with expert choice a gate weight is the raw probability: how many experts take a token is open",
            "model.moe.normalize_gates=false",
        )
    for name in ("capacity_factor", "capacity_factor_eval"):
        if getattr(moe, name) is None:
            yield ConfigError(
                f"model.moe.{name}",
                None,
                "with expert choice the capacity says how many tokens an expert takes; without one it takes all",
                f"model.moe.{name}=1.0",
            )
    if moe.drop_policy != "probability":
        yield ConfigError(
            "model.moe.drop_policy",
            moe.drop_policy,
            "with expert choice an expert takes its most probable tokens",
            "model.moe.drop_policy=probability",
        )
    if moe.renormalize_after_drop:
        yield ConfigError(
            "model.moe.renormalize_after_drop",
            True,
            "with expert choice a token that an expert does not take is not dropped, so there is no sum to restore",
            "model.moe.renormalize_after_drop=false",
        )
    if moe.balance_loss > 0:
        yield ConfigError(
            "model.moe.balance_loss",
            moe.balance_loss,
            "with expert choice every expert takes equally many tokens; the balance term has no gradient",
            "model.moe.balance_loss=0.0",
        )
    if config.generate.prompts:
        yield ConfigError(
            "generate.prompts",
            list(config.generate.prompts),
            "with expert choice no text can be generated: an expert compares all tokens of a sequence, later ones too",
            "generate.prompts=[]",
        )


def _hash_rules(moe: MoEConfig) -> Iterator[ConfigError]:
    for name in ("balance_loss", "z_loss", "input_jitter"):
        if getattr(moe, name) > 0:
            yield ConfigError(
                f"model.moe.{name}",
                getattr(moe, name),
                "a hash router has no weights and does not read the hidden state: there is nothing to move",
                f"model.moe.{name}=0.0",
            )
    if not moe.normalize_gates:
        yield ConfigError(
            "model.moe.normalize_gates",
            False,
            "a hash router has no probabilities; the weights of a token's experts are equal and sum to one",
            "model.moe.normalize_gates=true",
        )
    if moe.router_bias:
        yield ConfigError(
            "model.moe.router_bias",
            True,
            "a hash router has no linear map that a bias could be added to",
            "model.moe.router_bias=false",
        )
    drops = moe.capacity_factor is not None or moe.capacity_factor_eval is not None
    if drops and moe.drop_policy == "probability":
        yield ConfigError(
            "model.moe.drop_policy",
            "probability",
            "a hash router has no probabilities to drop by",
            "model.moe.drop_policy=position_token_major",
        )


def _selection_rules(moe: MoEConfig) -> Iterator[ConfigError]:
    """Groups and selection bias."""
    selects = moe.router in ("softmax_topk", "sigmoid_topk")
    if moe.num_groups > 1 and not selects:
        yield ConfigError(
            "model.moe.num_groups",
            moe.num_groups,
            f"groups limit the choice of softmax_topk and sigmoid_topk; model.moe.router is {moe.router}",
            "model.moe.num_groups=1",
        )
    if moe.selection_bias and not selects:
        yield ConfigError(
            "model.moe.selection_bias",
            True,
            f"a selection bias is for softmax_topk and sigmoid_topk; model.moe.router is {moe.router}",
            "model.moe.selection_bias=false",
        )
    if moe.num_experts % moe.num_groups:
        nearest = _nearest_divisor(moe.num_experts, moe.num_groups)
        yield ConfigError(
            "model.moe.num_groups",
            moe.num_groups,
            f"must divide model.moe.num_experts ({moe.num_experts})",
            f"model.moe.num_groups={nearest}",
        )
        return
    if moe.groups_per_token > moe.num_groups:
        yield ConfigError(
            "model.moe.groups_per_token",
            moe.groups_per_token,
            f"must not exceed model.moe.num_groups ({moe.num_groups})",
            f"model.moe.groups_per_token={moe.num_groups}",
        )
    experts_per_group = moe.num_experts // moe.num_groups
    if moe.groups_per_token * experts_per_group < moe.top_k <= moe.num_experts:
        yield ConfigError(
            "model.moe.groups_per_token",
            moe.groups_per_token,
            f"a token's groups of {experts_per_group} experts must hold at least model.moe.top_k ({moe.top_k})",
            f"model.moe.groups_per_token={-(-moe.top_k // experts_per_group)}",
        )


def _expert_rules(config: Config) -> Iterator[ConfigError]:
    """Shapes of the experts and how they multiply."""
    moe = config.model.moe
    if moe.shared_expert_gate and not moe.shared_expert_width:
        yield ConfigError(
            "model.moe.shared_expert_gate",
            True,
            "there is no shared expert to weigh (model.moe.shared_expert_width=0)",
            "model.moe.shared_expert_gate=false",
        )
    if moe.backend == "batched" and not moe.pad_to_capacity:
        yield ConfigError(
            "model.moe.backend",
            "batched",
            "one batched product needs equally many rows of every expert",
            "model.moe.backend=auto, or model.moe.pad_to_capacity=true",
        )
    if not moe.pad_to_capacity:
        return
    for name in ("capacity_factor", "capacity_factor_eval"):
        if getattr(moe, name) is None:
            yield ConfigError(
                f"model.moe.{name}",
                None,
                "model.moe.pad_to_capacity fills every expert up to its capacity; without one there is none",
                f"model.moe.{name}=1.25, or model.moe.pad_to_capacity=false",
            )
    if config.parallel.dispatch != "all_to_all":
        yield ConfigError(
            "parallel.dispatch",
            config.parallel.dispatch,
            "empty rows of model.moe.pad_to_capacity belong to no token; only all_to_all sends rows and not tokens",
            "parallel.dispatch=all_to_all, or model.moe.pad_to_capacity=false",
        )
    if config.parallel.overlap_chunks > 1:
        yield ConfigError(
            "parallel.overlap_chunks",
            config.parallel.overlap_chunks,
            "empty rows of model.moe.pad_to_capacity belong to no part of the tokens",
            "parallel.overlap_chunks=1, or model.moe.pad_to_capacity=false",
        )


def _parallel_rules(config: Config) -> Iterator[ConfigError]:
    parallel = config.parallel
    if parallel.ranks_per_node is not None and parallel.dispatch != "two_level":
        yield ConfigError(
            "parallel.ranks_per_node",
            parallel.ranks_per_node,
            f"only the two-level dispatcher knows nodes; parallel.dispatch is {parallel.dispatch}",
            "parallel.ranks_per_node=null, or parallel.dispatch=two_level",
        )
    if parallel.data_shard is not None and parallel.data != "fsdp":
        yield ConfigError(
            "parallel.data_shard",
            parallel.data_shard,
            f"only fsdp shares parameters out; parallel.data is {parallel.data}",
            "parallel.data_shard=null, or parallel.data=fsdp",
        )
    if parallel.dispatch == "deepep" and parallel.overlap_chunks > 1:
        yield ConfigError(
            "parallel.overlap_chunks",
            parallel.overlap_chunks,
            "exchanges of DeepEP are not overlapped",
            "parallel.overlap_chunks=1, or parallel.dispatch=deduplicated",
        )
    if parallel.dispatch == "deepep" and config.train.precision != "bf16":
        yield ConfigError(
            "parallel.dispatch",
            "deepep",
            f"DeepEP carries tokens in bf16; train.precision is {config.train.precision}",
            "train.precision=bf16, or parallel.dispatch=deduplicated",
        )


def _precision_rules(config: Config) -> Iterator[ConfigError]:
    if config.train.precision == "fp64" and config.model.moe.backend == "grouped":
        yield ConfigError(
            "model.moe.backend",
            "grouped",
            "torch.nn.functional.grouped_mm has no fp64; train.precision is fp64",
            "model.moe.backend=loop",
        )
    whole = 8 if config.train.precision == "bf16" else 4
    moe = config.model.moe
    widths = {"model.moe.expert_width": moe.expert_width}
    widths |= {"model.moe.latent_width": moe.latent_width} if moe.latent_width else {"model.width": config.model.width}
    for name, width in widths.items():
        if moe.backend == "grouped" and width % whole:
            yield ConfigError(
                name,
                width,
                f"torch.nn.functional.grouped_mm takes rows of whole 16 bytes: multiples of {whole} channels",
                f"{name}={-(-width // whole) * whole}, or model.moe.backend=auto",
            )


def _nearest_divisor(whole: int, near: int) -> int:
    """The divisor of `whole` that is closest to `near`; the smaller of two."""
    return min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - near))

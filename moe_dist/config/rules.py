"""Rules that join several keys: each names the key, its value, the rule and the nearest legal value."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.schema import Config
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
    yield from _model_rules(config)
    yield from _moe_rules(config)
    yield from _precision_rules(config)


def _model_rules(config: Config) -> Iterator[ConfigError]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - model.num_kv_heads))
        yield ConfigError(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads ({model.num_heads})",
            f"model.num_kv_heads={nearest}",
        )
    if model.head_width % 2:
        yield ConfigError(
            "model.head_width",
            model.head_width,
            "must be even: the rotary embedding turns pairs of channels",
            f"model.head_width={model.head_width + 1}",
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
    if moe.top_k == 1 and moe.normalize_gates:
        yield ConfigError(
            "model.moe.normalize_gates",
            True,
            "with top_k=1 a normalised gate weight is always 1, so the language-model loss cannot teach the router",
            "model.moe.normalize_gates=false",
        )
    if moe.balance_scope == "global" and moe.balance_loss > 0 and _may_accumulate(config):
        yield ConfigError(
            "model.moe.balance_scope",
            "global",
            "the exact global term needs the whole global batch in one pass; "
            f"train.micro_batch_sequences={config.train.micro_batch_sequences} cuts it into several",
            f"train.micro_batch_sequences={config.train.global_batch_sequences}, or model.moe.balance_scope=sequence",
        )


def _precision_rules(config: Config) -> Iterator[ConfigError]:
    if config.train.precision == "fp64" and config.model.moe.backend == "grouped":
        yield ConfigError(
            "model.moe.backend",
            "grouped",
            "torch.nn.functional.grouped_mm has no fp64; train.precision is fp64",
            "model.moe.backend=loop",
        )


def _may_accumulate(config: Config) -> bool:
    return config.train.micro_batch_sequences < config.train.global_batch_sequences

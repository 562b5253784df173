"""Rules about named sources of text and the mixture of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

from moe_dist.config.data_schema import DataConfig, MixtureStage
from moe_dist.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_DEFAULT_INPUT = DataConfig().input


def source_rules(data: DataConfig) -> Iterator[ConfigError]:
    """Yields every broken rule of `data.sources` and `data.mixture`."""
    if data.sources and data.input != _DEFAULT_INPUT:
        rule = "the input is either one, data.input, or several named ones, data.sources"
        yield ConfigError("data.input", data.input, rule, "make it a source of its own: data.sources.NAME.input")
    for name in data.sources:
        if not _NAME.fullmatch(name):
            rule = "the name of a source has lower-case letters, digits, - and _, and begins with one of the first two"
            near = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "text"
            yield ConfigError(f"data.sources.{name}", name, rule, f"data.sources.{near}")
    for place, stage in enumerate(data.mixture):
        yield from _stage_rules(data, place, stage)


def _stage_rules(data: DataConfig, place: int, stage: MixtureStage) -> Iterator[ConfigError]:
    where = f"data.mixture.{place}"
    if bool(stage.weights) == bool(stage.epochs):
        found = "both weights and epochs" if stage.weights else "neither weights nor epochs"
        fix = f"{where}.weights with a length in tokens, or {where}.epochs without"
        yield ConfigError(where, found, "a stage has weights, or epochs, of sources", fix)
    if stage.epochs and stage.tokens is not None:
        rule = "a stage by epochs is as long as these are"
        yield ConfigError(f"{where}.tokens", stage.tokens, rule, f"{where}.tokens=null, or weights instead of epochs")
    if stage.weights and stage.tokens is None and place < len(data.mixture) - 1:
        rule = "only the last stage may go on for the rest of the run"
        yield ConfigError(f"{where}.tokens", None, rule, f"{where}.tokens=1000000000, say")
    for kind, shares in (("weights", stage.weights), ("epochs", stage.epochs)):
        yield from _share_rules(data, f"{where}.{kind}", shares)


def _share_rules(data: DataConfig, where: str, shares: Mapping[str, float]) -> Iterator[ConfigError]:
    for name, share in shares.items():
        if name not in data.sources:
            near = difflib.get_close_matches(name, data.sources, n=1, cutoff=0.0)
            fix = f"{where}.{near[0]}" if near else f"name it: data.sources.{name}.input"
            yield ConfigError(f"{where}.{name}", name, f"is one of data.sources: {', '.join(data.sources)}", fix)
        if share < 0:
            yield ConfigError(f"{where}.{name}", share, "must be at least 0", f"{where}.{name}=0")
    if shares and not any(share > 0 for share in shares.values()):
        yield ConfigError(where, dict(shares), "one of them is above 0", f"{where}.{next(iter(shares))}=1")

"""Rules that join keys of `data.dedup` or `data.decontaminate`: a part of `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.data_schema import DecontaminateConfig, NearDuplicateConfig
from moe_dist.errors import ConfigError


def near_duplicate_rules(near: NearDuplicateConfig) -> Iterator[ConfigError]:
    """How near-duplicates are found must fit how similar they are."""
    if near.similarity is None:
        for name, field in NearDuplicateConfig.model_fields.items():
            if getattr(near, name) != field.default:
                yield ConfigError(
                    f"data.dedup.near.{name}",
                    getattr(near, name),
                    "says how near-duplicates are found; data.dedup.near.similarity=null looks for none",
                    f"data.dedup.near.{name}={field.default}, or data.dedup.near.similarity=0.7",
                )
        return
    found = 1 - (1 - near.similarity**near.rows) ** near.bands
    if found < 0.5:
        fewer = (rows for rows in range(near.rows, 1, -1) if 1 - (1 - near.similarity**rows) ** near.bands >= 0.5)
        rows = next(fewer, None)
        yield ConfigError(
            "data.dedup.near.similarity",
            near.similarity,
            f"{near.bands} bands of {near.rows} rows bring together only {found:.1%} of pairs this similar; "
            "at least half should be",
            f"data.dedup.near.rows={rows}" if rows else "data.dedup.near.similarity=0.7 or more, or more bands",
        )


def decontaminate_rules(settings: DecontaminateConfig) -> Iterator[ConfigError]:
    """How leaks are found says nothing where none are looked for."""
    for name in ("ngram_words", "text_field"):
        default = DecontaminateConfig.model_fields[name].default
        if not settings.against and getattr(settings, name) != default:
            yield ConfigError(
                f"data.decontaminate.{name}",
                getattr(settings, name),
                "says how evaluation text is looked for; data.decontaminate.against=[] looks for none",
                f"data.decontaminate.{name}={'null' if default is None else default}, or files in "
                "data.decontaminate.against",
            )

"""The name of a build: a hash of its format, its input, and all of the configuration that decides its bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from data_pipeline.clean import Cleaner
from data_pipeline.contamination import Evaluation
from data_pipeline.listing import Listing
from data_pipeline.manifest import FORMAT_VERSION
from data_pipeline.near import near_created_from
from data_pipeline.rank_files import ENCODINGS
from data_pipeline.tokenizer import read_tokenizer_file
from moe_dist.config import Config
from moe_dist.config.data_schema import DataConfig


def fingerprint(listing: Listing, created_from: dict[str, Any]) -> str:
    """Name of a build: hash of the format, the files' identities, and the configuration that matters."""
    files = [file.identity for file in listing.files]
    tree = {"version": FORMAT_VERSION, "files": files, "config": created_from}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8")).hexdigest()[:20]


def made_from(config: Config, evaluation: Evaluation | None) -> dict[str, Any]:
    """The configuration that decides the bytes of a build. Cleaning that is off leaves no trace: names stay."""
    data = config.data
    given, kind = None, data.tokenizer.kind
    if data.tokenizer.path is not None:
        given = hashlib.sha256(read_tokenizer_file(data.tokenizer.path)).hexdigest()
    return {
        "data.suffixes": list(data.suffixes),
        "data.text_field": data.text_field,
        "data.unreadable": data.unreadable,
        "data.holdout_fraction": data.holdout_fraction,
        "data.shard_bytes": data.shard_bytes,
        "data.tokenizer.sha256": given,
        "data.tokenizer.train_bytes": data.tokenizer.train_bytes if given is None else None,
        "model.vocab_size": config.model.vocab_size,
        **({"data.tokenizer.kind": kind} if kind in ENCODINGS else {}),
        **Cleaner(data.clean).created_from,
        **({"data.dedup.exact": True} if data.dedup.exact else {}),
        **near_created_from(data.dedup.near),
        **(evaluation.created_from if evaluation is not None else {}),
        **({"data.count_languages": True} if data.count_languages and not _cleans(data) else {}),
        **({"data.packing": data.packing} if data.packing != "concatenate" else {}),
        **({"data.sources": sources_of(data, ("text_field", "license"))} if data.sources else {}),
    }


def sources_of(data: DataConfig, keys: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
    """What the configuration says of each source; None where it names none."""
    return {name: source.model_dump(include=set(keys)) for name, source in data.sources.items()} or None


def gives_account(data: DataConfig) -> bool:
    """Whether the manifest says what was left out and what is there."""
    return _cleans(data) or data.count_languages


def _cleans(data: DataConfig) -> bool:
    """Whether documents may be changed or left out, of which the manifest then gives an account."""
    dedup = data.dedup.exact or data.dedup.near.similarity is not None
    return Cleaner(data.clean).is_on or dedup or bool(data.decontaminate.against)

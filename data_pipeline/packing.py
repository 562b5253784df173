"""How documents lie in the rows that a run reads, as its config says."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.manifest import read_manifest
from moe_dist.config import Config


def separating_token(config: Config, folder: Path) -> int | None:
    """The id that ends a document of a build, where documents do not see each other; None where they are joined."""
    return read_manifest(folder).end_of_text if config.data.documents == "separate" else None

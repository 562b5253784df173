"""What is imported: a hub directory or a MiniMind file, as weights, tables and a model section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import ExchangeError
from moe_dist.interop import minimind
from moe_dist.interop.families import family_of, other_fields, read_fields
from moe_dist.interop.importing import Weights
from moe_dist.interop.names import Table
from moe_dist.interop.parts import Tree
from moe_dist.interop.shards import Shards, read_json, read_small

CONFIG = "config.json"
# Files of a directory that travel with its weights; no others do.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Something to be imported.

    Attributes:
        name: Of its family or layout.
        weights: Its tensors.
        table: Our tensors by theirs.
        model: Our model section.
    """

    name: str
    weights: Weights
    table: Table
    model: Tree


@contextmanager
def open_hub(folder: Path, ignored: Sequence[str] = ()) -> Iterator[Origin]:
    """A hub directory; `ignored` are fields of its config.json that are known to change nothing.

    Raises:
        ExchangeError: It is damaged, unsafe, or of a model that is not carried.
    """
    tree = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    family = family_of(tree.get("model_type"), f"{where}: model_type")
    model = read_fields(family, tree, where, ignored)
    with Shards(folder) as shards:
        yield Origin(family.model_type, shards, family.table, model)


def open_minimind(file: Path, heads: int | None) -> Origin:
    """A MiniMind file, whose pickle is trusted as far as torch's weights-only loader goes.

    Raises:
        ExchangeError: It is none.
    """
    weights = minimind.StateDict(file)
    found = minimind.recognise(weights, heads)
    return Origin(f"minimind ({found.layout})", weights, found.table, found.model)


def files_beside(folder: Path) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config of a directory, by name.

    Raises:
        ExchangeError: One of them is a link, or too large.
    """
    return {
        name: read_small(folder / name) for name in BESIDE if (folder / name).is_symlink() or (folder / name).exists()
    }


def kept_fields(folder: Path) -> tuple[Tree, str | None]:
    """What a kept config.json says besides what its model is, and the family; nothing where there is none."""
    if not (folder / CONFIG).exists():
        return {}, None
    tree = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}: model_type"
    try:
        family = family_of(tree.get("model_type"), where)
    except ExchangeError:
        return {}, None
    return other_fields(family, tree), family.model_type

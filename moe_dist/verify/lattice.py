"""The cells of the proof: every layout of some ranks, crossed with the options that a layout could break."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, get_args

import torch
from torch import Tensor

from moe_dist.config import Config, MoEConfig, parse_config
from moe_dist.config.load import find_problems
from moe_dist.config.schema import TrainConfig
from moe_dist.errors import LayoutError
from moe_dist.objectives.micro_batch import PADDING
from moe_dist.parallel.layout import Layout, layout_of, legal_layouts
from moe_dist.verify.step import end_of_text

AS_CONFIGURED = "as configured"
_DROPS = {"capacity_factor": 0.75, "capacity_factor_eval": 0.75, "min_capacity": 1, "pad_to_capacity": False}
CAPACITIES: dict[str, dict[str, Any]] = {
    AS_CONFIGURED: {},
    "dropless": {"capacity_factor": None, "capacity_factor_eval": None, "pad_to_capacity": False},
    "drop by probability": {**_DROPS, "drop_policy": "probability"},
    "drop by position": {**_DROPS, "drop_policy": "position_token_major"},
    "padded": {**_DROPS, "pad_to_capacity": True},
}
# How ranks that hold the same keep it; crossed with every layout, and with the options as far as pairs go.
KEEPINGS: dict[str, dict[str, Any]] = {
    "replicate": {"data": "replicate", "data_shard": None},
    "zero1": {"data": "zero1", "data_shard": None},
    "fsdp": {"data": "fsdp", "data_shard": None},
    "fsdp in pairs": {"data": "fsdp", "data_shard": 2},
}
SCOPES = ("sequence", "global", "micro_batch")
_DISPATCHERS = ("all_to_all", "deduplicated", "all_gather")
_NODE_RANKS = 2
_ENDS = 0.25  # share of tokens that end a document


@dataclass(frozen=True)
class Batch:
    """How a global batch is cut: rows of each rank that reads its own, and most rows of a micro-batch.

    With `padded`, tokens are missing at the end of most rows, and in the second half of the rows all of them.
    """

    name: str
    rows: tuple[int, ...]
    micro: int
    padded: bool = False


@dataclass(frozen=True)
class Cell:
    """One layout with one choice of every option."""

    layout: Layout
    dispatch: str
    keeping: str
    capacity: str
    scope: str
    batch: Batch
    recompute: str | None

    @property
    def options(self) -> dict[str, str]:
        """The options in words."""
        words = {"dispatch": self.dispatch, "data": self.keeping}
        words |= {"capacity": self.capacity, "balance_scope": self.scope}
        rows = "+".join(map(str, self.batch.rows)) + (" padded" if self.batch.padded else "")
        words |= {"rows": rows, "micro_batch": str(self.batch.micro)}
        return words | ({} if self.recompute is None else {"recompute": self.recompute})

    @property
    def traits(self) -> dict[str, str]:
        """Layout and options, each by itself, to tell what failing cells share."""
        layout = self.layout
        degrees = {"ranks": layout.ranks, "expert": layout.expert, "expert-data": layout.expert_data}
        degrees |= {"tensor": layout.tensor, "expert-tensor": layout.expert_tensor}
        return {name: str(degree) for name, degree in degrees.items()} | {**self.options, "rows": self.batch.name}

    @property
    def degrees(self) -> dict[str, int]:
        """Numbers that a wrong factor may come from."""
        layout = self.layout
        degrees = {"number of ranks": layout.ranks, "data degree": layout.data, "tensor degree": layout.tensor}
        degrees |= {"expert degree": layout.expert, "expert-data degree": layout.expert_data}
        degrees |= {"expert-tensor degree": layout.expert_tensor}
        return degrees | {"number of micro-batches of a rank": len(cut_of(self))}


def cells_of(config: Config, ranks: int, full: bool) -> list[Cell]:
    """The cells of a proof, layout by layout: all of them, or few in which every pair of choices meets.

    Even of all of them, what ranks keep (`KEEPINGS`) is not crossed with everything: it has nothing to do with tokens.

    Args:
        config: Small enough (`shrunk`).
        ranks: Processes; their divisors are proven too.
        full: All cells.
    """
    places = [place for count in _divisors(ranks) for place in _places(config, count)]
    crossed = product(places, KEEPINGS, _capacities(config), _scopes(config), _recomputes())
    firsts = [
        Cell(layout, dispatch, keeping, capacity, scope, _batches(layout.data, ranks)[0], recompute)
        for (layout, dispatch), keeping, capacity, scope, recompute in crossed
        if _keeps_otherwise(layout, keeping)
    ]
    legal = [placed for cell in firsts if (placed := _placed(config, cell))]  # whatever its batch
    cells = [replace(cell, batch=batch) for cell in legal for batch in _batches(cell.layout.data, ranks)]
    few = _covering(cells)
    kept = set(few)
    return [cell for cell in cells if cell.keeping == "replicate" or cell in kept] if full else few


def config_of(config: Config, cell: Cell) -> Config:
    """The config of a cell."""
    return parse_config(_tree(config, cell))


def rows_of(config: Config, cell: Cell) -> Tensor:
    """The global batch of a cell, int64 [rows, S+1]; equal in all cells with as many rows, padded or not.

    No two rows begin alike: equal tokens in equal places could tie in a queue that spans sequences. Where documents do
    not see each other, a row holds several.
    """
    vocabulary, length = config.model.vocab_size, config.data.sequence_length_tokens
    generator = torch.Generator().manual_seed(config.seed)
    first = torch.randperm(vocabulary, generator=generator)
    count = sum(cell.batch.rows)
    rest = torch.randint(vocabulary, (count, length), generator=generator)
    end = end_of_text(config)
    if end is not None:
        rest[torch.rand(rest.shape, generator=generator) < _ENDS] = end
    rows = torch.cat([first[torch.arange(count) % vocabulary, None], rest], dim=1)
    return _padded(rows) if cell.batch.padded else rows


def _padded(rows: Tensor) -> Tensor:
    """The rows without some of their targets; in the second half, which is the last rank's, without any token."""
    count, length = len(rows), rows.shape[1] - 1
    lengths = torch.tensor([length, length // 2, 1, length - 1])[torch.arange(count) % 4]
    kept = torch.where(torch.arange(count) < count // 2, lengths + 1, 0)
    return rows.masked_fill(torch.arange(length + 1) >= kept[:, None], PADDING)


def cut_of(cell: Cell) -> list[list[tuple[int, int]]]:
    """(first row, rows) of every micro-batch, by micro-step and rank, as a training step cuts them."""
    count, rows = sum(cell.batch.rows), cell.batch.rows
    parts = math.ceil(math.ceil(count / len(rows)) / cell.batch.micro)
    starts = [sum(rows[:rank]) for rank in range(len(rows))]
    pieces = [
        [(start + int(part[0]) if len(part) else start, len(part)) for part in torch.arange(n).tensor_split(parts)]
        for start, n in zip(starts, rows, strict=True)
    ]
    return [list(at_once) for at_once in zip(*pieces, strict=True)]


def depends_on_cut(moe: MoEConfig) -> bool:
    """Whether the config asks for what by its definition depends on how the batch is cut."""
    by_rank = moe.capacity_group == "rank" and moe.capacity_factor is not None
    return by_rank or moe.balance_scope == "micro_batch" or moe.global_balance != "exact"


def oracle_key(config: Config, cell: Cell) -> str:
    """Names what the oracle of a cell depends on: cells with equal keys share it."""
    tree = _tree(config, cell)
    cut = cut_of(cell) if depends_on_cut(config_of(config, cell).model.moe) else None
    return repr((tree["model"]["moe"], sum(cell.batch.rows), cell.batch.padded, cut))


def _places(config: Config, ranks: int) -> Iterator[tuple[Layout, str]]:
    """Layouts with each dispatcher that makes a difference in them."""
    for layout in legal_layouts(config, ranks):
        for dispatch in _DISPATCHERS if layout.expert > 1 else _DISPATCHERS[:1]:
            yield layout, dispatch
    for layout in legal_layouts(config, ranks, _NODE_RANKS):
        if layout.expert > _NODE_RANKS:  # on one node there is nothing to do in two levels
            yield layout, "two_level"


def _capacities(config: Config) -> list[str]:
    return list(CAPACITIES) if config.model.moe_blocks else [AS_CONFIGURED]


def _scopes(config: Config) -> list[str]:
    """The scopes of the balance terms; without any, and without experts, only the configured one."""
    moe = config.model.moe
    balances = moe.balance_loss > 0 or moe.group_balance_loss > 0
    return list(SCOPES) if balances and len(_capacities(config)) > 1 else [moe.balance_scope]


def _recomputes() -> list[str | None]:
    """The kinds of recompute that the config knows."""
    known = TrainConfig.model_fields.get("recompute")
    return [None] if known is None else list(get_args(known.annotation))


def _batches(readers: int, ranks: int) -> list[Batch]:
    """Cuts for so many ranks that read rows of their own."""
    whole = max(8, 2 * ranks)
    batches = [Batch("even", _even(whole, readers), micro) for micro in (4, 2, 1)]
    batches.append(Batch("unequal", _even(whole - 1, readers), 2))
    batches.append(Batch("padded", _even(whole, readers), 2, padded=True))
    if readers > 1:
        batches.append(Batch("a rank without rows", (*_even(whole, readers - 1), 0), 2))
    return batches


def _even(rows: int, readers: int) -> tuple[int, ...]:
    """The loader's cut: neighbouring rows, sizes differ by at most one."""
    return tuple(rows * (reader + 1) // readers - rows * reader // readers for reader in range(readers))


def _keeps_otherwise(layout: Layout, keeping: str) -> bool:
    """Whether ranks of a layout would keep anything else than they do anyway."""
    match keeping:
        case "zero1":
            return layout.ranks > 1
        case "fsdp":
            return layout.data > 1 or layout.expert_data > 1
        case "fsdp in pairs":
            return layout.data > 2 and layout.data % 2 == 0
    return True


def _placed(config: Config, cell: Cell) -> Cell | None:
    """A cell with the layout that its config asks for; None if the config refuses it or says the same anyway."""
    tree, plain = _tree(config, cell), _tree(config, replace(cell, capacity=AS_CONFIGURED))
    again = cell.capacity != AS_CONFIGURED and tree["model"]["moe"] == plain["model"]["moe"]
    if again or find_problems(tree):
        return None
    try:
        return replace(cell, layout=layout_of(parse_config(tree), cell.layout.ranks, cell.layout.ranks_per_node))
    except LayoutError:
        return None


def _tree(config: Config, cell: Cell) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    moe, layout = tree["model"]["moe"], cell.layout
    moe |= {**CAPACITIES[cell.capacity], "balance_scope": cell.scope}
    if cell.scope != "global":
        moe["global_balance"] = "exact"
    if not moe["pad_to_capacity"] and moe["backend"] == "batched":
        moe["backend"] = "auto"
    chunks = 1 if moe["pad_to_capacity"] else tree["parallel"]["overlap_chunks"]
    tree["parallel"] |= {"expert": layout.expert, "tensor": layout.tensor, "expert_tensor": layout.expert_tensor}
    tree["parallel"] |= {"dispatch": cell.dispatch, "overlap_chunks": chunks, "ranks_per_node": layout.ranks_per_node}
    tree["parallel"] |= KEEPINGS[cell.keeping]
    tree["train"] |= {"global_batch_sequences": sum(cell.batch.rows), "micro_batch_sequences": cell.batch.micro}
    tree["train"] |= {} if cell.recompute is None else {"recompute": cell.recompute}
    return tree


def _covering(cells: Sequence[Cell]) -> list[Cell]:
    """Few cells in which every pair of choices that meets in any cell meets: those that add most pairs first."""
    pairs_of = [set(combinations(_choices(cell), 2)) for cell in cells]
    order = list(range(len(cells)))
    random.Random(0).shuffle(order)
    taken: set[int] = set()
    met: set[Any] = set()
    for least in range(max(map(len, pairs_of)), 0, -1):
        for index in order:
            if len(pairs_of[index] - met) >= least:
                taken.add(index)
                met |= pairs_of[index]
    return [cell for index, cell in enumerate(cells) if index in taken]


def _choices(cell: Cell) -> tuple[tuple[str, Any], ...]:
    place = ("place", (replace(cell.layout, data_shard=1, expert_shard=1), cell.dispatch))
    batch = ("batch", (cell.batch.name, cell.batch.micro))
    options = (("capacity", cell.capacity), ("scope", cell.scope), ("recompute", cell.recompute))
    return place, batch, ("keeping", cell.keeping), *options


def _divisors(number: int) -> list[int]:
    return [n for n in range(number, 0, -1) if number % n == 0]

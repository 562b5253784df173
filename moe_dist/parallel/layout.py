"""Degrees of parallelism and the two views of the same ranks that they make; checked, without any process group.

All ranks share the data; the dense view says who holds which cut of the dense parameters, the expert view who holds
which experts. Both are foldings of the same line of ranks, the fastest index last:

    dense    rank = data * T + tensor
    expert   rank = (copy * X + expert) * Y + expert_tensor

    W = 4, T = 2, X = 2, Y = 1       tensor 0         tensor 1
    data 0, expert copy 0            rank 0, expert 0  rank 1, expert 1    <- exchange tokens with each other
    data 1, expert copy 1            rank 2, expert 0  rank 3, expert 1
                                          ^ sum expert gradients down each column

Neighbours are near: tensor groups and expert groups stay inside a node where they can. The expert degree may span data
and tensor ranks, and the expert-tensor degree need not be the tensor degree.

Letters: W ranks, T tensor degree, X expert degree, Y expert-tensor degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moe_dist.config import Config, ParallelConfig
from moe_dist.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism.

    Attributes:
        ranks: Processes of the run.
        expert: Ranks that share one copy of the experts and exchange tokens.
        num_experts: Routed experts of a layer.
        ranks_per_node: Neighbouring ranks that share a node, where the dispatcher asks for it; divides `expert`.
        tensor: Ranks that share one copy of the dense parameters.
        expert_tensor: Ranks that share each expert, by its width.
        data_shard: Data ranks that share out one copy of their dense parameters (fsdp); 1 where each keeps all.
        expert_shard: Ranks that share out one copy of the same experts.
    """

    ranks: int
    expert: int
    num_experts: int
    ranks_per_node: int | None = None
    tensor: int = 1
    expert_tensor: int = 1
    data_shard: int = 1
    expert_shard: int = 1

    @property
    def data(self) -> int:
        """Copies of the dense parameters: ranks that read different rows, by groups of `tensor`."""
        return self.ranks // self.tensor

    @property
    def expert_data(self) -> int:
        """Copies of the experts."""
        return self.ranks // (self.expert * self.expert_tensor)

    @property
    def shards(self) -> bool:
        """Whether any parameter is shared out over ranks that would otherwise hold the same."""
        return self.data_shard > 1 or self.expert_shard > 1

    def data_place(self, rank: int) -> int:
        """Which rows of the batch a rank reads."""
        return rank // self.tensor

    def tensor_place(self, rank: int) -> int:
        """Which cut of the dense parameters a rank holds."""
        return rank % self.tensor

    def expert_copy(self, rank: int) -> int:
        """Which copy of the experts a rank belongs to."""
        return rank // (self.expert * self.expert_tensor)

    def expert_place(self, rank: int) -> int:
        """Position of a rank in its expert group."""
        return rank // self.expert_tensor % self.expert

    def expert_tensor_place(self, rank: int) -> int:
        """Which cut of its experts' width a rank holds."""
        return rank % self.expert_tensor

    def experts_of(self, place: int) -> range:
        """Global ids of the experts at a place of an expert group; sizes differ by one where X does not divide E."""
        return range(self.num_experts * place // self.expert, self.num_experts * (place + 1) // self.expert)

    def groups(self) -> dict[str, list[list[int]]]:
        """The ranks of every process group, by kind: those that agree on all but one index of a view.

        Where parameters are shared out over some of the ranks that hold the same, `data_shard` and `expert_shard` are
        those that share one copy, `data_copies` and `expert_copies` those that keep the same part of different copies.
        """
        ranks = range(self.ranks)
        expert = {rank: (self.expert_copy(rank), self.expert_tensor_place(rank)) for rank in ranks}
        same_experts = {rank: (self.expert_place(rank), self.expert_tensor_place(rank)) for rank in ranks}
        groups = {
            "tensor": _by({rank: self.data_place(rank) for rank in ranks}),
            "data": _by({rank: self.tensor_place(rank) for rank in ranks}),
            "expert": _by(expert),
            "expert_data": _by(same_experts),
            "expert_tensor": _by({rank: rank // self.expert_tensor for rank in ranks}),
        }
        hybrid = (("data", self.data, self.data_shard), ("expert", self.expert_data, self.expert_shard))
        for kind, alike, shard in hybrid:
            if 1 < shard < alike:
                rows = groups["data" if kind == "data" else "expert_data"]
                groups[f"{kind}_shard"] = [row[at : at + shard] for row in rows for at in range(0, alike, shard)]
                groups[f"{kind}_copies"] = [row[place::shard] for row in rows for place in range(shard)]
        return groups

    def node_groups(self) -> tuple[list[list[int]], list[list[int]]]:
        """The ranks of every node, and those of the same place in the nodes of one expert group.

        Example, 8 ranks in expert groups of 4 and nodes of 2: nodes 01 23 45 67, rails 02 13 46 57.
        """
        size = self.ranks_per_node
        assert size is not None, "only a layout that knows nodes has groups of them"
        copies = range(0, self.ranks, self.expert)
        nodes = [list(range(first, first + size)) for first in range(0, self.ranks, size)]
        rails = [list(range(copy + place, copy + self.expert, size)) for copy in copies for place in range(size)]
        return nodes, rails

    def __str__(self) -> str:
        dense = f"data {self.data} x tensor {self.tensor}"
        experts = f"expert-data {self.expert_data} x expert {self.expert} x expert-tensor {self.expert_tensor}"
        shared = f"; fsdp over {self.data_shard} and {self.expert_shard}" if self.shards else ""
        return f"{self.ranks} ranks: {dense}; {experts}{shared}"


def ranks_of_node(parallel: ParallelConfig, environment: Mapping[str, str]) -> int | None:
    """Ranks that share a node, of the config or the launcher; None where the dispatcher does not ask.

    Raises:
        LayoutError: Neither says.
    """
    if parallel.dispatch != "two_level" or parallel.ranks_per_node is not None:
        return parallel.ranks_per_node
    launched = environment.get("LOCAL_WORLD_SIZE", "")
    if not launched.isdecimal() or int(launched) < 1:
        rule = (
            f"two_level asks how many ranks share a node; LOCAL_WORLD_SIZE of the launcher is {launched or 'not set'}"
        )
        raise LayoutError("parallel.ranks_per_node", None, rule, "parallel.ranks_per_node=1 or more")
    return int(launched)


def layout_of(config: Config, ranks: int, ranks_per_node: int | None = None) -> Layout:
    """The layout that a config asks for; an expert degree that it leaves open is the largest legal one.

    Raises:
        LayoutError: There is none; with the rule that is broken and the nearest legal layouts.
    """
    asked = config.parallel
    degrees = _Degrees(asked.tensor, asked.expert or 1, asked.expert_tensor)
    if asked.expert is None:
        open_ones = [_Degrees(asked.tensor, x, asked.expert_tensor) for x in _divisors(ranks)]
        degrees = next((d for d in reversed(open_ones) if not _problem(config, ranks, d, ranks_per_node)), degrees)
    problem = _problem(config, ranks, degrees, ranks_per_node)
    if problem:
        name, rule = problem
        beside = {
            "ranks_per_node": (ranks_per_node, degrees.expert),
            "data_shard": (asked.data_shard, ranks // degrees.tensor),
        }
        if name in beside:
            value, whole = beside[name]
            fix = min(_divisors(whole), key=lambda n: abs(n - (value or 1)))
            raise LayoutError(f"parallel.{name}", value, rule, f"parallel.{name}={fix}")
        raise LayoutError(f"parallel.{name}", getattr(degrees, name), rule, _nearest(config, ranks, degrees))
    return _layout(config, ranks, degrees, ranks_per_node)


def legal_layouts(config: Config, ranks: int, ranks_per_node: int | None = None) -> list[Layout]:
    """Every layout of so many ranks that the config's model can take, whatever degrees it asks for."""
    legal = (d for d in _all_degrees(ranks) if not _problem(config, ranks, d, ranks_per_node))
    return [_layout(config, ranks, degrees, ranks_per_node) for degrees in legal]


@dataclass(frozen=True)
class _Degrees:
    tensor: int
    expert: int
    expert_tensor: int

    def far(self, other: _Degrees) -> float:
        """Distance in doublings."""
        pairs = ((self.tensor, other.tensor), (self.expert, other.expert), (self.expert_tensor, other.expert_tensor))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


def _layout(config: Config, ranks: int, degrees: _Degrees, node: int | None) -> Layout:
    experts = config.model.moe.num_experts
    plain = Layout(ranks, degrees.expert, experts, node, degrees.tensor, degrees.expert_tensor)
    if config.parallel.data != "fsdp":
        return plain
    wanted = config.parallel.data_shard or ranks
    # Experts are on fewer ranks alike than dense parameters are: there they are shared out as far as it goes.
    return replace(plain, data_shard=math.gcd(plain.data, wanted), expert_shard=math.gcd(plain.expert_data, wanted))


def _problem(config: Config, ranks: int, degrees: _Degrees, node: int | None) -> tuple[str, str] | None:
    """(name, rule) of the first rule that the degrees break."""
    return next(_problems(config, ranks, degrees, node), None)


def _problems(config: Config, ranks: int, degrees: _Degrees, node: int | None) -> Iterator[tuple[str, str]]:
    tensor, expert, cut = degrees.tensor, degrees.expert, degrees.expert_tensor
    if ranks % tensor:
        yield "tensor", f"must divide the {ranks} ranks"
    for name, size in _cut_by_tensor(config).items():
        if size % tensor:
            yield "tensor", f"must divide {name} ({size})"
    if ranks % cut:
        yield "expert_tensor", f"must divide the {ranks} ranks"
    if config.model.moe.expert_width % cut:
        yield "expert_tensor", f"must divide model.moe.expert_width ({config.model.moe.expert_width})"
    moe, experts = config.model.moe, config.model.moe.num_experts
    inside = moe.latent_width or config.model.width
    if moe.expert_bias and inside % cut:
        yield "expert_tensor", f"must divide the width of an expert's bias ({inside})"
    if tensor > 1 and moe.router == "expert_choice":
        yield "tensor", "must be 1 for model.moe.router=expert_choice: experts choose among all tokens of a micro-batch"
    if tensor > 1 and moe.pad_to_capacity:
        yield "tensor", "must be 1 for model.moe.pad_to_capacity: ranks of a tensor group share the rows of a capacity"
    if cut > 1 and config.parallel.dispatch in ("two_level", "deepep"):
        yield "expert_tensor", f"must be 1 for parallel.dispatch={config.parallel.dispatch}"
    if ranks % (expert * cut) or expert > experts:
        beside = f" over parallel.expert_tensor ({cut})" if cut > 1 else ""
        yield "expert", f"must divide the {ranks} ranks{beside} and not exceed model.moe.num_experts ({experts})"
    shard = config.parallel.data_shard
    if config.parallel.data == "fsdp" and shard is not None and (ranks // tensor) % shard:
        yield "data_shard", f"must divide the {ranks // tensor} ranks that read rows of their own"
    if node is not None and expert % node:
        rule = f"must divide the {expert} ranks that share one copy of the experts, so that nodes cut them equally"
        yield "ranks_per_node", rule


def _cut_by_tensor(config: Config) -> dict[str, int]:
    """What tensor parallelism cuts into equal parts, by key."""
    model = config.model
    sizes = {"model.num_kv_heads": model.num_kv_heads, "model.vocab_size": model.vocab_size}
    sizes["data.sequence_length_tokens"] = config.data.sequence_length_tokens
    if len(model.moe_blocks) < model.num_layers:
        sizes["model.ffn_width"] = model.ffn_width
        sizes |= {"model.mix.rank": model.mix.rank} if model.mix.kind == "adapter" else {}
    return sizes


def _nearest(config: Config, ranks: int, asked: _Degrees, most: int = 3) -> str:
    """The nearest legal degrees, as overrides. There always are some: one rank for everything but data."""
    legal = [d for d in _all_degrees(ranks) if not _problem(config, ranks, d, None)]
    best = sorted(legal, key=lambda d: (asked.far(d), -d.expert))[:most]
    first, *others = [_overrides(d, asked) for d in best]
    return first + (f" (or {'; or '.join(others)})" if others else "")


def _overrides(degrees: _Degrees, asked: _Degrees) -> str:
    """What of the asked degrees must change."""
    names = [n for n in ("tensor", "expert", "expert_tensor") if getattr(degrees, n) != getattr(asked, n)]
    return " ".join(f"parallel.{name}={getattr(degrees, name)}" for name in names)


def _all_degrees(ranks: int) -> list[_Degrees]:
    some = _divisors(ranks)
    return [_Degrees(t, x, y) for t in some for y in some for x in some]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _by(key_of: Mapping[int, object]) -> list[list[int]]:
    """Ranks with equal keys, in order."""
    groups: dict[object, list[int]] = {}
    for rank, key in key_of.items():
        groups.setdefault(key, []).append(rank)
    return list(groups.values())

"""Expert-tensor parallelism: each expert is cut by its width over the ranks of an expert-tensor group.

Every rank of the group brings the rows that reached it; all compute their part of all rows, and the parts are added up
where the rows came from. The group's degree has nothing to do with the tensor degree of the dense parts.

Shape letters: R rows of this rank, M rows of all ranks of the group, Y ranks of the group, L experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.model.naming import Cut
from moe_dist.moe.experts import Experts
from moe_dist.parallel.collectives import arrived_rows, exchange_integers, start_rows
from moe_dist.parallel.mesh import Mesh


class CutExperts(Experts):
    """A rank's cut of its experts: every F columns of the first product and the rows of `down` that go with them."""

    def __init__(self, width: int, config: MoEConfig, mesh: Mesh) -> None:
        parts = mesh.layout.expert_tensor
        cut = config.model_copy(update={"expert_width": config.expert_width // parts})
        super().__init__(width, cut, mesh.experts_here)
        self.group = mesh.expert_tensor
        place = mesh.layout.expert_tensor_place(mesh.rank)
        first = "up" if self.gate_up is None else "gate_up"
        in_sections = Cut(0, parts, place, self.activation.parts)
        self.cuts = {first: in_sections, f"{first}_bias": in_sections}
        self.cuts |= dict.fromkeys(("down", "down_bias"), Cut(0, parts, place))
        self.place = place
        if self.down_bias is not None:  # cut by what it is added to: each rank adds its part, and the sum has all
            self.down_bias = nn.Parameter(torch.empty(len(self.expert_ids), self.down.shape[2] // parts))

    def biases(self, kind: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """As of whole experts; of the last bias only what this rank adds."""
        found = super().biases(kind)
        if found is None:
            return None
        here = found[1].shape[1]
        behind = self.down.shape[2] - (self.place + 1) * here
        return found[0], F.pad(found[1], (self.place * here, behind))

    def takes_tokens(self, x_TD: Tensor) -> bool:
        """Never: rows of other ranks come in between."""
        return False

    def forward(self, rows_RD: Tensor, counts_L: list[int]) -> Tensor:
        """As of whole experts; entered by all ranks of the group."""
        gathered = gather_rows(rows_RD, counts_L, self.group)
        return sum_and_return(super().forward(gathered.rows_MD, gathered.counts_L), gathered, self.group)


@dataclass(frozen=True)
class Gathered:
    """Rows of the ranks that share some experts, sorted by expert.

    Attributes:
        rows_MD: All of them.
        counts_L: Rows of each expert.
        order_M: Place of each among the rows in order of rank.
        sizes: Rows of each rank.
    """

    rows_MD: Tensor
    counts_L: list[int]
    order_M: Tensor
    sizes: list[int]


def gather_rows(rows_RD: Tensor, counts_L: list[int], group: dist.ProcessGroup) -> Gathered:
    """Brings together what the ranks of an expert-tensor group have for their experts.

    Args:
        rows_RD: Rows here, sorted by expert.
        counts_L: Rows here of each expert.
        group: Ranks that hold a cut of the same experts each.
    """
    ranks, experts = dist.get_world_size(group), len(counts_L)
    told = torch.tensor(counts_L, dtype=torch.int64, device=rows_RD.device).repeat(ranks)
    counts_YL = exchange_integers(told, [experts] * ranks, [experts] * ranks, group).view(ranks, experts)
    sizes = counts_YL.sum(1).tolist()
    here = [rows_RD.shape[0]] * ranks
    rows_MD = arrived_rows(start_rows(rows_RD.repeat(ranks, 1), here, sizes, group))
    expert_M = torch.arange(experts, device=rows_RD.device).repeat(ranks).repeat_interleave(counts_YL.flatten())
    order_M = torch.argsort(expert_M, stable=True)
    return Gathered(rows_MD.index_select(0, order_M), counts_YL.sum(0).tolist(), order_M, sizes)


def sum_and_return(y_MD: Tensor, gathered: Gathered, group: dist.ProcessGroup) -> Tensor:
    """Adds up the cuts' parts of every row on the rank that it came from, in its order."""
    ranks, here = len(gathered.sizes), gathered.sizes[dist.get_rank(group)]
    by_rank_MD = y_MD.index_select(0, torch.argsort(gathered.order_M))
    parts = arrived_rows(start_rows(by_rank_MD, gathered.sizes, [here] * ranks, group))
    return parts.unflatten(0, (ranks, here)).sum(0)

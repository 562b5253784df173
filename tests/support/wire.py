"""Counting what a rank really hands to collectives for other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel import collectives


class Wire:
    """Adds up the bytes of every all-to-all that leave this rank, by group and destination."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[dist.ProcessGroup, int]] = Counter()
        self.really_exchange = dist.all_to_all_single

    @contextmanager
    def tapped(self) -> Iterator[Wire]:
        """While inside, exchanges are counted."""
        with mock.patch.object(collectives.dist, "all_to_all_single", self.exchange):
            yield self

    def exchange(
        self,
        out: Tensor,
        given: Tensor,
        out_splits: list[int],
        splits: list[int],
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        row_bytes = given[0].nbytes if given.shape[0] else 0
        for place, count in enumerate(splits):
            if place != dist.get_rank(group):
                self.sent[group, dist.get_global_rank(group, place)] += row_bytes * count
        return self.really_exchange(out, given, out_splits, splits, group=group, async_op=async_op)

    def to_other_nodes(self, ranks_per_node: int) -> int:
        """Bytes to ranks of other nodes."""
        here = dist.get_rank() // ranks_per_node
        return sum(sent for (_, rank), sent in self.sent.items() if rank // ranks_per_node != here)

    def taken(self, group: dist.ProcessGroup | None = None) -> int:
        """Bytes since this was last asked: over one group, or over all."""
        mine = [key for key in self.sent if group is None or key[0] is group]
        return sum(self.sent.pop(key) for key in mine)

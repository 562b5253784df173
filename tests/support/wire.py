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
    """Adds up the bytes of every all-to-all that leave this rank, by group."""

    def __init__(self) -> None:
        self.sent: Counter[dist.ProcessGroup] = Counter()
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
        self.sent[group] += row_bytes * (sum(splits) - splits[dist.get_rank(group)])
        return self.really_exchange(out, given, out_splits, splits, group=group, async_op=async_op)

    def taken(self, group: dist.ProcessGroup | None = None) -> int:
        """Bytes since this was last asked: over one group, or over all."""
        taken = self.sent.total() if group is None else self.sent[group]
        if group is None:
            self.sent.clear()
        else:
            self.sent[group] = 0
        return taken

"""Counting what a rank really hands to collectives for other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel import collectives


class Wire:
    """Adds up the bytes of every all-to-all that leave this rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.sent = rank, 0
        self.really_exchange = dist.all_to_all_single

    @contextmanager
    def tapped(self) -> Iterator[Wire]:
        """While inside, exchanges are counted."""
        with mock.patch.object(collectives.dist, "all_to_all_single", self.exchange):
            yield self

    def exchange(self, out: Tensor, given: Tensor, out_splits: list[int], splits: list[int], group: Any) -> None:
        row_bytes = given[0].nbytes if given.shape[0] else 0
        self.sent += row_bytes * (sum(splits) - splits[self.rank])
        self.really_exchange(out, given, out_splits, splits, group=group)

    def taken(self) -> int:
        """Bytes since this was last asked."""
        sent, self.sent = self.sent, 0
        return sent

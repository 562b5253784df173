"""A stand-in for the module `deep_ep` over gloo: the calls of `Buffer` that the adapter uses, with their rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """Copies tokens to ranks and adds up what comes back. A handle says which token went where."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.rank, self.group_size = group, dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return _Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        per_rank = num_experts // self.group_size
        owner = torch.where(topk_idx >= 0, topk_idx // per_rank, -1)
        goes = (owner[:, None, :] == torch.arange(self.group_size)[None, :, None]).any(-1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return goes.sum(0).int(), None, per_expert.int(), goes, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return self._copies(x, handle), None, None, None, None, None
        assert is_token_in_rank is not None and topk_idx is not None and num_tokens_per_expert is not None
        received: list[Any] = [None] * self.group_size
        dist.all_gather_object(received, is_token_in_rank.sum(0).tolist(), group=self.group)
        handle = (is_token_in_rank, [counts[self.rank] for counts in received])
        per_rank = num_tokens_per_expert.numel() // self.group_size
        idx = self._copies(topk_idx, handle) - self.rank * per_rank
        here = (idx >= 0) & (idx < per_rank)
        idx = torch.where(here, idx, -1)
        weights = torch.where(here, self._copies(topk_weights, handle), 0)
        counts = torch.bincount(idx[here], minlength=per_rank).tolist()
        return self._copies(x, handle), idx, weights, counts, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        weights = None if topk_weights is None else self._sums(topk_weights, handle)
        return self._sums(x, handle), weights, None

    def _copies(self, rows: Tensor | None, handle: Any) -> Tensor:
        assert rows is not None and rows.is_contiguous()
        goes, received = handle
        out = rows.new_empty(sum(received), *rows.shape[1:])
        sent = torch.cat([rows[goes[:, w]] for w in range(self.group_size)])
        dist.all_to_all_single(out, sent, received, goes.sum(0).tolist(), group=self.group)
        return out

    def _sums(self, rows: Tensor, handle: Any) -> Tensor:
        assert rows.is_contiguous()
        goes, received = handle
        back = rows.new_empty(int(goes.sum()), *rows.shape[1:])
        dist.all_to_all_single(back, rows, goes.sum(0).tolist(), received, group=self.group)
        out = rows.new_zeros(goes.shape[0], *rows.shape[1:])
        for w, part in enumerate(back.split(goes.sum(0).tolist())):
            out[goes[:, w]] += part
        return out

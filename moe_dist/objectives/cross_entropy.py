"""Cross-entropy over chunks of tokens: the scores of a whole micro-batch never exist at once.

Shape letters: T tokens, C tokens of a chunk, D model width, V vocabulary (or the part of it that is here).

    z = h W^T        nats = log sum exp z - z[target]        slope = softmax z - (1 at the target)
                     dh = slope W                            dW = sum over chunks of slope^T h

In training the forward pass of a chunk makes its gradients too, so that its scores are made once and die. They are
those of the *sum* of nats, whose own gradient is one number: the backward multiplies by it, and that is exact. The
gradient of single tokens' nats, weighed differently, cannot be had so; those are given without gradient.
Source: Hsu et al. 2024 (Liger Kernel, fused linear cross-entropy); statistics in fp32 or wider, over bf16 scores too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_dist.model.vocabulary import VocabularyShare
from moe_dist.moe.product import add_product, product


def summed_nats(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, vocabulary: VocabularyShare, chunk: int | None
) -> Tensor:
    """The cross-entropy of all targets, a differentiable scalar in fp32 or wider.

    Args:
        hidden_TD: Normed final hidden states.
        weight_VD: Output weight, of which the embedding may be another use.
        target_T: Ids, int64.
        vocabulary: Which part of it is here.
        chunk: Tokens whose scores exist at once; None for all.
    """
    if not torch.is_grad_enabled():
        return nats_of_tokens(hidden_TD, weight_VD, target_T, vocabulary, chunk).sum()
    return _SummedNats.apply(hidden_TD, weight_VD, target_T, vocabulary, chunk)


@torch.no_grad()
def nats_of_tokens(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, vocabulary: VocabularyShare, chunk: int | None
) -> Tensor:
    """The cross-entropy of every target, [T] in fp32 or wider, without gradient."""
    narrow, exact = _types(hidden_TD)
    weight_VD, nats_T = weight_VD.to(narrow), hidden_TD.new_empty(len(target_T), dtype=exact)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for rows in _chunks(len(target_T), chunk):
            logits_CV = product(hidden_TD[rows].to(narrow), weight_VD.T).to(exact)
            nats_T[rows] = score(logits_CV, target_T[rows], vocabulary)[0]
            del logits_CV  # before the next are made
    return nats_T


def score(logits_CV: Tensor, target_C: Tensor, vocabulary: VocabularyShare) -> tuple[Tensor, Tensor]:
    """Nats of a chunk's targets [C], and their gradient by the scores [C, V], which are overwritten by it.

    Where processes share the vocabulary, the largest score, the sum of exponentials and the score of the target are
    each told to all of them, and no score else.
    """
    local_C = target_C - vocabulary.first
    here_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
    local_C1 = local_C.where(here_C, 0)[:, None]
    top_C = vocabulary.largest(logits_CV.amax(-1))
    told_C = logits_CV.sub_(top_C[:, None]).gather(1, local_C1)[:, 0].where(here_C, 0)
    sums_2C = vocabulary.total(torch.stack([logits_CV.exp_().sum(-1), told_C]))
    slope_CV = logits_CV.div_(sums_2C[0, :, None])
    slope_CV.scatter_add_(1, local_C1, -here_C.to(slope_CV.dtype)[:, None])
    return sums_2C[0].log() - sums_2C[1], slope_CV


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *options: Any) -> Tensor:
        vocabulary, chunk = options
        narrow, exact = _types(hidden_TD)
        narrow_VD, nats_T = weight_VD.to(narrow), hidden_TD.new_empty(len(target_T), dtype=exact)
        grad_TD, grad_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD)

        def take(rows: slice) -> None:
            h_CD = hidden_TD[rows].to(narrow)
            nats_T[rows], slope_CV = score(product(h_CD, narrow_VD.T).to(exact), target_T[rows], vocabulary)
            slope_CV = slope_CV.to(narrow)
            grad_TD[rows] = product(slope_CV, narrow_VD)
            add_product(grad_VD, slope_CV.T, h_CD)

        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows in _chunks(len(target_T), chunk):
                take(rows)
        ctx.save_for_backward(grad_TD, grad_VD)
        return nats_T.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():  # another backward will want them as they are
            grad_TD, grad_VD = grad_TD.clone(), grad_VD.clone()
        return grad_TD.mul_(grads[0]), grad_VD.mul_(grads[0]), None, None, None


def _types(hidden_TD: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(of the products, of the statistics): autocast narrows the first alone."""
    kind = hidden_TD.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_TD.dtype
    return narrow, torch.promote_types(narrow, torch.float32)


def _chunks(count: int, size: int | None) -> Iterator[slice]:
    size = size or max(count, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))

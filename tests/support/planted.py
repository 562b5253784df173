"""Planting a mistake and seeing whether its test catches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from moe_dist.model.naming import GlobalTensor, pieces_by_parameter

# Where the mistake goes, the name that it replaces, the mistake, and the test that must fail.
Planted = tuple[Any, str, Any, Callable[[], Any]]


def idle_experts_unfilled(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of the expert loop that leaves the gradients of experts without rows as memory was."""

    def left(ctx: Any, *grads: Tensor) -> Any:
        found = backward(ctx, *grads)
        idle = torch.tensor([count == 0 for count in ctx.job.counts_L])
        for grad in found[2:4]:
            grad[idle] = torch.nan  # what uninitialised memory may hold
        return found

    return left


def named_by_place(model: Any) -> Iterator[tuple[str, list[GlobalTensor]]]:
    """`pieces_by_parameter` with experts named by their place in the stack of their rank."""
    for path, pieces in pieces_by_parameter(model):
        yield path, [p if p.index is None else replace(p, name=f"{path}#{p.index}") for p in pieces]


def failure_with(planted: Planted) -> str | None:
    """What the test says with the mistake in place, None where it sees nothing; without it the test must pass.

    Errors of other kinds get through: they are the planter's.
    """
    where, name, mistake, check = planted
    check()
    with mock.patch.object(where, name, mistake):
        try:
            check()
        except (AssertionError, ValueError, CheckpointError) as failure:
            return (str(failure).strip() or type(failure).__name__).splitlines()[0]
    return None

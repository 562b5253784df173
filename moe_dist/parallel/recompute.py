"""Recompute: what lies inside a block is computed again in the backward pass rather than kept.

| `train.recompute` | kept of a block with experts | runs twice |
|---|---|---|
| `selective` | its input, the normed input of the feed-forward, what routing, exchange and experts keep | the rest |
| `full` | its input and the routing decision | everything, exchanges included |

Of a dense block both keep the input alone.

`selective` checkpoints the parts to be computed again, and leaves out the others. Torch's other way, a policy that says
of every operation in a block whether its result is kept (`create_selective_checkpoint_contexts`), does not reach the
experts: it sees the operations of one thread and none that writes with `out=`, so the loop of experts would run twice.

**Exchanges.** With `full` they run again, in the middle of a backward pass, and all ranks must enter them at the same
point. Left alone, a rank computes a block again when its backward first reads a kept tensor, which is earlier or later
where a rank has no rows. So the last node of a block reads one: the first thing that the backward of a block does, on
every rank, is the whole block again. Autograd runs ready nodes in falling order of their sequence numbers, so by then
nothing of a later block is left, and nothing is under way. For the same reason the second run is never cut short
where all that is needed is there.

**Decisions** are made once (`ledger.decide_once`): the second run follows the choices, the drops and the demand of the
first, so that it asks no rank about balance, and counts, bytes and entropy are those of the first alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.model.block import Block
from moe_dist.model.places import Places
from moe_dist.model.transformer import Transformer
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer, MoERecord
from moe_dist.moe.ledger import decide_once


def recompute_blocks(model: Transformer, kind: Literal["none", "selective", "full"]) -> None:
    """Makes the blocks of a model compute again what `kind` says; after all that replaces or cuts their parts."""
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block), "a decoder is made of blocks"
        layer = block.feed_forward
        if kind == "none":
            continue
        if kind == "full" or not isinstance(layer, MoELayer):
            _recompute_whole(block, number)
            continue
        _recompute(block, "attend")
        if layer.shared is not None:
            _recompute(layer.shared, "forward")


def _recompute_whole(block: Block, number: int) -> None:
    run = block.forward

    def forward(
        x_BSD: Tensor, places: Places, counted_BS: Tensor | None, context: RoutingContext
    ) -> tuple[Tensor, MoERecord | None]:
        def run_as_told(x_BSD: Tensor, told: RoutingContext) -> tuple[Tensor, MoERecord | None]:
            out_BSD, record = run(x_BSD, places, counted_BS, told)
            return _FirstInBackward.apply(out_BSD), record

        return _checkpointed(decide_once(run_as_told, context, number), x_BSD)

    _replace(block, "forward", forward)


def _recompute(module: nn.Module, method: str) -> None:
    """For a method that returns one tensor or a tuple of them, and decides nothing."""
    run = getattr(module, method)
    _replace(module, method, lambda *given: _checkpointed(run, *given))


def _replace(module: nn.Module, method: str, changed: Callable[..., Any]) -> None:
    """Of this one module, whose parameters keep their names."""
    setattr(module, method, changed)


def _checkpointed(run: Callable[..., Any], *given: Any) -> Any:
    if not torch.is_grad_enabled():  # evaluation, and the pass that counts demand
        return run(*given)
    # No random number depends on torch's generators (moe/randomness.py).
    return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, early_stop=False)


class _FirstInBackward(torch.autograd.Function):
    """Hands a tensor through; its backward reads a kept one, at which the checkpoint around it runs again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach()[:0])
        return x.detach()  # the same memory, and to autograd no view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        assert len(ctx.saved_tensors) == 1, "reading is what matters"
        return grads[0]

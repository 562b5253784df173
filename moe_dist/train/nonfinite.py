"""Steps that are not finite: counted, named by their samples, and too many of them in a row; and a state that must not
be saved.

A step that is passed over takes its place in the order of the data and in the schedule of the learning rate, which go
by step number, but is no update: the optimizer's count of updates is the number of steps less those passed over. That
number goes with the checkpoint, in what it holds of the data: batches that were read and not learnt from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.checkpoint.pieces import MOMENTS, prepare_moments
from moe_dist.errors import NumericFault
from moe_dist.parallel.collectives import gather_objects
from moe_dist.parallel.fsdp import local
from moe_dist.parallel.zero import state_holders

if TYPE_CHECKING:
    from moe_dist.train.step import StepFigures, Trainee

_IN_DATA = "skipped_steps"
_FIX = "another run.dir with a lower optimizer.lr or train.precision=fp32, or look at the samples named"


def not_finite(step: int, figures: StepFigures, in_a_row: int = 1, samples: str = "") -> NumericFault:
    """The fault of step number `step` (from 0), the last of so many in a row."""
    value = f"loss {figures.loss}, gradient norm {figures.grad_norm}{samples}"
    times = f" in {in_a_row} steps in a row" if in_a_row > 1 else ""
    rule = "loss and gradient are finite, but for steps apart (watch.stop_after_nonfinite_steps)"
    return NumericFault(f"step {step + 1}", value + times, rule, f"{_FIX}; this run's checkpoints are intact")


class SkippedSteps:
    """The steps of a run that were passed over; the same on every rank.

    Args:
        trainee: What the steps would have changed.

    Attributes:
        total: Since the run began, by the steps that count: those a checkpoint forgot are counted when they are redone.
        in_a_row: Up to now.
    """

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee
        self.total = self.in_a_row = 0

    def see(self, step: int, figures: StepFigures) -> dict[str, Any] | None:
        """Counts step number `step` (from 1); returns what there is to tell of it if it was passed over.

        Raises:
            NumericFault: It was one too many in a row; on every rank alike.
        """
        if not figures.skipped:
            self.in_a_row = 0
            return None
        self._prepare_optimizer()
        self.total += 1
        self.in_a_row += 1
        batch = self.trainee.config.train.global_batch_sequences
        first, last = (step - 1) * batch, step * batch - 1
        if self.in_a_row >= self.trainee.config.watch.stop_after_nonfinite_steps:
            raise not_finite(step - 1, figures, self.in_a_row, f", samples {first} to {last}")
        told = {"step": step, "first_sample": first, "last_sample": last, "in_a_row": self.in_a_row}
        return told | {"loss": str(figures.loss), "grad_norm": str(figures.grad_norm)}

    def noted_in(self, data: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of the data, with the number of steps that were passed over."""
        return {**data, _IN_DATA: self.total}

    def restore(self, step: int, data: Mapping[str, Any]) -> None:
        """Takes up the count of a checkpoint after `step` steps, and corrects the optimizer's number of updates."""
        self.total, self.in_a_row = int(data.get(_IN_DATA, 0)), 0
        for holder in state_holders(self.trainee.optimizer):
            for state in holder.state.values():
                state["step"].fill_(step - self.total)

    def _prepare_optimizer(self) -> None:
        """Moments as they are before a first update, so that a checkpoint before it is like any other."""
        for holder in state_holders(self.trainee.optimizer):
            if isinstance(holder, torch.optim.AdamW) and not holder.state:
                prepare_moments(holder, 0)
                for state in holder.state.values():
                    for moment in MOMENTS:
                        state[moment].zero_()


@torch.no_grad()
def check_finite(trainee: Trainee, step: int) -> None:
    """That weights, biases and moments after `step` steps are worth saving; entered by all ranks.

    Raises:
        NumericFault: They are not all finite; on every rank alike.
    """
    tensors = {name: tensor for name, tensor in _state(trainee) if tensor.is_floating_point() and tensor.numel()}
    # The largest magnitude, which is NaN where anything is: in one pass, and without a mask of the size of the model.
    sizes = torch.stack([size.double() for size in torch._foreach_norm(list(tensors.values()), torch.inf)])
    bad = [name for name, fine in zip(tensors, sizes.isfinite().tolist(), strict=True) if not fine]
    found = gather_objects(bad[0] if bad else None, trainee.mesh.world)
    ranks = [rank for rank, name in enumerate(found) if name is not None]
    if ranks:
        value = f"not finite on ranks {ranks}"
        rule = "only a state whose weights and moments are finite is saved"
        fix = "the same command continues from the checkpoint before; if it comes again, a lower optimizer.lr"
        raise NumericFault(f"step {step}, {found[ranks[0]]}", value, rule, fix)


def _state(trainee: Trainee) -> Iterator[tuple[str, Tensor]]:
    """Everything here that training changes, by name."""
    names: dict[Tensor, str] = {}
    for name, weight in trainee.model.named_parameters():
        names[weight] = name
        yield name, local(weight)
    yield from trainee.model.named_buffers()
    for holder in state_holders(trainee.optimizer):
        for parameter, state in holder.state.items():
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    yield f"{kind} of {names[parameter]}", local(value)

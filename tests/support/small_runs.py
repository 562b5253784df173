"""A whole run of a small model on the ranks of a gang, with rows that follow from a cursor, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.parallel.fsdp import local
from moe_dist.parallel.zero import state_holders
from moe_dist.train.evaluate import HeldOut
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder
from moe_dist.train.step import Trainee
from tests.support.models import VOCAB, random_rows
from tests.support.parallel_step import parallel_trainee


class Rows:
    """This data rank's rows of one global batch after the other; `before` is told the step (from 1) that is to come."""

    def __init__(self, trainee: Trainee, before: Callable[[int], None] = lambda step: None) -> None:
        self.batch = trainee.config.train.global_batch_sequences
        self.place, self.ranks = trainee.mesh.data_place, trainee.mesh.layout.data
        self.before, self.step = before, 0

    def __next__(self) -> Tensor:
        rows = random_rows(self.batch, seed=self.step)
        self.step += 1
        self.before(self.step)
        return rows[self.batch * self.place // self.ranks : self.batch * (self.place + 1) // self.ranks]

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["cursor"]


def open_trainer(
    config: Config, degree: int, before: Callable[[Trainee], Callable[[int], None]] = lambda trainee: lambda step: None
) -> Trainer:
    """A restored trainer of this rank, under AdamW; `before` gets its model, and then the number of every step."""
    trainee = parallel_trainee(config, degree, optimizer="adamw")
    recorder = Recorder(Path(config.run.dir), trainee.mesh.rank == 0, flops_per_token=1e3, peak_flops=1e9)
    held_out = HeldOut(random_rows(4, seed=99), 4, torch.ones(VOCAB, dtype=torch.int64))
    trainer = Trainer(trainee, Rows(trainee, before(trainee)), held_out, recorder)
    trainer.restore()
    recorder.open(trainer.step, config.train.steps, [])
    return trainer


def run_to_the_end(trainer: Trainer, stop_after: int = 10_000) -> dict[str, Any]:
    """What the run ends with: its status or its fault, and its state."""
    asked = iter(range(1, 100_000))
    found: dict[str, Any] = {"first": trainer.step}
    try:
        found["status"] = trainer.run(lambda: next(asked) >= stop_after)
    except Exception as error:  # noqa: BLE001 - tests look at what it is
        found["fault"] = (type(error).__name__, str(error))
    finally:
        trainer.recorder.close()
    return found | {"step": trainer.step, "rows": trainer.recorder.rows, "state": state_of(trainer.trainee)}


def state_of(trainee: Trainee) -> dict[str, Tensor]:
    """Copies of everything that training changes here: weights, buffers, moments, counts of updates."""
    names = {parameter: name for name, parameter in trainee.model.named_parameters()}
    found = {name: local(parameter).detach().clone() for parameter, name in names.items()}
    found |= {name: buffer.clone() for name, buffer in trainee.model.named_buffers()}
    for holder in state_holders(trainee.optimizer):
        for parameter, state in holder.state.items():
            found |= {f"{kind} of {names[parameter]}": local(value).clone() for kind, value in state.items()}
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names whose tensors differ in any bit, or that only one has."""
    missing = first.keys() ^ second.keys()
    return sorted(missing) + [
        name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])
    ]


class Poison:
    """Makes one number of the model not finite, on this rank and in one step.

    Args:
        trainee: The model.
        where: `activation`: of what the embedding returns; `gradient`: of the gradient of that; `expert gradient`: of
            the gradient of what the experts of the first layer return.
    """

    def __init__(self, trainee: Trainee, where: str, value: float = float("nan")) -> None:
        self.on, self.value, self.where = False, value, where
        layer = next(layer for _, layer in trainee.model.moe_layers())
        module = layer.experts if where == "expert gradient" else trainee.model.embedding
        module.register_forward_hook(self._hook)

    def _hook(self, module: Any, given: Any, out: Tensor) -> Tensor:
        if self.on and self.where == "activation":
            return self._spoilt(out)
        if self.on and out.requires_grad:
            out.register_hook(self._spoilt)
        return out

    def _spoilt(self, value: Tensor) -> Tensor:
        value = value.clone()
        if value.numel():
            value.view(-1)[0] = self.value
        return value

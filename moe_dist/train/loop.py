"""The loop: batches in, updates made, and what happens every so many of them.

A step is one optimizer update; it is counted here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moe_dist.checkpoint.load import agree_on_newest, load_training_state
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.errors import CheckpointError
from moe_dist.train.evaluate import HeldOut, evaluate
from moe_dist.train.metrics import Recorder
from moe_dist.train.step import Trainee, train_step


class Batches(Protocol):
    """This rank's rows of one global batch after the other, from a cursor that knows no rank count."""

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """A run on one rank: restore, train, evaluate, save. Every method is entered by all ranks.

    Attributes:
        step: Updates made so far.
    """

    def __init__(self, trainee: Trainee, batches: Batches, held_out: HeldOut, recorder: Recorder) -> None:
        self.trainee, self.batches, self.held_out, self.recorder = trainee, batches, held_out, recorder
        self.config = trainee.config
        self.root = Path(self.config.run.dir) / "checkpoints"
        self.step = 0

    def restore(self) -> Path | None:
        """Continues from the newest checkpoint that proves whole, if there is one; returns its path."""
        warn = lambda text: self.recorder.event("message", text=text)  # noqa: E731
        found = agree_on_newest(self.root, self.trainee.mesh, warn)
        if found is None:
            return None
        path, manifest = found
        model = self.config.model.model_dump(mode="json")
        changed = [key for key, value in manifest["config"]["model"].items() if value != model.get(key)]
        if changed:
            rule = "a run continues with the model it was started with"
            raise CheckpointError(str(path), f"model.{changed[0]} differs", rule, "another run.dir, or the old config")
        self.batches.load_state_dict(manifest["data"])
        load_training_state(path, manifest, self.trainee.model, self.trainee.optimizer)
        self.step = manifest["step"]
        return path

    def run(self, stop_asked: Callable[[], bool]) -> str:
        """Trains to the last step or until some rank is asked to stop; returns `finished` or `interrupted`."""
        config, device = self.config, self.held_out.rows.device
        if self.step == 0 and 0 not in self.recorder.evaluations:
            self.evaluate()
        while self.step < config.train.steps:
            started = time.perf_counter()
            rows = next(self.batches).to(device)
            figures = train_step(self.trainee, rows, self.step, stop_asked())
            self.step += 1
            self.recorder.step(self.step, figures, time.perf_counter() - started)
            last = self.step == config.train.steps
            if last or figures.stop or self.step % config.checkpoint.every_steps == 0:
                self.save()
            if figures.stop and not last:
                return "interrupted"
            if last or (config.evaluate.every_steps and self.step % config.evaluate.every_steps == 0):
                self.evaluate()
        return "finished"

    def save(self) -> Path:
        """Publishes a checkpoint of this moment."""
        self.recorder.flush()
        saved = Saved(self.step, self.config.model_dump(mode="json"), self.batches.state_dict())
        trainee = self.trainee
        keep = self.config.checkpoint.keep
        path = save_checkpoint(self.root, trainee.model, trainee.optimizer, trainee.mesh, saved, keep)
        self.recorder.event("checkpoint", step=self.step, path=str(path))
        return path

    def evaluate(self) -> None:
        """Scores the held-out rows and records the result."""
        result = evaluate(self.trainee, self.held_out)
        self.recorder.evaluation(self.step, result.loss, result.bits_per_byte)

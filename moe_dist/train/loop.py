"""The loop: batches in, updates made, and what happens every so many of them.

A step is one optimizer update; it is counted here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moe_dist.checkpoint.agree import on_first_rank
from moe_dist.checkpoint.load import load_training_state, restore_newest
from moe_dist.checkpoint.manifest import Manifest
from moe_dist.checkpoint.memory import Keeper, MemoryCopies
from moe_dist.checkpoint.object_store import ObjectStore
from moe_dist.checkpoint.save import Saved, Saver
from moe_dist.checkpoint.source import Opens
from moe_dist.config import parse_config
from moe_dist.errors import CheckpointError
from moe_dist.parallel.waits import counted_waits
from moe_dist.train.alarms import Alarms
from moe_dist.train.checks import check_weights
from moe_dist.train.evaluate import HeldOut, evaluate
from moe_dist.train.metrics import Recorder
from moe_dist.train.nonfinite import SkippedSteps, check_finite
from moe_dist.train.step import StepFigures, Trainee, train_step


class Batches(Protocol):
    """This rank's rows of one global batch after the other, from a cursor that knows no rank count."""

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """A run on one rank: restore, train, evaluate, save. Every method is entered by all ranks.

    Args:
        trainee: What is trained.
        batches: Its rows.
        held_out: What it is scored on.
        recorder: Its record.
        keeper: Where the newest state is kept in memory (`checkpoint.memory_every_steps`).

    Attributes:
        step: Updates made so far.
    """

    def __init__(
        self,
        trainee: Trainee,
        batches: Batches,
        held_out: HeldOut,
        recorder: Recorder,
        keeper: Keeper | None = None,
    ) -> None:
        self.trainee, self.batches, self.held_out, self.recorder = trainee, batches, held_out, recorder
        self.config = trainee.config
        self.root = Path(self.config.run.dir) / "checkpoints"
        waits = self.config.launch.timeout_seconds
        self.saver = Saver(self.root, trainee.mesh, self.config.checkpoint, waits, recorder.fence)
        self.memory = None if keeper is None else MemoryCopies(keeper, trainee.mesh, recorder.fence)
        self.step = 0
        self.skipped = SkippedSteps(trainee)
        self.alarms = Alarms(self.config)

    def restore(self) -> Path | None:
        """Continues from the newest state that proves whole, in memory or on disk; returns its path, None without any.

        Raises:
            CheckpointError: There are checkpoints but none proves whole, or they are of another model or data.
        """
        model, optimizer, told = self.trainee.model, self.trainee.optimizer, self.recorder.message

        def fill(path: Path, manifest: Manifest, opens: Opens) -> None:
            load_training_state(path, manifest, model, optimizer, opens)

        url = self.config.checkpoint.store
        elsewhere = [place for place in (self.memory, ObjectStore(url) if url else None) if place is not None]
        found = restore_newest(self.root, self.trainee.mesh, told, self._accept, fill, elsewhere)
        if found is None:
            return None
        source, manifest = found
        self.step = manifest.step
        self.skipped.restore(self.step, manifest.data)
        if self.memory is not None and source.key is not None:
            self.memory.take(source.key)
            self.recorder.resume(source.record)
        self.recorder.event("restored", step=self.step, path=str(source.path))
        return source.path

    def _accept(self, path: Path, manifest: Manifest) -> None:
        """That a checkpoint is of this model, at its place in this data."""
        # Parsed, so that a key which is newer than the checkpoint has its default there.
        before, now = parse_config(manifest.config).model_dump(mode="json"), self.config.model_dump(mode="json")
        _check_same_model(path, before["model"], now["model"])
        if not manifest.step and not manifest.data:  # weights from elsewhere: no batch was read before them
            return
        old, new = ({"documents": tree["data"].get("documents", "joined")} for tree in (before, now))
        _check_same_model(path, old, new, "data")
        self.batches.load_state_dict(manifest.data)

    def run(self, stop_asked: Callable[[], bool]) -> str:
        """Trains to the last step or until some rank is asked to stop; returns `finished` or `interrupted`.

        What a step does besides its update follows from the step and the config alone, never from what a rank
        remembers, so that all ranks do the same. A step that a stop or a kill cut short is evaluated when the run
        goes on.
        """
        steps, device = self.config.train.steps, self.held_out.rows.device
        check_weights(self.trainee, self.step, now=True)
        self.alarms.remember(self.recorder.rows)
        own_seconds = 0.0
        while True:
            if self._is_due(self.config.evaluate.every_steps) or self.step in (0, steps):
                self._timed("evaluation", self.evaluate)
            if self.step >= steps:
                return "finished"
            started = time.perf_counter()
            rows = next(self.batches).to(device)
            waited = time.perf_counter() - started
            with counted_waits() as for_others:
                figures = train_step(self.trainee, rows, self.step, stop_asked(), own_seconds)
            own_seconds = max(1e-6, time.perf_counter() - started - for_others.seconds)  # two clocks, of unlike grain
            self.step += 1
            self.recorder.step(self.step, figures, time.perf_counter() - started, waited)
            self._watch(figures)
            if self.memory is not None and self._is_due(self.config.checkpoint.memory_every_steps):
                self._timed("save", self._give_to_memory)
            self.recorder.tell()
            ends = figures.stop or self.step == steps
            check_weights(self.trainee, self.step, now=ends)
            self._hear_of_saves()
            saves = ends or self._is_due(self.config.checkpoint.every_steps)
            if saves:
                check_finite(self.trainee, self.step)
            if ends:
                self._timed("save", self.save)
            elif saves:
                self._timed("save", self._try_to_save)
            if figures.stop and self.step < steps:
                return "interrupted"

    def save(self) -> Path:
        """Publishes a checkpoint of this moment; the record up to it is on disk before.

        Raises:
            CheckpointError: It could not be written; on every rank alike.
        """
        self._start_to_save()
        path = self.saver.finish()
        self.recorder.event("checkpoint", step=self.step, path=str(path))
        return path

    def close(self) -> None:
        """Lets a save that is under way end; not a collective, for it is called where other ranks may be gone."""
        self.saver.leave()
        self._hear_of_saves()

    def evaluate(self) -> None:
        """Scores the held-out rows and records the result."""
        result = evaluate(self.trainee, self.held_out)
        self.recorder.evaluation(self.step, result.loss, result.bits_per_byte)

    def _timed(self, what: str, work: Callable[[], object]) -> None:
        """Does something that is no step, and records how long it took, however it ends."""
        started = time.perf_counter()
        try:
            work()
        finally:
            self.recorder.spent(what, time.perf_counter() - started)

    def _watch(self, figures: StepFigures) -> None:
        """Tells what was out of the ordinary in the step that has just ended.

        Raises:
            NumericFault: Too many steps in a row were not finite; on every rank alike.
        """
        told = self.skipped.see(self.step, figures)
        if told is not None:
            self.recorder.event("skipped", **told)
        elif self.recorder.writes:
            for alarm in self.alarms.see(self.step, figures.loss, figures.demand, figures.own_seconds):
                self.recorder.event("alarm", **alarm)

    def _try_to_save(self) -> None:
        """A save between others: training goes on beside it, or without it, and says so."""
        try:
            if self.config.checkpoint.asynchronous:
                self._start_to_save()
            else:
                self.save()
        except CheckpointError as error:
            self.recorder.message(f"step {self.step}: no checkpoint, training goes on: {error}")

    def _start_to_save(self) -> None:
        """Copies what a checkpoint holds and begins to write it, after the save before has ended."""
        on_first_rank(self.recorder.flush, self.trainee.mesh).unwrap()
        self.saver.wait()
        self._hear_of_saves()
        self.saver.start(self.trainee.model, self.trainee.optimizer, self._saved())

    def _give_to_memory(self) -> None:
        """The newest state, in memory that outlives this process; without it, training goes on and says so."""
        assert self.memory is not None, "there is a keeper"
        model, optimizer = self.trainee.model, self.trainee.optimizer
        try:
            self.memory.give(model, optimizer, self._saved(), self.recorder.rows_in_memory)
        except CheckpointError as error:
            self.recorder.message(f"step {self.step}: no state in memory, training goes on: {error}")

    def _saved(self) -> Saved:
        """What is stored beside the tensors at this moment."""
        config, seed = self.config, self.config.seed
        schedule = {"updates": self.step - self.skipped.total, "steps": config.train.steps}
        # Random numbers follow from the seed, the purpose, the step and the place; there is no generator to store.
        state = {"schedule": schedule, "random": {"seed": seed, "step": self.step}}
        data = self.skipped.noted_in(self.batches.state_dict())
        return Saved(self.step, config.model_dump(mode="json"), data, state)

    def _hear_of_saves(self) -> None:
        """Tells of a save that has ended in the background; only rank 0 hears, and no other need to."""
        stored = self.saver.store_news()
        if stored is not None:
            where = self.config.checkpoint.store
            self.recorder.message(f"step {self.saver.step}: not copied to {where}, training goes on: {stored.error()}")
        outcome = self.saver.news()
        if outcome is None:
            return
        if outcome.problem is None:
            self.recorder.event("checkpoint", step=self.saver.step, path=outcome.value)
        else:
            self.recorder.message(f"step {self.saver.step}: no checkpoint, training goes on: {outcome.error()}")

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def _check_same_model(path: Path, old: dict[str, Any], new: dict[str, Any], prefix: str = "model") -> None:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            _check_same_model(path, before, now, f"{prefix}.{name}")
        elif before != now:
            rule = f"a run continues with the model it was started with: {prefix}.{name}={before}"
            raise CheckpointError(str(path), f"{prefix}.{name}={now}", rule, "another run.dir, or the old value")

"""Saving: training waits for a copy in host memory; a thread of each rank writes it, and that of rank 0 publishes.

The threads meet in the folder that is being written, never in a collective, which training's own could overtake: each
leaves a report beside its part, of what it wrote or why it could not, and rank 0 reads them all, proves that every
tensor is there once, and publishes. The folder must be visible to all ranks, as it must be to be read again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.agree import Outcome, attempt, on_first_rank
from moe_dist.checkpoint.manifest import FORMAT, OLDER, checked, read_manifest
from moe_dist.checkpoint.object_store import ObjectStore
from moe_dist.checkpoint.write import HostCopy
from moe_dist.config.schema import CheckpointConfig
from moe_dist.errors import CheckpointError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.collectives import from_first
from moe_dist.parallel.mesh import Mesh
from moe_dist.runtime.generation import Fence

_LOOK_EVERY_SECONDS, _LEAVE_AFTER_SECONDS = 0.02, 2.0


@dataclass(frozen=True)
class Saved:
    """What is stored beside the tensors.

    Attributes:
        step: Optimizer updates made.
        config: The resolved config as a plain tree.
        data: State of the batches: cursor and fingerprint.
        state: What else a run goes on from: schedule, random numbers, tokenizer.
    """

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Saves the checkpoints of a run, one at a time.

    Args:
        root: Where they lie.
        mesh: This rank.
        settings: What is kept, and whether writing is done beside training.
        idle_seconds: Rank 0 gives a save up when so long nothing is added to it.
        fence: Refuses what a process of an older generation would write.

    Attributes:
        step: Updates made at the save that was started last.
    """

    def __init__(
        self, root: Path, mesh: Mesh, settings: CheckpointConfig, idle_seconds: float = 300, fence: Fence | None = None
    ) -> None:
        self.root, self.mesh, self.settings, self.idle_seconds = root, mesh, settings, idle_seconds
        self.fence = fence or Fence()
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._stored = Outcome()
        self._decided = threading.Event()
        self._heard = True
        self._needed: dict[str, torch.Size] = {}
        self.step = 0

    def start(self, model: Transformer, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        """Copies the state of this moment and begins to write it; entered by all ranks.

        It first waits for the save before, so that there is never a second copy.

        Raises:
            CheckpointError: On every rank alike: there is no room for it.
        """
        self.wait()
        self._needed = self._needed or pieces.expected_shapes(model.config)
        numbers, width = sum(shape.numel() for shape in self._needed.values()), _width(model)

        def begin() -> tuple[str, str]:
            self.fence.check()
            return str(store.begin(self.root, saved.step, numbers * width)), uuid.uuid4().hex

        folder, save = on_first_rank(begin, self.mesh).unwrap()
        shapes = pieces.owned_shapes(model, optimizer, self.mesh)
        pinned = next(model.parameters()).device.type != "cpu"
        self._copy.begin(shapes, save, saved.step, pinned)
        draft = Draft(Path(folder), save, self.mesh.layout.ranks, self.mesh.rank)
        self._outcome, self._heard, self.step = None, False, saved.step
        self._decided.clear()
        self._thread = threading.Thread(target=self._write, args=(draft, saved), name="checkpoint", daemon=True)
        self._thread.start()
        self._copy.fill(pieces.owned_tensors(model, optimizer, self.mesh))

    def finish(self) -> Path:
        """Waits until what was started is published, and gives its path; entered by all ranks.

        Raises:
            CheckpointError: On every rank alike, if any rank could not write or a tensor is missing or written twice.
                What was written is removed, and the checkpoints before stay as they are.
        """
        self._decided.wait()
        self._heard = True
        return Path(from_first(self._outcome, self.mesh.world).unwrap())

    def news(self) -> Outcome | None:
        """On rank 0 the outcome of a save that has ended and of which nobody has heard yet; waits for nothing."""
        if self._heard or self._outcome is None or self.mesh.rank > 0:
            return None
        self._heard = True
        return self._outcome

    def store_news(self) -> Outcome | None:
        """On rank 0 what went wrong in copying to the store, once; None where nothing did."""
        stored, self._stored = self._stored, Outcome()
        return stored if stored.problem is not None else None

    def wait(self) -> None:
        """Waits until this rank's part is written and, on rank 0, it is published and older ones are pruned."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def leave(self) -> None:
        """Lets a save that is under way end, but does not wait long for ranks that are gone; not a collective."""
        self.idle_seconds = min(self.idle_seconds, _LEAVE_AFTER_SECONDS)
        self.wait()

    def _write(self, draft: Draft, saved: Saved) -> None:
        """The background: nothing here may raise, and nothing may enter a collective."""
        written = attempt(lambda: self._written(draft), self.mesh.rank)
        if self.mesh.rank > 0:
            draft.report(written)
            self._decided.set()
            return
        outcome = attempt(lambda: self._publish(draft, saved, written), 0)
        if outcome.problem is not None:
            shutil.rmtree(draft.folder, ignore_errors=True)
        self._outcome = outcome
        self._decided.set()
        if outcome.problem is None:  # only the next save waits for this; what a kill leaves of it is swept
            attempt(lambda: self._prune(Path(outcome.value)), 0)
            self._stored = attempt(lambda: self._copy_to_store(Path(outcome.value)), 0)

    def _copy_to_store(self, published: Path) -> None:
        """To `checkpoint.store`, by rank 0, which sees all parts."""
        if self.settings.store is None:
            return
        self.fence.check()
        objects, manifest = ObjectStore(self.settings.store), read_manifest(published)
        objects.publish(published, manifest)
        objects.prune(manifest, self.settings.keep, self.settings.keep_every_steps)

    def _written(self, draft: Draft) -> dict[str, Any]:
        self.fence.check()
        return _written(draft, self._copy)

    def _prune(self, published: Path) -> None:
        store.prune(self.root, published, self.settings.keep, self.settings.keep_every_steps)

    def _publish(self, draft: Draft, saved: Saved, written: Outcome) -> str:
        outcomes = draft.gather(written, lambda: self.idle_seconds)
        parts = [outcome.unwrap() for outcome in outcomes]
        _check_coverage(parts, set(self._needed), draft.folder)
        stored = {"step": saved.step, "config": saved.config, "data": saved.data, "state": saved.state}
        told = {"format": FORMAT, "save": draft.save, "layout": str(self.mesh.layout), "parts": parts, **stored}
        manifest = checked(told, str(draft.folder))
        return str(store.commit(draft.folder, manifest, self.fence.check))


@dataclass(frozen=True)
class Draft:
    """The folder of a save that is under way, as one rank sees it.

    Attributes:
        folder: The folder.
        save: The save's own name.
        ranks: How many write.
        rank: This one.
    """

    folder: Path
    save: str
    ranks: int
    rank: int

    @cached_property
    def part(self) -> Path:
        """This rank's part."""
        return self.folder / store.part_name(self.rank, self.ranks)

    def report(self, written: Outcome) -> None:
        """Leaves word of what this rank wrote, or why it could not; a part that failed makes room for that."""
        if written.problem is not None:
            self.part.unlink(missing_ok=True)
        text = json.dumps({"value": written.value, "problem": written.problem}).encode()
        unseen = self.folder / f".report-{self.rank:05d}"
        try:
            store.write_durably(unseen, text)
            unseen.rename(self._report_of(self.rank))
        except OSError:
            return  # the folder is gone, for the save was given up, or rank 0 gives it up when nothing more comes

    def gather(self, own: Outcome, idle_seconds: Any) -> list[Outcome]:
        """The words of all ranks, in order; they are taken away.

        Raises:
            CheckpointError: For too long nothing was added.
        """
        found = {self.rank: own}
        size, since = -1, time.monotonic()
        while len(found) < self.ranks:
            for rank in range(self.ranks):
                file = self._report_of(rank)
                if rank not in found and file.exists():
                    told = json.loads(file.read_bytes())
                    found[rank] = Outcome(told["value"], told["problem"] and tuple(told["problem"]))
                    file.unlink()
            now = _bytes_in(self.folder)
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > idle_seconds():
                silent = [rank for rank in range(self.ranks) if rank not in found]
                rule = "every rank writes its part where rank 0 sees it, and leaves word"
                raise CheckpointError(str(self.folder), f"nothing from ranks {silent}", rule, OLDER)
            if len(found) < self.ranks:
                time.sleep(_LOOK_EVERY_SECONDS)
        return [found[rank] for rank in range(self.ranks)]

    def _report_of(self, rank: int) -> Path:
        return self.folder / f"report-{rank:05d}.json"


def save_checkpoint(
    root: Path, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh, saved: Saved, keep: int
) -> Path:
    """Writes and publishes one checkpoint and waits for it; entered by all ranks.

    Raises:
        CheckpointError: As `Saver.finish` does.
    """
    saver = Saver(root, mesh, CheckpointConfig(keep=keep, asynchronous=False))
    saver.start(model, optimizer, saved)
    path = saver.finish()
    saver.wait()
    return path


def _written(draft: Draft, copy: HostCopy) -> dict[str, Any]:
    """The part's entry of the manifest."""
    try:
        return copy.write(draft.part)
    except OSError as error:
        free = shutil.disk_usage(draft.folder.parent).free
        found = f"{error.strerror}; {free:,} bytes free"
        fix = "make room or lift the limit; the checkpoints before are intact"
        rule = f"this rank's part needs {copy.num_bytes:,} bytes"
        raise CheckpointError(f"rank {draft.rank}: {draft.part}", found, rule, fix) from None


def _bytes_in(folder: Path) -> int:
    """Of all files; a report that is just being given its name counts for nothing."""
    size = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _width(model: Transformer) -> int:
    return next(model.parameters()).element_size()


def _check_coverage(parts: list[dict[str, Any]], expected: set[str], folder: Path) -> None:
    counts = Counter(name for part in parts for name in part["tensors"])
    missing, unknown = sorted(expected - counts.keys()), sorted(counts.keys() - expected)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if missing or unknown or twice:
        shown = f"missing {missing[:3]}, unknown {unknown[:3]}, written twice {twice[:3]}"
        rule = f"the parts hold each of the {len(expected)} tensors of the model and its moments once"
        raise CheckpointError(str(folder), shown, rule, "this is a bug of moe_dist: please report it")

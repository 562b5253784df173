"""What saving and loading a state of 1 GB costs, beside the disk itself and `torch.distributed.checkpoint`.

    python -m tests.benchmarks.checkpoint [--quick] [--json] [--folder DIR]

One process with one rank. All ways write and read the same tensors (weights and both moments of AdamW) in the same
folder, and take turns within each round, the first place changing. `disk` writes or reads a file of that size from one
block of memory, through the page cache with an fsync and past it, and the faster of the two counts. Ours verifies all
that it reads. Files are dropped from the page cache before they are read. `share_of_disk` is the median over the
rounds of the disk's time by that of the way. Of the saves beside training, `seconds` is how long training waits,
`until_published` how long it takes with that step in all, and `step_ratio` what the step that follows takes,
with the save under way, over the median of steps without one. `--json` ends with one object: {"rows": [{way, seconds,
megabytes_per_second, share_of_disk, until_published, step_ratio}], "megabytes", "step_seconds",
"hashes": {name: gigabytes_per_second}}.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as peer
import xxhash
from rich.console import Console
from rich.table import Table

from moe_dist.checkpoint import pieces
from moe_dist.checkpoint.load import load_training_state
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.save import Saved, Saver
from moe_dist.config import Config, parse_config
from moe_dist.config.schema import CheckpointConfig
from moe_dist.train.step import Trainee, train_step
from tests.benchmarks.allocator import restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

BLOCK, LENGTH, VOCABULARY = 16 * 2**20, 128, 8192


def config_of(quick: bool) -> Config:
    """83 million parameters: 1 GB with the moments. Quick: 100 MB."""
    layers, sequences = (1, 8) if quick else (10, 16)
    moe = {"num_experts": 8, "top_k": 2, "expert_width": 512, "shared_expert_width": 512}
    model = {"vocab_size": VOCABULARY, "num_layers": layers, "width": 512, "num_heads": 8, "num_kv_heads": 4}
    model |= {"head_width": 64, "ffn_width": 1024, "moe": moe}
    train = {"steps": 1000, "precision": "fp32", "global_batch_sequences": sequences, "micro_batch_sequences": 4}
    return parse_config({"model": model, "train": train, "data": {"sequence_length_tokens": LENGTH}})


class Bench:
    """The state, and the ways to keep it.

    Args:
        folder: On the disk that is measured.
        quick: A tenth of the size.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.config = folder, config_of(quick)
        self.trainee: Trainee = parallel_trainee(self.config, 1, optimizer="adamw")
        self.rows = torch.randint(0, VOCABULARY, (self.config.train.global_batch_sequences, LENGTH + 1))
        self.step()
        self.state = {
            f"{kind}/{pieces_[0].parameter}": tensor
            for pieces_, tensors in pieces.parameters_here(self.trainee.model, self.trainee.optimizer)
            for kind, tensor in tensors.items()
        }
        self.size = sum(tensor.nbytes for tensor in self.state.values())
        self.memory = mmap.mmap(-1, -(-self.size // BLOCK) * BLOCK)
        for place in range(0, len(self.memory), 4096):
            self.memory[place] = place % 251
        self.savers = {beside: self._saver(beside) for beside in (False, True)}
        self.number = 0

    def _saver(self, beside: bool) -> Saver:
        settings = CheckpointConfig(keep=1, asynchronous=beside)
        return Saver(self.folder / f"ours-{beside}", self.trainee.mesh, settings)

    def step(self) -> float:
        started = time.perf_counter()
        train_step(self.trainee, self.rows, 10)
        return time.perf_counter() - started

    def start(self, beside: bool) -> Path:
        self.number += 1
        saved = Saved(self.number, self.config.model_dump(mode="json"), {})
        self.savers[beside].start(self.trainee.model, self.trainee.optimizer, saved)
        return self.folder

    def disk_write(self, direct: bool) -> float:
        file = self.folder / "plain"
        file.unlink(missing_ok=True)
        view, started = memoryview(self.memory), time.perf_counter()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0))
        for place in range(0, len(view), BLOCK):
            os.write(handle, view[place : place + BLOCK])
        os.fsync(handle)
        os.close(handle)
        return time.perf_counter() - started

    def disk_read(self, direct: bool) -> float:
        drop(self.folder / "plain")
        view, started = memoryview(self.memory), time.perf_counter()
        handle = os.open(self.folder / "plain", os.O_RDONLY | (os.O_DIRECT if direct else 0))
        for place in range(0, len(view), BLOCK):
            os.preadv(handle, [view[place : place + BLOCK]], place)
        os.close(handle)
        return time.perf_counter() - started

    def our_save(self) -> float:
        started = time.perf_counter()
        self.start(False)
        self.savers[False].finish()
        return time.perf_counter() - started

    def our_load(self) -> float:
        path = self.folder / "ours-False" / f"step-{self.number:08d}"
        drop(path)
        started = time.perf_counter()
        load_training_state(path, read_manifest(path), self.trainee.model, self.trainee.optimizer)
        return time.perf_counter() - started

    def peer_save(self) -> float:
        started = time.perf_counter()
        peer.save(self.state, storage_writer=peer.FileSystemWriter(self.fresh(), sync_files=True))
        return time.perf_counter() - started

    def peer_load(self) -> float:
        drop(self.folder / "peer")
        started = time.perf_counter()
        peer.load(self.state, checkpoint_id=self.folder / "peer")
        return time.perf_counter() - started

    def fresh(self) -> Path:
        shutil.rmtree(self.folder / "peer", ignore_errors=True)
        return self.folder / "peer"

    def our_step(self) -> tuple[float, float, float]:
        """How long training waits, how long the next step takes, and how long all of it."""
        started = time.perf_counter()
        self.start(True)
        waited = time.perf_counter() - started
        step = self.step()
        self.savers[True].finish()
        return waited, step, time.perf_counter() - started

    def peer_step(self) -> tuple[float, float, float]:
        folder = self.fresh()
        started = time.perf_counter()
        future = peer.async_save(self.state, storage_writer=peer.FileSystemWriter(folder, sync_files=True))
        waited = time.perf_counter() - started
        step = self.step()
        future.result()  # type: ignore[union-attr]
        return waited, step, time.perf_counter() - started


def drop(place: Path) -> None:
    """Takes files out of the page cache."""
    for file in [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each way gave in each round but the first; the first place changes."""
    found: dict[str, list[Any]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            found[name].append(ways[name]())
    return {name: values[1:] for name, values in found.items()}


def hash_rates(memory: mmap.mmap) -> dict[str, float]:
    """Gigabytes a second of one core."""
    rates = {}
    view = memoryview(memory)[: 2**27]
    for name, call in (("xxh3_128", xxhash.xxh3_128), ("sha256", hashlib.sha256), ("blake2b", hashlib.blake2b)):
        started = time.perf_counter()
        call(view).digest()
        rates[name] = len(view) / (time.perf_counter() - started) / 1e9
    return rates


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Rows of all ways."""
    bench, rounds = Bench(folder, quick), 3 if quick else 5
    mega = bench.size / 1e6
    writing = {"save": bench.our_save, "torch.distributed.checkpoint save": bench.peer_save}
    writing |= {f"disk {kind} write": lambda d=d: bench.disk_write(d) for kind, d in (("direct", 1), ("cached", 0))}
    reading = {"load": bench.our_load, "torch.distributed.checkpoint load": bench.peer_load}
    reading |= {f"disk {kind} read": lambda d=d: bench.disk_read(d) for kind, d in (("direct", 1), ("cached", 0))}
    rows: list[dict[str, Any]] = []
    for ways in (writing, reading):
        found = in_turn(ways, rounds)
        disk = [min(pair) for pair in zip(*(found[name] for name in ways if name.startswith("disk")), strict=True)]
        for name, seconds in found.items():
            own = statistics.median(seconds)
            share = statistics.median(theirs / mine for theirs, mine in zip(disk, seconds, strict=True))
            rows.append({"way": name, "seconds": own, "megabytes_per_second": mega / own, "share_of_disk": share})
    bench.savers[True].finish() if bench.start(True) else None  # pages of the host copy are touched for the first time
    steps = in_turn(
        {
            "step": bench.step,
            "asynchronous save": bench.our_step,
            "step again": bench.step,
            "torch.distributed.checkpoint async_save": bench.peer_step,
        },
        rounds,
    )
    plain = statistics.median(steps.pop("step") + steps.pop("step again"))
    for name, values in steps.items():
        waited, step, whole = (statistics.median(column) for column in zip(*values, strict=True))
        rates = {"megabytes_per_second": mega / whole, "until_published": whole, "step_ratio": step / plain}
        rows.append({"way": name, "seconds": waited, **rates})
    return {"rows": rows, "megabytes": mega, "step_seconds": plain, "hashes": hash_rates(bench.memory)}


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", help="where to write; a new folder under the system's own for temporary files")
    options = parser.parse_args()
    restart_with_kept_blocks()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, one_rank():
        found = measure(Path(folder), options.quick)
    columns = ("way", "seconds", "megabytes_per_second", "share_of_disk", "until_published", "step_ratio")
    hashes = ", ".join(f"{name} {rate:.1f}" for name, rate in found["hashes"].items())
    title = f"{found['megabytes']:.0f} MB, a step takes {found['step_seconds']:.2f} s; GB/s of a core: {hashes}"
    table = Table(*columns, title=title)
    for row in found["rows"]:
        table.add_row(row["way"], *(f"{row[name]:.3f}" if name in row else "" for name in columns[1:]))
    Console(file=sys.stderr if options.json else sys.stdout, width=140).print(table)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

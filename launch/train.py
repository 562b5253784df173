"""The training story of one rank, in order. Every launcher runs this function on every rank.

config -> process -> mesh -> loader -> model on meta -> parallelize -> initialise -> optimizer -> restore -> train
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from data_pipeline.build import open_tokenizer
from data_pipeline.loader import heldout_rows
from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.packing import open_rows, separating_token
from launch.batches import RankBatches
from launch.interrupt import STOP_FILE
from launch.outcome import write_summary
from moe_dist.config import Config
from moe_dist.model import Transformer
from moe_dist.model.flops import training_flops_per_token
from moe_dist.model.init import initialise
from moe_dist.moe.product import has_onednn
from moe_dist.optim import build_adamw
from moe_dist.parallel.apply import parallelize
from moe_dist.parallel.collectives import gather_objects
from moe_dist.parallel.fsdp import filling
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.layout import layout_of, ranks_of_node
from moe_dist.parallel.mesh import Groups, Mesh, build_mesh
from moe_dist.parallel.zero import share_out
from moe_dist.runtime.generation import Fence
from moe_dist.runtime.heartbeat import beat_seconds, heartbeat
from moe_dist.runtime.process import Process
from moe_dist.runtime.profiling import measure_gemm_peak
from moe_dist.train.evaluate import HeldOut
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder, append_event
from moe_dist.train.routing_ledger import RoutingLedger
from moe_dist.train.step import Trainee


def run_worker(config: Config, build_dir: Path, process: Process) -> dict[str, Any]:
    """Trains on this rank, continuing from the newest checkpoint of the run if there is one.

    Args:
        config: The checked configuration.
        build_dir: Shards, as `data_pipeline.build.build` returned them.
        process: This rank.

    Returns:
        The summary of the run on rank 0, its status alone elsewhere.

    Raises:
        MoeDistError: What the user can act on.
    """
    (fence := Fence(Path(config.run.dir), process.generation)).check()
    if process.rank == 0:
        append_event(Path(config.run.dir), "boot")
    mesh = open_mesh(config, process)

    batches = RankBatches(config, build_dir, mesh)
    held_out = load_held_out(config, build_dir, process.device, mesh)

    trainee = build_trainee(config, mesh, process.device, separating_token(config, build_dir))

    recorder = open_recorder(config, process, mesh, fence)
    trainer = Trainer(trainee, batches, held_out, recorder, process.keeper)
    started = time.perf_counter()
    trainer.restore()
    recorder.spent("restore", time.perf_counter() - started)
    recorder.open(trainer.step, config.train.steps, list_workers(process, mesh))
    recorder.message(f"{mesh.layout}; {process.device.type}, {torch.get_num_threads()} threads a rank")
    if process.device.type == "cpu":
        taken = "oneDNN" if has_onednn() else "torch's own library"
        recorder.message(f"fp32 matrices are multiplied by {taken} (moe_dist/moe/product.py)")
    for backend in {layer.experts.backend for _, layer in trainee.model.moe_layers()}:
        recorder.message(f"experts multiply by the {backend!r} back end (model.moe.backend={config.model.moe.backend})")

    if process.rank == 0:
        shutil.copyfile(build_dir / TOKENIZER_NAME, Path(config.run.dir) / TOKENIZER_NAME)
    try:
        with watched(config, process, trainer):
            status = trainer.run(stop_asked=(Path(config.run.dir) / STOP_FILE).exists)
    finally:
        trainer.close()
        batches.close()
        recorder.close()
    if process.rank > 0:
        return {"status": status}
    return write_summary(config, build_dir, status, trainer)


def open_mesh(config: Config, process: Process) -> Mesh:
    """The groups of this run's processes; entered by all of them."""
    layout = layout_of(config, process.world_size, ranks_of_node(config.parallel, os.environ))
    return build_mesh(layout, Groups(config.launch.timeout_seconds))


def build_trainee(config: Config, mesh: Mesh, device: torch.device, end_of_text: int | None = None) -> Trainee:
    """The model as cut for this rank with its first weights, its optimizer, and the routing it records or follows."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, mesh, config)
    initialise(model, config.seed, device, parameter_type(config), filling)
    blocks = [layer.router.layer for _, layer in model.moe_layers()]
    ledger = RoutingLedger(config, blocks, mesh.rank, mesh.layout.ranks)
    optimizer = share_out(build_adamw(model, config.optimizer), model, mesh, config.parallel)
    gradients = Gradients(model, mesh, config.parallel.overlap_gradients)
    return Trainee(config, mesh, model, gradients, optimizer, ledger, end_of_text)


def load_held_out(config: Config, build_dir: Path, device: torch.device, mesh: Mesh) -> HeldOut:
    """This rank's share of the held-out rows, on its device."""
    split = open_rows(config, build_dir, "heldout")
    length, wanted = config.data.sequence_length_tokens, config.evaluate.sequences
    rows = heldout_rows(split, length, wanted, mesh.data_place, mesh.layout.data)
    token_bytes = torch.from_numpy(open_tokenizer(build_dir).token_bytes())
    most = -(-min(wanted, split.num_rows(length)) // mesh.layout.data)
    return HeldOut(torch.from_numpy(rows).to(device), most, token_bytes.to(device))


def parameter_type(config: Config) -> torch.dtype:
    """Type of weights and moments: fp32 (bf16 is autocast above it) or fp64."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def watched(config: Config, process: Process, trainer: Trainer) -> AbstractContextManager[None]:
    """Lets the launcher know that this rank goes on, and where it stands when it does not."""
    limit, place = config.launch.hang_timeout_seconds, (process.rank, process.generation)
    if limit is None:
        return nullcontext()
    return heartbeat(Path(config.run.dir), place, lambda: trainer.step, beat_seconds(limit))


def open_recorder(config: Config, process: Process, mesh: Mesh, fence: Fence) -> Recorder:
    """The record of the run, with the measured matrix-product peak of all ranks together."""
    compute = torch.bfloat16 if config.train.precision == "bf16" else parameter_type(config)
    gather_objects("ready", mesh.world)  # all measure at the same time, as they will train
    peak = sum(gather_objects(measure_gemm_peak(process.device, compute), mesh.world))
    flops = training_flops_per_token(config.model, config.data.sequence_length_tokens)
    return Recorder(Path(config.run.dir), process.rank == 0, flops, peak, fence)


def list_workers(process: Process, mesh: Mesh) -> list[dict[str, Any]]:
    """Where every rank runs, for the record."""
    me = {"rank": process.rank, "node": process.node, "host": socket.gethostname(), "pid": os.getpid()}
    return gather_objects(me, mesh.world)

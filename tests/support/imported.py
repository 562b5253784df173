"""Steps of a run that begins with a checkpoint, on the ranks of a gang: what each of them sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moe_dist.checkpoint.load import load_training_state
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.config import Config
from moe_dist.model.naming import global_buffers, pieces_by_parameter
from moe_dist.parallel.fsdp import whole
from moe_dist.parallel.tensor import gather_cut
from moe_dist.train.step import train_step
from tests.support.models import random_rows
from tests.support.parallel_step import parallel_trainee

BATCHES = [random_rows(6, seed=seed) for seed in (21, 22, 23)]
TOKENS = random_rows(3, seed=20)[:, :-1]


def three_steps(config: Config, path: Path) -> dict[str, Any]:
    """What this rank sees of a run that begins with a checkpoint: its part of the logits, losses, weights after."""
    trainee = parallel_trainee(config, config.parallel.expert)
    trainee = replace(trainee, config=config)
    load_training_state(path, read_manifest(path), trainee.model, trainee.optimizer)
    model, mesh = trainee.model, trainee.mesh
    with torch.no_grad():
        hidden_TD = model.eval().vocabulary.hidden(model(TOKENS)[0])
        logits = F.linear(hidden_TD, model.output_weight)
    losses = []
    for step, rows in enumerate(BATCHES):
        here = rows[6 * mesh.data_place // mesh.layout.data : 6 * (mesh.data_place + 1) // mesh.layout.data]
        losses.append(train_step(trainee, here, step).loss)
    after = dict(global_buffers(model))
    with torch.no_grad():
        for name, pieces in pieces_by_parameter(model):
            value = whole(model.get_parameter(name))
            after |= {piece.name: gather_cut(piece, piece.of(value), mesh).clone() for piece in pieces}
    return {"first": model.vocabulary.first, "logits": logits, "losses": losses, "after": after}


def every_job(rank: int, jobs: list[tuple[Config, Path]]) -> list[dict[str, Any]]:
    """The same of several checkpoints, one after the other."""
    return [three_steps(config, path) for config, path in jobs]

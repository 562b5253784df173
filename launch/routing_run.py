"""The steps of a run for the sake of their routing: no checkpoint, no evaluation, no samples.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.packing import separating_token
from launch.batches import RankBatches
from launch.interrupt import STOP_FILE
from launch.train import build_trainee, list_workers, open_mesh
from moe_dist.config import Config
from moe_dist.model import Transformer
from moe_dist.moe.decision import RoutingContext, RoutingDecision
from moe_dist.moe.ledger import asked_experts
from moe_dist.moe.router import HashRouter, Router
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.runtime.process import Process
from moe_dist.train import PROGRESS_FILE
from moe_dist.train.checks import check_weights
from moe_dist.train.nonfinite import not_finite
from moe_dist.train.routing_ledger import recorded_steps
from moe_dist.train.step import train_step


class Drift:
    """Counts, by layer, the tokens whose free choice of experts differs from the one that is followed.

    A router is asked a second time after every forward, with the same input and random numbers and nothing to follow.
    """

    def __init__(self, model: Transformer) -> None:
        self._routers = [layer.router for _, layer in model.moe_layers()]
        self._differing = [0] * len(self._routers)
        for router in self._routers:
            router.register_forward_hook(self._ask_again)

    def taken(self) -> Tensor:
        """The counts since the last time, fp64 [layers]."""
        counts, self._differing = self._differing, [0] * len(self._routers)
        return torch.tensor(counts, dtype=torch.float64)

    @torch.no_grad()
    def _ask_again(
        self, router: Router | HashRouter, told: tuple[Tensor, RoutingContext], followed: RoutingDecision
    ) -> None:
        x_TD, context = told
        free = router.forward(x_TD, dataclasses.replace(context, replay=None))
        experts = [asked_experts(d.expert_TK, d.asks_TK).sort(dim=-1).values for d in (free, followed)]
        self._differing[self._routers.index(router)] += int((experts[0] != experts[1]).any(-1).sum())


def run_steps(config: Config, build_dir: Path, process: Process) -> dict[str, Any]:
    """Makes `train.steps` updates, or with `train.routing_replay` those that were recorded, from the first weights.

    Returns:
        `status`, `losses`, and with a replay `drift`: by step and layer, the fraction of tokens that would now choose
        other experts.

    Raises:
        MoeDistError: What the user can act on.
    """
    mesh = open_mesh(config, process)
    batches = RankBatches(config, build_dir, mesh)
    trainee = build_trainee(config, mesh, process.device, separating_token(config, build_dir))
    follows = trainee.ledger.follows if trainee.ledger else None
    drift = None if follows is None else Drift(trainee.model)
    steps = config.train.steps if follows is None else len(recorded_steps(follows))
    run_dir = Path(config.run.dir)
    losses: list[float] = []
    drifts: list[list[float]] = []
    workers = list_workers(process, mesh)
    _tell(process, run_dir, event="start", first_step=0, steps=steps, ranks=len(workers), workers=workers)
    for step in range(steps):
        check_weights(trainee, step)
        started = time.perf_counter()
        rows = next(batches).to(process.device)
        figures = train_step(trainee, rows, step, (run_dir / STOP_FILE).exists())
        if figures.skipped:
            raise not_finite(step, figures)
        losses.append(figures.loss)
        if drift is not None:
            differing = sum_ranks(drift.taken().to(process.device), mesh.world)
            drifts.append((differing / figures.tokens).tolist())
        speed = figures.tokens / (time.perf_counter() - started)
        _tell(process, run_dir, event="step", step=step + 1, loss=figures.loss, tokens_per_second=speed)
        if figures.stop:
            break
    check_weights(trainee, len(losses), now=True)
    status = "finished" if len(losses) == steps else "interrupted"
    return {"status": status, "losses": losses} | ({} if drift is None else {"drift": drifts})


def _tell(process: Process, run_dir: Path, **event: Any) -> None:
    """A line for the display."""
    if process.rank == 0:
        with (run_dir / PROGRESS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

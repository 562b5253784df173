"""The product's proof of a step (`moe_dist.verify`), for gangs whose ranks are one layout."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config
from moe_dist.optim import build_adamw
from moe_dist.parallel.layout import Layout, layout_of, ranks_of_node
from moe_dist.parallel.mesh import Groups, Mesh, build_mesh
from moe_dist.parallel.zero import share_out
from moe_dist.train.step import Trainee
from moe_dist.verify import step
from moe_dist.verify.compare import first_difference
from moe_dist.verify.step import StepProof, oracle_step

__all__ = ["StepProof", "candidate_step", "first_difference", "mesh_of", "oracle_step", "parallel_trainee"]


def mesh_of(layout: Layout) -> Mesh:
    """One mesh a layout and world: groups have threads, and a gang makes hundreds of steps."""
    return _mesh_in(dist.group.WORLD, layout)


@functools.cache
def _mesh_in(world: dist.ProcessGroup, layout: Layout) -> Mesh:
    return build_mesh(layout, Groups(60))  # of this world: groups of one that has ended are dead


def parallel_trainee(config: Config, expert: int, optimizer: str = "sgd") -> Trainee:
    """This rank's part of the model; SGD with learning rate 1 shows a wrong gradient scale, Adam would hide it."""
    node = ranks_of_node(config.parallel, {})
    asked = config.parallel.model_copy(update={"expert": expert})
    layout = layout_of(config.model_copy(update={"parallel": asked}), dist.get_world_size(), node)
    trainee = step.parallel_trainee(config, mesh_of(layout))
    if optimizer == "sgd":
        return trainee
    adamw = build_adamw(trainee.model, config.optimizer)
    return replace(trainee, optimizer=share_out(adamw, trainee.model, trainee.mesh, config.parallel))


def candidate_step(rank: int, config: Config, expert: int, rows_by_rank: list[Tensor]) -> StepProof:
    """The step of this rank, which reads the rows of its data rank; pieces of other ranks are missing."""
    trainee = parallel_trainee(config, expert)
    return step.candidate_step(trainee, rows_by_rank[trainee.mesh.data_place])

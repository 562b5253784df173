"""Applying parallelism to a plain model, in one fixed and visible order."""

from __future__ import annotations

from moe_dist.config import Config
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.compiled import compile_blocks
from moe_dist.parallel.expert import shard_experts, share_counts
from moe_dist.parallel.fsdp import shard_parameters
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.recompute import recompute_blocks
from moe_dist.parallel.tensor import cut_tensors


def parallelize(model: Transformer, mesh: Mesh, config: Config) -> None:
    """Turns a plain model on `meta` into this rank's part of the parallel one.

    Order: tensors are cut, experts are cut and the exchange swapped in, then counts are shared; then dense parts are
    compiled, and what the backward pass computes again is wrapped as it then is; last, parameters are shared out. The
    caller initialises the weights by global name and hands the result to `Gradients`.
    """
    cut_tensors(model, mesh)
    shard_experts(model, mesh, config.parallel)
    share_counts(model, mesh)
    if config.train.compile:
        compile_blocks(model)
    recompute_blocks(model, config.train.recompute)
    shard_parameters(model, mesh)

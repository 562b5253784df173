"""The demand that the global balance term needs of micro-batches which are not there yet. Shape letters: E experts.

The exact term of a step that accumulates takes counts which only the last micro-batch of the last rank completes. So
they are counted first, by a forward without gradient that makes the same decisions (same weights, same random
numbers); the layers then ask no other rank. Cheaper and not exact: the micro-batch of all ranks (`micro_step`), or all
micro-batches so far (`running`). Source: Qiu et al. 2025 (Demons in the Detail), whose buffer of counts over the
micro-batches of a step is `running`, as is Megatron-LM's `global_aux_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.model.transformer import Transformer
from moe_dist.moe.layer import MoERecord
from moe_dist.moe.ledger import Choices
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.mesh import Mesh

Demand = dict[int, Tensor]  # int64 [E] by number of the block
Replay = Mapping[int, Choices]  # choices to be followed, by number of the block


def counts_first(config: MoEConfig, micro_batches: int) -> bool:
    """Whether a step needs the pass that only counts: of the config and the step's shape alone, alike on all ranks."""
    weighs = config.balance_loss > 0 or config.group_balance_loss > 0
    return weighs and config.balance_scope == "global" and config.global_balance == "exact" and micro_batches > 1


@torch.no_grad()
def count_demand(
    model: Transformer, passes: Sequence[tuple[MicroBatch, Draw]], mesh: Mesh, replay: Replay | None
) -> tuple[Demand, list[Replay]]:
    """Demand of the whole global batch before any of it is trained on; entered by all ranks.

    Returns the demand, and the choices of every micro-batch: a token is routed once, here, and trained as counted.

    Args:
        model: In training mode, so that random numbers are drawn as they will be.
        passes: The micro-batches of this rank, each with what names its random numbers.
        mesh: Whose ranks share the batch.
        replay: Choices of a recorded run, where it is followed.
    """
    layers = [layer for _, layer in model.moe_layers()]
    device = model.embedding.weight.device
    counts = torch.zeros(len(layers), model.config.moe.num_experts, dtype=torch.int64, device=device)
    # A demand that is known, if only as nothing, keeps the layers from asking the other ranks one by one.
    unknown = {layer.number: torch.zeros_like(counts[0]) for layer in layers}
    chosen: list[Replay] = []
    for batch, draw in passes:
        _, records = model(
            batch.tokens_BS, batch.counted_BS, draw=draw, demand=unknown, replay=replay, position_BS=batch.position_BS
        )
        first = draw.first_row * batch.tokens_BS.shape[1]
        chosen.append({layer.number: Choices.of(r, first) for layer, r in zip(layers, records, strict=True)})
        for total_E, record in zip(counts, records, strict=True):
            total_E += record.plan.demand_E
    sum_ranks(counts, mesh.world)
    return {layer.number: total_E for layer, total_E in zip(layers, counts, strict=True)}, chosen


def demand_so_far(model: Transformer, records: Sequence[MoERecord]) -> Demand:
    """What the next micro-batch adds its own demand to: the demand that the terms of this one took."""
    layers = (layer for _, layer in model.moe_layers())
    return {layer.number: record.balance_demand_XE[0] for layer, record in zip(layers, records, strict=True)}

"""Next-token prediction. Shape letters: B batch, S sequence, T = B*S tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.model.transformer import Transformer
from moe_dist.moe.layer import MoERecord
from moe_dist.moe.ledger import Choices
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.cross_entropy import nats_of_tokens, summed_nats
from moe_dist.objectives.micro_batch import MicroBatch


@dataclass(frozen=True)
class LossSums:
    """The parts of a loss as sums over the counted tokens of one micro-batch.

    Attributes:
        cross_entropy: Nats, differentiable scalar.
        balance: Balance term summed over layers, before its coefficient.
        group_balance: The same over groups of experts.
        z: z-loss summed over layers, before its coefficient.
        records: The layers' records.
    """

    cross_entropy: Tensor
    balance: Tensor
    group_balance: Tensor
    z: Tensor
    records: list[MoERecord]

    def total(self, config: MoEConfig) -> Tensor:
        """The sum whose gradient is taken, still to be divided by the global number of counted tokens."""
        balance = config.balance_loss * self.balance + config.group_balance_loss * self.group_balance
        return self.cross_entropy + balance + config.z_loss * self.z


def language_modelling_sums(
    model: Transformer,
    batch: MicroBatch,
    draw: Draw | None = None,
    demand: Mapping[int, Tensor] | None = None,
    replay: Mapping[int, Choices] | None = None,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Runs a micro-batch.

    Args:
        model: The decoder.
        batch: Rows; there may be none, and none of their positions may count.
        draw: Names the random numbers of routers that draw some.
        demand: What the balance terms know of the step's demand, see `RoutingContext`.
        replay: Choices to be followed, by number of the block.
        chunk_tokens: Tokens whose scores over the vocabulary exist at once; None for all.
    """
    hidden_BSD, records = model(
        batch.tokens_BS, batch.counted_BS, draw=draw, demand=demand, replay=replay, position_BS=batch.position_BS
    )
    hidden_TD, target_T = batch.targets(model.vocabulary.hidden(hidden_BSD))
    cross_entropy = summed_nats(hidden_TD, model.output_weight, target_T, model.vocabulary, chunk_tokens)
    nothing = cross_entropy.new_zeros(3)
    terms = [torch.stack([r.balance_sum, r.group_balance_sum, r.z_sum]) for r in records]
    balance, group_balance, z = torch.stack(terms).sum(0) if terms else nothing
    return LossSums(cross_entropy, balance, group_balance, z, records)


@torch.no_grad()
def token_nats(model: Transformer, batch: MicroBatch, chunk_tokens: int | None) -> tuple[Tensor, Tensor]:
    """(cross-entropy, fp32 or wider; id) of every target that counts; without gradient."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.counted_BS, position_BS=batch.position_BS)
    hidden_TD, target_T = batch.targets(model.vocabulary.hidden(hidden_BSD))
    return nats_of_tokens(hidden_TD, model.output_weight, target_T, model.vocabulary, chunk_tokens), target_T

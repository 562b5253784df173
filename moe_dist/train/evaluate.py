"""Held-out evaluation: loss and bits per byte over rows shared out among the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.objectives.language_modelling import token_nats
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.fsdp import part_again
from moe_dist.train.step import Trainee, autocast


@dataclass(frozen=True)
class HeldOut:
    """What evaluation needs of the data.

    Attributes:
        rows: This rank's held-out rows, int64 [n, S+1]; padding is scored nowhere.
        most_rows: The largest n over all ranks.
        token_bytes: UTF-8 bytes of text that each token stands for, int64 [V].
    """

    rows: Tensor
    most_rows: int
    token_bytes: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Scores over all held-out rows; equal on every rank.

    Attributes:
        loss: Nats a token.
        bits_per_byte: Bits per byte of the text that the targets stand for; does not depend on the tokenizer.
    """

    loss: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(trainee: Trainee, held_out: HeldOut) -> Evaluation:
    """Scores the held-out rows with evaluation capacity; entered by all ranks."""
    config = trainee.config
    trainee.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=held_out.rows.device)
    parts = math.ceil(held_out.most_rows / config.train.micro_batch_sequences)
    for rows in held_out.rows.tensor_split(parts):
        with autocast(config, rows.device):
            batch = MicroBatch.of(rows, trainee.end_of_text)
            nats_T, target_T = token_nats(trainee.model, batch, config.train.loss_chunk_tokens)
        length = held_out.token_bytes[target_T].sum()
        sums += torch.stack([nats_T.double().sum(), length.double(), nats_T.new_tensor(nats_T.numel()).double()])
    part_again(trainee.model)
    trainee.model.train()
    nats, text_bytes, tokens = sum_ranks(sums, trainee.mesh.world).tolist()
    return Evaluation(loss=nats / tokens, bits_per_byte=nats / math.log(2) / text_bytes)

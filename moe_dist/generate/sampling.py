"""Sampling continuations of a batch of prompts with a plain model.

Shape letters: B prompts, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.model.places import document_positions
from moe_dist.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen.

    Attributes:
        max_new_tokens: Length of a continuation.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Sample among so many; 0 among all.
        seed: Same seed, same text.
        separate: Documents were separate in training: what follows an end of text in a prompt does not see it.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    seed: int
    separate: bool = False


@torch.no_grad()
def continue_prompts(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, window: int, end_token: int
) -> list[list[int]]:
    """Continues every prompt by itself, one token at a time.

    Args:
        model: A plain model in evaluation mode.
        prompts: Token ids, each at least one.
        sampling: How tokens are chosen.
        window: The model sees at most so many last tokens.
        end_token: Ends a continuation; it is not returned.

    Returns:
        The new tokens of each prompt.

    Raises:
        ConfigError: The router lets experts compare all tokens of a sequence.
    """
    if prompts and model.config.moe.router == "expert_choice":
        rule = "its experts compare all tokens of a sequence, later ones too, so no text can be made token by token"
        raise ConfigError("model.moe.router", "expert_choice", rule, "train with model.moe.router=softmax_topk")
    device = model.embedding.weight.device
    continuations = []
    for number, prompt in enumerate(prompts):
        digest = hashlib.blake2b(f"{sampling.seed}|sample|{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        tokens = list(prompt)
        while len(tokens) - len(prompt) < sampling.max_new_tokens:
            recent_BS = torch.tensor([tokens[-window:]], device=device)
            position_BS = document_positions(recent_BS, end_token) if sampling.separate else None
            hidden_BSD, _ = model(recent_BS, position_BS=position_BS)
            token = _choose(model.logits(hidden_BSD[0, -1]).float().cpu(), sampling, generator)
            if token == end_token:
                break
            tokens.append(token)
        continuations.append(tokens[len(prompt) :])
    return continuations


def _choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    if 0 < sampling.top_k < logits_V.numel():
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    return int(torch.multinomial((logits_V / sampling.temperature).softmax(-1), 1, generator=generator))

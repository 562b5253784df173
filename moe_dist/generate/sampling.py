"""Sampling continuations of a batch of prompts with a plain model.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.generate.scores import NextScores
from moe_dist.model.transformer import Transformer

_TEXTS_AT_ONCE = 16  # what their caches take is bounded


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
    """Continues prompts, several at once and one token at a time; each as if it were alone.

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
    tokens = [list(prompt) for prompt in prompts]
    for first in range(0, len(prompts), _TEXTS_AT_ONCE):
        growing = {number: tokens[number] for number in range(first, min(first + _TEXTS_AT_ONCE, len(prompts)))}
        scores = NextScores(model, window, end_token if sampling.separate else None)
        generators = {number: _generator(sampling.seed, number) for number in growing}
        for _ in range(sampling.max_new_tokens):
            for number, logits_V in scores.of(growing).items() if growing else ():
                token = _choose(logits_V.float().cpu(), sampling, generators[number])
                if token == end_token:
                    del growing[number]
                else:
                    growing[number].append(token)
    return [text[len(prompt) :] for text, prompt in zip(tokens, prompts, strict=True)]


def _generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one prompt, whatever is continued beside it."""
    digest = hashlib.blake2b(f"{seed}|sample|{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    if 0 < sampling.top_k < logits_V.numel():
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    return int(torch.multinomial((logits_V / sampling.temperature).softmax(-1), 1, generator=generator))

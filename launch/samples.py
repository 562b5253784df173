"""Text from the newest checkpoint of a run, by one process that holds every expert."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.tokenizer import load_tokenizer
from moe_dist.checkpoint.load import load_newest_model
from moe_dist.config import Config, parse_config
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.generate.sampling import Sampling, continue_prompts
from moe_dist.runtime.process import choose_device


def generate_from_run(
    run_dir: Path,
    prompts: Sequence[str] = (),
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
) -> list[str]:
    """Continues prompts with a run's newest checkpoint.

    Args:
        run_dir: The run's directory.
        prompts: Beginnings; the config's own where there are none.
        max_new_tokens: Most tokens that are added; the config's where None.
        temperature: 0 takes the most probable token; the config's where None.
        seed: Of the sampling; the config's where None.
        device: Where the model is put; a GPU if there is one where None.

    Returns:
        Each prompt with its continuation.

    Raises:
        CheckpointError: The run has no checkpoint that proves whole.
        ConfigError: Later tokens would change what the model says of earlier ones.
    """
    on = device or choose_device(0)
    model, manifest = load_newest_model(run_dir / "checkpoints", on, lambda text: print(text, file=sys.stderr))
    config = parse_config(manifest.config)
    _check_that_text_can_be_made(config)
    known = manifest.data.get("tokenizer_sha256")
    if known is not None and hashlib.sha256((run_dir / TOKENIZER_NAME).read_bytes()).hexdigest() != known:
        rule = "the tokenizer is the one that the checkpoint was trained with"
        raise CheckpointError(str(run_dir / TOKENIZER_NAME), "another file", rule, "restore the run's tokenizer.json")
    tokenizer = load_tokenizer(run_dir / TOKENIZER_NAME, config.model.vocab_size)
    own = config.generate
    sampling = Sampling(
        max_new_tokens=own.max_new_tokens if max_new_tokens is None else max_new_tokens,
        temperature=own.temperature if temperature is None else temperature,
        top_k=own.top_k,
        seed=config.seed if seed is None else seed,
        separate=config.data.documents == "separate",
    )
    begun = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in prompts or own.prompts]
    window = config.data.sequence_length_tokens
    new = continue_prompts(model, begun, sampling, window, tokenizer.end_of_text)
    return [start + tokenizer.decode(ids) for start, ids in zip(prompts or own.prompts, new, strict=True)]


def _check_that_text_can_be_made(config: Config) -> None:
    """That no token's scores depend on tokens after it, nor on other texts.

    Raises:
        ConfigError: An expert takes only so many tokens of a sequence: the next token may push an earlier one out.
    """
    factor = config.model.moe.capacity_factor_eval
    if factor is not None and config.model.moe_blocks:
        raise ConfigError(
            "model.moe.capacity_factor_eval",
            factor,
            "text is made token by token: with a capacity a later token changes what experts did for earlier ones",
            "a run with model.moe.capacity_factor_eval=null (capacity_factor may stay: it is for training alone)",
        )

"""What a run ends with: the summary that is stored, printed and given to scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.bigram import count_bigrams
from data_pipeline.build import open_tokenizer
from data_pipeline.loader import heldout_rows
from data_pipeline.shards import TokenSplit
from launch.samples import generate_from_run
from moe_dist.config import Config
from moe_dist.model.flops import count_parameters
from moe_dist.moe.balance import max_violation
from moe_dist.train.metrics import Recorder

SUMMARY_FILE = "summary.json"
LOAD_STEPS = 20


def write_summary(config: Config, build_dir: Path, status: str, recorder: Recorder) -> dict[str, Any]:
    """Builds the summary from the record, stores it in the run's directory and returns it; on rank 0 only."""
    summary = summarize(config, status, recorder)
    if status == "finished":
        recorder.event("message", text="counting the bigram baseline and writing samples")
        summary["heldout"]["bigram_bits_per_byte"] = bigram_bits_per_byte(config, build_dir)
        summary["samples"] = write_samples(config)
    path = Path(config.run.dir) / SUMMARY_FILE
    draft = path.with_suffix(".writing")
    draft.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    recorder.event("end", status=status)
    return summary


def summarize(config: Config, status: str, recorder: Recorder) -> dict[str, Any]:
    """The figures of a run as plain values."""
    rows = recorder.rows
    seconds = sum(row["seconds"] for row in rows)
    counts = count_parameters(config.model)
    before, after = recorder.evaluations.get(0), recorder.evaluations.get(len(rows))
    return {
        "status": status,
        "run_dir": config.run.dir,
        "steps": len(rows),
        "losses": [row["loss"] for row in rows],
        "seconds": seconds,
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds if rows else None,
        "mfu": sum(row["mfu"] * row["seconds"] for row in rows) / seconds if rows else None,
        "peak_gflops": recorder.peak_flops / 1e9,
        "parameters": {"total": counts.total, "active": counts.active},
        "heldout": {"before": before, "after": after},
        "expert_load": expert_load(config, rows[-LOAD_STEPS:]),
        "drop_rate": sum(row["drop_rate"] for row in rows[-LOAD_STEPS:]) / max(1, len(rows[-LOAD_STEPS:])),
        "workers": recorder.workers,
        "checkpoint": str(Path(config.run.dir) / "checkpoints" / f"step-{len(rows):08d}"),
    }


def expert_load(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Demand of every expert over the given steps, before drops: its share of the layer, and the layer's MaxVio.

    `max_vio` is of the demand of all those steps together; `max_vio_step` is the mean of each step's own.
    """
    if not rows:
        return []
    demand = torch.tensor([row["demand"] for row in rows])
    layers = []
    for layer, load in enumerate(demand.sum(0)):
        shares = (load / load.sum().clamp(min=1)).tolist()
        by_step = sum(row["max_vio"][layer] for row in rows) / len(rows)
        number = config.model.num_dense_layers + layer
        layers.append({"layer": number, "load": shares, "max_vio": max_violation(load), "max_vio_step": by_step})
    return layers


def bigram_bits_per_byte(config: Config, build_dir: Path) -> float:
    """A bigram model counted on every training token, scored on the held-out rows that evaluation uses."""
    length = config.data.sequence_length_tokens
    counted = count_bigrams(TokenSplit(build_dir, "train").all_rows(length), config.model.vocab_size)
    rows = heldout_rows(TokenSplit(build_dir, "heldout"), length, config.evaluate.sequences)
    return counted.score([rows], open_tokenizer(build_dir).token_bytes()).bits_per_byte


def write_samples(config: Config) -> list[dict[str, str]]:
    """Continues the configured prompts with the newest checkpoint, loaded anew by one process with all experts."""
    prompts = list(config.generate.prompts)
    texts = generate_from_run(Path(config.run.dir), prompts)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

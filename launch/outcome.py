"""What a run ends with: the summary that is stored, printed and given to scripts."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from data_pipeline.bigram import count_bigrams
from data_pipeline.build import open_tokenizer
from data_pipeline.loader import heldout_rows
from data_pipeline.packing import open_rows
from launch.batches import count_left_out
from launch.run_directory import SUMMARY_FILE
from launch.samples import generate_from_run
from moe_dist.config import Config
from moe_dist.model.flops import count_parameters
from moe_dist.moe.balance import max_violation
from moe_dist.train import PROGRESS_FILE
from moe_dist.train.account import account, read_events
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder


def write_summary(config: Config, build_dir: Path, status: str, trainer: Trainer) -> dict[str, Any]:
    """Stores the summary in the run's directory and returns it; on rank 0 only.

    The figures are stored before the baseline and the samples are made, and again after: what goes wrong with these is
    told, and takes nothing away from a run that is trained.
    """
    recorder = trainer.recorder
    summary = summarize(config, status, trainer.step, recorder)
    _store(config, summary)
    if status == "finished":
        recorder.message("counting the bigram baseline and writing samples")
        for name, make in (("bigram baseline", _add_baseline), ("samples", _add_samples)):
            try:
                make(config, build_dir, summary)
            except Exception as error:  # noqa: BLE001 - an extra of a run that is already stored
                recorder.message(f"no {name}: {type(error).__name__}: {error}")
        _store(config, summary)
    recorder.event("end", status=status)
    return summary


def summarize(config: Config, status: str, step: int, recorder: Recorder) -> dict[str, Any]:
    """The figures of a run after `step` updates as plain values."""
    rows, recent = recorder.rows, list(recorder.recent)
    seconds = sum(row["seconds"] for row in rows)
    counts = count_parameters(config.model)
    return {
        "status": status,
        "run_dir": config.run.dir,
        "steps": step,
        "losses": [row["loss"] for row in rows],
        "skipped_steps": [row["step"] for row in rows if row.get("skipped")],
        "seconds": seconds,
        "effective_time": account(read_events(recorder.run_dir / PROGRESS_FILE)),
        "left_out_rows": count_left_out(read_events(recorder.run_dir / PROGRESS_FILE)),
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds if rows else None,
        "mfu": sum(row["mfu"] * row["seconds"] for row in rows) / seconds if rows else None,
        "peak_gflops": recorder.peak_flops / 1e9,
        "parameters": {"total": counts.total, "active": counts.active},
        "heldout": {"before": recorder.evaluations.get(0), "after": recorder.evaluations.get(step)},
        "expert_load": expert_load(config, recent),
        "drop_rate": sum(row["drop_rate"] for row in recent) / max(1, len(recent)),
        "routing": routing(config, [row for row in recent if row.get("entropy") and not row.get("skipped")]),
        "workers": recorder.workers,
        "checkpoint": str(Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"),
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
        number = config.model.moe_blocks[layer]
        layers.append({"layer": number, "load": shares, "max_vio": max_violation(load), "max_vio_step": by_step})
    return layers


def routing(config: Config, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What routing was like over the given steps, in all layers; nothing where no step tells.

    `dead_experts` had no token in any of the steps; `rank_load` is of the layer where ranks differ most, most rows over
    the mean; `rank_load` and `bytes_sent` are means of the steps.
    """
    if not rows:
        return {}
    demand = torch.tensor([row["demand"] for row in rows]).sum(0)
    return {
        "experts": demand.numel(),
        "dead_experts": int((demand == 0).sum()),
        "entropy_nats": statistics.fmean(nats for row in rows for nats in row["entropy"]),
        "even_entropy_nats": math.log(config.model.moe.num_experts),
        "rank_load": statistics.fmean(max(row["rank_load"]) for row in rows),
        "bytes_sent": statistics.fmean(row["bytes_sent"] for row in rows),
        "balance_distance": statistics.fmean(row["balance_distance"] for row in rows),
    }


def _add_baseline(config: Config, build_dir: Path, summary: dict[str, Any]) -> None:
    """A bigram model counted on every training token, scored on the held-out rows that evaluation uses."""
    length = config.data.sequence_length_tokens
    counted = count_bigrams(open_rows(config, build_dir, "train").all_rows(length), config.model.vocab_size)
    rows = heldout_rows(open_rows(config, build_dir, "heldout"), length, config.evaluate.sequences)
    score = counted.score([rows], open_tokenizer(build_dir).token_bytes())
    summary["heldout"]["bigram_bits_per_byte"] = score.bits_per_byte


def _add_samples(config: Config, build_dir: Path, summary: dict[str, Any]) -> None:
    """Continues the configured prompts with the newest checkpoint, loaded anew by one process with all experts.

    On the CPU: the device still holds the part of the model that was trained.
    """
    prompts = list(config.generate.prompts)
    texts = generate_from_run(Path(config.run.dir), prompts, device=torch.device("cpu"))
    summary["samples"] = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def _store(config: Config, summary: dict[str, Any]) -> None:
    path = Path(config.run.dir) / SUMMARY_FILE
    draft = path.with_suffix(".writing")
    draft.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)

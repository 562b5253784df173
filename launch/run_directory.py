"""What a run's directory says before training starts: finished, to be continued, or of another configuration."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_dist.config import Config
from moe_dist.config.explain import resolved
from moe_dist.config.load import read_tree, write_yaml
from moe_dist.errors import ConfigError
from moe_dist.train import PROGRESS_FILE

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
IMPORTED_FILE = "imported.yaml"  # what a run that begins with imported weights is started with
_TAIL_BYTES = 1 << 18

# Keys and sections that a continued run may change: where and how it runs, not what it trains. `train.steps` moves the
# end of the run, and with it the learning rate of the steps still to come.
_MAY_CHANGE = (
    "run",
    "launch",
    "parallel",
    "checkpoint",
    "generate",
    "evaluate",
    "data.dir",
    "train.threads_per_rank",
    "train.micro_batch_sequences",
    "train.steps",
    "train.routing_ledger",
    "train.checks",
    "data.prefetch_batches",
    "data.damaged_shards",
    "train.checks_every_steps",
    "train.equal_experts_at_start",
    "watch",
)


def prepare(config: Config, again: bool) -> dict[str, Any] | None:
    """Readies the run's directory and stores the configuration in it.

    Args:
        config: The checked configuration.
        again: Sets a finished run, or one of another configuration, aside under a numbered name.

    Returns:
        The stored summary of a run that is already finished, or None when training is to start or to continue.

    Raises:
        ConfigError: The directory belongs to another configuration.
    """
    run_dir = Path(config.run.dir)
    changed = changed_keys(config)
    summary = finished_summary(config)
    if again and (changed or summary):
        run_dir.rename(_free_name(run_dir))
    elif changed:
        raise ConfigError(
            "run.dir",
            config.run.dir,
            f"a run is continued with the configuration it was started with; these differ: {', '.join(changed)}",
            "another run.dir, or --again to set the old run aside and train anew",
        )
    elif summary:
        return summary
    _store(config, run_dir)
    return None


def stored_config(run_dir: Path) -> Path:
    """The configuration of a run, or what it is to be started with where its weights were imported."""
    imported = run_dir / IMPORTED_FILE
    return imported if imported.exists() and not (run_dir / CONFIG_FILE).exists() else run_dir / CONFIG_FILE


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths, for processes that have another working directory."""
    run = config.run.model_copy(update={"dir": os.path.abspath(config.run.dir)})
    data: dict[str, Any] = {"dir": os.path.abspath(config.data.dir)}
    if _is_local(config.data.input):
        data["input"] = os.path.abspath(config.data.input)
    data["sources"] = {
        name: source.model_copy(update={"input": os.path.abspath(source.input)}) if _is_local(source.input) else source
        for name, source in config.data.sources.items()
    }
    if config.data.tokenizer.path is not None:
        path = os.path.abspath(config.data.tokenizer.path)
        data["tokenizer"] = config.data.tokenizer.model_copy(update={"path": path})
    train = config.train
    if train.routing_replay is not None:
        train = train.model_copy(update={"routing_replay": os.path.abspath(train.routing_replay)})
    return config.model_copy(update={"run": run, "data": config.data.model_copy(update=data), "train": train})


def tell_attempt(run_dir: Path) -> None:
    """Notes that ranks are about to be started; a launcher need not import the trainer for that."""
    with contextlib.suppress(OSError), (run_dir / PROGRESS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "attempt", "time": time.time()}) + "\n")


def reached_step(run_dir: Path) -> int:
    """The last step that the record of a run tells of; 0 where it tells of none."""
    path = run_dir / PROGRESS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        steps = re.findall(rb'"event": "step".*?"step": (\d+)', file.read())
    return max(map(int, steps), default=0)


def _is_local(source: str) -> bool:
    from data_pipeline.storage import is_url

    return source != "python-library" and not is_url(source)


def finished_summary(config: Config) -> dict[str, Any] | None:
    """The summary of a run that has done all its steps, else None."""
    try:
        summary = json.loads((Path(config.run.dir) / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if summary.get("status") == "finished" and summary.get("steps", config.train.steps) >= config.train.steps:
        return summary
    return None


def changed_keys(config: Config) -> list[str]:
    """Keys whose stored value differs from the given one and would change the training result, with both values."""
    path = Path(config.run.dir) / CONFIG_FILE
    if not path.exists():
        return []
    # A run of an earlier version lacks the keys that came after it: what they now default to is what it did.
    old = {**dict(_leaves(resolved(Config()))), **dict(_leaves(read_tree(path)))}
    new = dict(_leaves(resolved(config)))
    names = [name for name in new if not _may_change(name) and old.get(name) != new[name]]
    names += [name for name in old if name not in new and not _may_change(name)]
    return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in names if not _same_input(name, old, new)]


def _may_change(name: str) -> bool:
    return any(name == free or name.startswith(free + ".") for free in _MAY_CHANGE)


def _same_input(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """The same text may be named by a relative and by an absolute path."""
    values = old.get(name), new.get(name)
    named = name in ("data.input", "data.tokenizer.path") or re.fullmatch(r"data\.sources\..+\.input", name)
    if not named or not all(isinstance(value, str) for value in values):
        return False
    return len({os.path.abspath(str(value)) for value in values}) == 1


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _free_name(run_dir: Path) -> Path:
    number = 1
    while (free := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    return free


def _store(config: Config, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    draft = run_dir / f"{CONFIG_FILE}.{os.getpid()}"
    draft.write_text(write_yaml(resolved(config)), encoding="utf-8")
    draft.replace(run_dir / CONFIG_FILE)

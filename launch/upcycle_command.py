"""`moe-dist upcycle`: a new run of a mixture of experts that begins as a trained dense model.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.run_directory import CONFIG_FILE, prepare, stored_config
from moe_dist.config import Config, parse_config
from moe_dist.config.load import read_tree
from moe_dist.errors import ConfigError

# What the command decides, below `model`; an override of one of these is refused.
_DECIDED = frozenset(
    ("num_dense_layers", "moe.num_experts", "moe.top_k", "moe.expert_width", "moe.shared_expert_width")
    + ("moe.gate_scale", "moe.activation")
)

upcycle_app = typer.Typer()


@upcycle_app.command()
def upcycle(
    dense_run: Annotated[
        str, typer.Argument(metavar="DENSE_RUN", help="Directory of the dense model's run.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory of the new run.", show_default=False)],
    experts: Annotated[int, typer.Option(min=2, help="Experts of a layer.", show_default=False)],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts that a token is sent to.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values that replace those of the dense run's config, such as optimizer.lr=1e-4.",
            show_default=False,
        ),
    ] = None,
    slices: Annotated[
        int, typer.Option(min=1, help="Parts of the dense feed-forward, each an expert's; 1 copies it whole.")
    ] = 1,
    shared_width: Annotated[int, typer.Option(min=0, help="Channels of it that the shared expert takes.")] = 0,
    dense_layers: Annotated[int, typer.Option(min=0, help="Leading blocks that stay dense.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Begin a mixture of experts as a trained dense model: its first forward pass is that model's.

    OUT gets a checkpoint of step 0 and a config.yaml, with which it is trained on; the experts part with the first
    update. docs/moe.md has the scheme.

    Example: moe-dist upcycle runs/dense runs/moe --experts 8 --top-k 2, then moe-dist train runs/moe/config.yaml
    """
    from launch.checkpoint_commands import checkpoints_of
    from moe_dist.interop.upcycle import upcycle as write

    widths = {"num_experts": experts, "top_k": top_k, "shared_expert_width": shared_width}
    asked = {"num_dense_layers": dense_layers, "moe": {**widths, "gate_scale": float(slices)}}
    config = _new_config(Path(dense_run), Path(out), overrides or (), asked)
    source = checkpoints_of(dense_run)[0]
    path = write(source, Path(out) / "checkpoints", config, slices)
    for tokenizer in Path(dense_run).glob("tokenizer.json"):
        shutil.copyfile(tokenizer, Path(out) / tokenizer.name)
    prepare(config, again=False)
    figures = {"from": str(source), "checkpoint": str(path), "config": str(Path(out) / CONFIG_FILE), **_sizes(config)}
    line = f"{path} has {figures['total']:,} parameters, {figures['active']:,} active for a token"
    typer.echo(json.dumps(figures) if as_json else f"{line}\ntrain it on: moe-dist train {figures['config']}")


def _new_config(dense_run: Path, out: Path, overrides: Sequence[str], asked: dict[str, Any]) -> Config:
    """The dense run's config with the overrides, and then with what the command decides.

    Raises:
        ConfigError: There is no dense run, OUT is not new, or an override is of a key that the command decides.
    """
    stored = stored_config(dense_run)
    if not stored.exists():
        rule = "the directory of a run, with its config.yaml"
        raise ConfigError("DENSE_RUN", str(dense_run), rule, "moe-dist train first")
    if out.exists() and any(out.iterdir()):
        raise ConfigError("OUT", str(out), "a new run begins in a new directory", "another directory")
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name.removeprefix("model.") in _DECIDED:
            raise ConfigError(name, override, "the command's options decide it", "see moe-dist upcycle --help")
    tree = parse_config(read_tree(stored, overrides)).model_dump(mode="json")
    model, moe = tree["model"], tree["model"]["moe"]
    moe |= {**asked["moe"], "activation": model["ffn_activation"]}
    moe["expert_width"] = max(1, (model["ffn_width"] - moe["shared_expert_width"]) // int(moe["gate_scale"]))
    model["num_dense_layers"] = asked["num_dense_layers"]
    tree["train"]["equal_experts_at_start"] = True
    tree["run"]["dir"] = str(out)
    return parse_config(tree)


def _sizes(config: Config) -> dict[str, int]:
    from moe_dist.model.flops import count_parameters

    counts = count_parameters(config.model)
    return {"total": counts.total, "active": counts.active}

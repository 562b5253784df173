"""`moe-dist import` and `moe-dist export`: weights of other systems in and out, on one CPU, a tensor at a time.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.run_directory import CONFIG_FILE, IMPORTED_FILE
from moe_dist.errors import ConfigError, ExchangeError

if TYPE_CHECKING:
    from moe_dist.config import Config
    from moe_dist.interop.origin import Origin

exchange_app = typer.Typer()
HUB_FOLDER = "hub"  # of a run: the small files that its weights came with
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


@exchange_app.command("import")
def import_weights(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A Hugging Face directory, or a MiniMind .pth.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of the new run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config keys, such as model.moe.balance_loss=0.01."),
    ] = None,
    parts: Annotated[int | None, typer.Option(min=1, max=99_999, help="Files; one for each 4 GiB by default.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="A field of config.json that changes nothing here.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to leave out, such as 'model.layers.61.*'.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Tokenizer files, where they are not beside the weights.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Query heads of a MiniMind file, if not its default.")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read a .pth file, by torch's weights-only loader.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Begin a run with weights of another system: writes its checkpoint of step 0, and imported.yaml to train with.

    Every name, shape and field of config.json is accounted for, or refused by name. Killed, the same command goes on.
    Any layout trains on from it: moe-dist train RUN/imported.yaml data.input=texts

    Example: moe-dist import Qwen3-30B-A3B runs/qwen model.moe.balance_loss=0.001
    """
    from moe_dist.interop.importing import match, write_checkpoint
    from moe_dist.interop.origin import files_beside

    folder = Path(run)
    if (folder / CONFIG_FILE).exists():
        raise ConfigError("RUN", run, "weights are imported into a run that has not begun", "another directory")
    with _open(Path(source), trust_pickle, heads, ignore or []) as origin:
        beside = files_beside(Path(tokenizer) if tokenizer else Path(source)) if tokenizer or _is_hub(source) else {}
        config, tree = _config_of(origin, folder, overrides or [], "tokenizer.json" in beside)
        sources = match(origin.weights, config.model, origin.table, origin.name, drop or [])
        _keep(folder, Path(source), beside, tree)
        told = f"{origin.name}, {Path(source).name}"
        path, kept = write_checkpoint(folder / "checkpoints", config, origin.weights, sources, told, parts)
    from moe_dist.checkpoint.manifest import read_manifest
    from moe_dist.checkpoint.read import parameters_in

    manifest = read_manifest(path)
    figures: dict[str, Any] = {"family": origin.name, "path": str(path), "config": str(folder / IMPORTED_FILE)}
    figures |= {"parameters": parameters_in(manifest), "parts": len(manifest.parts), "parts_kept": kept}
    _say(as_json, f"{origin.name}: {figures['parameters']:,} parameters are in {path}")
    _say(as_json, f"train on: moe-dist train {figures['config']} data.input=TEXTS")
    _answer(as_json, figures)


@exchange_app.command()
def export(
    place: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, whose newest is taken, or one.")],
    out: Annotated[str, typer.Argument(metavar="DIR", help="The new directory.", show_default=False)],
    family: Annotated[
        str | None, typer.Option(help="llama, mixtral, ...; by default that of the import, or the first that fits.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; by default as it was imported.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a file.")] = 5 * 10**9,
    as_json: AsJson = False,
) -> None:
    """Hand weights to transformers, vLLM and SGLang: safetensors, config.json, tokenizer and chat template.

    A model that no family has exactly as it is, is refused, with the key that would be lost. Killed, the same command
    goes on.

    Example: moe-dist export runs/qwen out/qwen-tuned --dtype bfloat16
    """
    from moe_dist.checkpoint.manifest import read_manifest
    from moe_dist.config import parse_config
    from moe_dist.interop.exporting import HUB_TYPES, Asked
    from moe_dist.interop.exporting import export as write_hub
    from moe_dist.interop.families import family_of

    path, run = _checkpoint_of(Path(place))
    manifest = read_manifest(path)
    config = parse_config(manifest.config)
    kept, name, beside = _beside(run, config)
    kind = dtype or kept.get("dtype") or kept.get("torch_dtype")
    kind = kind or ("float64" if config.train.precision == "fp64" else "float32")
    if kind not in HUB_TYPES:
        raise ExchangeError("--dtype", kind, f"one of {', '.join(HUB_TYPES)}", "--dtype bfloat16")
    chosen = family_of(family or name, "--family") if family or name else None
    asked = Asked(chosen, kind, shard_bytes, kept, beside)
    found, files, done = write_hub(path, manifest, Path(out), asked)
    figures = {"family": found.model_type, "from": str(path), "path": out, "dtype": kind}
    figures |= {"files": files, "files_kept": done}
    _say(as_json, f"{path} is in {out}: {found.model_type}, {kind}, {files} file(s) of weights")
    _answer(as_json, figures)


def _is_hub(source: str) -> bool:
    return Path(source).is_dir()


def _open(source: Path, trusted: bool, heads: int | None, ignored: list[str]) -> AbstractContextManager[Origin]:
    from moe_dist.interop.origin import open_hub, open_minimind

    if source.is_dir():
        return open_hub(source, ignored)
    if not source.is_file():
        raise ExchangeError("SOURCE", str(source), "a Hugging Face directory, or a MiniMind file", "name one")
    if not trusted:
        rule = "a .pth file is a pickle; it is read by torch's weights-only loader, and only when that is asked for"
        raise ExchangeError("SOURCE", str(source), rule, "--trust-pickle if you know where it comes from")
    return nullcontext(open_minimind(source, heads))


def _config_of(origin: Origin, run: Path, overrides: list[str], tokenizer: bool) -> tuple[Config, dict[str, Any]]:
    """The checked config of the new run, and what of it is not default."""
    from moe_dist.config import parse_config
    from moe_dist.config.load import apply_override

    tree: dict[str, Any] = {"run": {"dir": str(run)}, "model": origin.model}
    if tokenizer:
        tree["data"] = {"tokenizer": {"path": str(run / HUB_FOLDER / "tokenizer.json")}}
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree), tree


def _keep(run: Path, source: Path, beside: Mapping[str, bytes], tree: dict[str, Any]) -> None:
    """Writes what a run needs of its weights besides these."""
    from moe_dist.config.load import write_yaml
    from moe_dist.interop.origin import CONFIG
    from moe_dist.interop.shards import read_small

    hub = run / HUB_FOLDER
    hub.mkdir(parents=True, exist_ok=True)
    kept = {**beside, **({CONFIG: read_small(source / CONFIG)} if source.is_dir() else {})}
    for name, content in kept.items():
        (hub / name).write_bytes(content)
    if "tokenizer.json" in beside:
        (run / "tokenizer.json").write_bytes(beside["tokenizer.json"])
    (run / IMPORTED_FILE).write_text(write_yaml(tree), encoding="utf-8")


def _checkpoint_of(place: Path) -> tuple[Path, Path]:
    """The checkpoint that is meant and the directory of its run.

    Raises:
        ConfigError: There is none.
    """
    from moe_dist.checkpoint.manifest import MANIFEST
    from moe_dist.checkpoint.store import committed

    if (place / MANIFEST).exists():
        return place, place.resolve().parent.parent
    found = committed(place / "checkpoints")
    if not found:
        raise ConfigError(
            "RUN|CHECKPOINT", str(place), "a run with checkpoints, or a checkpoint", "moe-dist train first"
        )
    return found[0], place


def _beside(run: Path, config: Config) -> tuple[dict[str, Any], str | None, dict[str, bytes]]:
    """Fields of config.json that do not say what the model is, the family it came with, and the files that travel."""
    from moe_dist.interop.origin import files_beside, kept_fields

    kept, family = kept_fields(run / HUB_FOLDER)
    beside = files_beside(run / HUB_FOLDER)
    if family is None:
        kept = {"max_position_embeddings": config.data.sequence_length_tokens}
    own = run / "tokenizer.json"
    if own.exists() and own.read_bytes() != beside.get("tokenizer.json"):  # what the ids of the run mean
        from data_pipeline.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(own, config.model.vocab_size)
        end, length = tokenizer.end_of_text, config.data.sequence_length_tokens
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.decode([end])}
        beside = {"tokenizer.json": tokenizer.file_bytes}
        beside["tokenizer_config.json"] = json.dumps({**told, "model_max_length": length}).encode()
        beside["generation_config.json"] = json.dumps({"eos_token_id": end}).encode()
        kept |= {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return kept, family, beside


def _say(as_json: bool, text: str) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout)


def _answer(as_json: bool, figures: Mapping[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(figures))

"""`moe-dist data inspect`, `report`, `verify` and `export`: what a build holds, whether it is whole, other formats.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.plain_text import printable
from moe_dist.config import load_config
from moe_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_SKIPPED_SHOWN = 20

Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="A build, as `moe-dist data build` printed it.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


def inspect(
    folder: Folder,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each split whose beginning is shown.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show what a build holds: splits, tokens, where it came from, what was left out and why, some text.

    Example: moe-dist data inspect runs/data/0123456789abcdef0123
    """
    from data_pipeline.inspection import describe_build

    found = describe_build(Path(folder), samples)
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    _print_build(found, Console())


def report(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|FOLDER", help="The YAML file of a build, or its folder.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.", show_default=False),
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="FILE", help="Write it as one web page too; only an earlier report is replaced."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each split whose beginning is shown.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a build holds by source and language, what each step left out, and examples of what went and why.

    The page stands alone: it runs nothing and needs no network. Text in it is escaped, whoever wrote it.

    Example: moe-dist data report configs/demo.yaml --html report.html
    """
    from rich.console import Console

    from data_pipeline.inspection import describe_build
    from launch.build_page import write_page
    from launch.build_parts import parts_of
    from launch.build_tables import print_parts

    found = describe_build(_build_of(target, overrides or []), samples)
    size = write_page(found, Path(page)) if page is not None else 0
    if as_json:
        typer.echo(json.dumps({**found, "page": page}))
        return
    print_parts(parts_of(found), Console())
    typer.echo(
        f"{page}: {size:,} bytes" if page is not None else "--html FILE writes this as a web page, with more rows"
    )


def _build_of(target: str, overrides: list[str]) -> Path:
    """The build that a folder or a config names."""
    if not Path(target).is_dir():
        from data_pipeline.build import find_build

        return find_build(load_config(target, overrides))
    if overrides:
        rule = "values replace those of a config; a build's folder has none"
        raise ConfigError(overrides[0].partition("=")[0], overrides[0], rule, "name the config, or leave the value out")
    return Path(target)


def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Prove a build whole: every shard's hash and counts, the tokenizer, an end-of-text after every document.

    Exit code 0 when it is, 2 with the damaged file and what to do when it is not.

    Example: moe-dist data verify runs/data/0123456789abcdef0123
    """
    from data_pipeline.verification import verify_build
    from launch.progress import open_display

    with open_display() as display:
        found = verify_build(
            Path(folder), lambda done, total: display.update("verify shards", done, total, unit="bytes")
        )
    counts = f"{found['shards']} shards, {found['documents']:,} documents, {found['tokens']:,} tokens"
    typer.echo(json.dumps(found) if as_json else f"{folder} is whole: {counts}")


def export(
    folder: Folder,
    out: Annotated[str, typer.Option(metavar="PREFIX", help="Beginning of the files' names; nothing is overwritten.")],
    form: Annotated[
        Literal["megatron"], typer.Option("--format", help="Megatron-LM's indexed dataset: .bin and .idx.")
    ] = "megatron",
    as_json: AsJson = False,
) -> None:
    """Write a build in another program's format: PREFIX_train and PREFIX_heldout, each .bin and .idx.

    Megatron-LM reads them as --train-data-path PREFIX_train --valid-data-path PREFIX_heldout, with the build's
    tokenizer.json.

    Example: moe-dist data export runs/data/0123456789abcdef0123 --format megatron --out exports/corpus
    """
    from data_pipeline.megatron import export_megatron
    from launch.progress import open_display

    with open_display() as display:
        found = export_megatron(
            Path(folder), Path(out), lambda done, total: display.update("export", done, total, unit="tokens")
        )
    lines = [
        f"{row['prefix']}.bin, .idx: {row['documents']:,} documents, {row['tokens']:,} tokens of {row['dtype']}"
        for row in found.values()
    ]
    typer.echo(json.dumps({"format": form, "splits": found}) if as_json else "\n".join(lines))


def _print_build(found: Mapping[str, Any], console: Console) -> None:
    """Prints a build, readable at 100 columns without colours."""
    from rich.panel import Panel
    from rich.text import Text

    from launch.cleaning_table import print_cleaning

    console.print(_split_table("split", found["splits"]))
    if found["sources"]:
        console.print(_split_table("train, by source", found["sources"]))
    for name, value in _facts(found):
        console.print(Text.assemble((f"{name:<16}", "bold"), printable(value)), soft_wrap=True)
    for row in found["skipped"][:_SKIPPED_SHOWN]:
        console.print(Text(printable(f"  {row['where']}: {row['reason']}")), soft_wrap=True)
    if len(found["skipped"]) > _SKIPPED_SHOWN:
        console.print(f"  and {len(found['skipped']) - _SKIPPED_SHOWN} more, which --json lists")
    if found["cleaning"] is not None:
        print_cleaning(found["cleaning"], console)
    for sample in found["samples"]:
        title = f"{sample['split']}, from token {sample['position']:,}"
        console.print(Panel(Text(printable(sample["text"])), title=title, title_align="left"))


def _split_table(kind: str, splits: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for name in (kind, "shards", "documents", "tokens", "bytes of text", "bytes on disk", "bytes/token"):
        table.add_column(name, justify="left" if name == kind else "right", overflow="fold")
    for name, row in splits.items():
        keys = ("shards", "documents", "tokens", "text_bytes", "file_bytes")
        ratio = row["bytes_per_token"]
        table.add_row(printable(name), *(f"{row[key]:,}" for key in keys), "" if ratio is None else f"{ratio:.2f}")
    return table


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    tokenizer = found["tokenizer"]
    facts = [
        ("build", found["build_dir"]),
        ("fingerprint", found["fingerprint"]),
        ("tokenizer", f"{tokenizer['size']:,} tokens, end of text {tokenizer['end_of_text']}"),
        ("", f"sha256 {tokenizer['sha256']}"),
    ]
    facts += [("made from" if not i else "", f"{k}={v}") for i, (k, v) in enumerate(found["created_from"].items())]
    for i, (name, source) in enumerate(found["sources"].items()):
        said = f"{name}: {source['input']}, licence {source['license'] or 'not named'}"
        facts.append(("sources" if not i else "", said))
    others = ", ".join(f"{ending} ({count})" for ending, count in found["ignored_endings"].items())
    facts.append(("not read", others or "no file of another ending"))
    facts.append(("empty documents", f"{found['empty_documents']:,}"))
    facts.append(("skipped", f"{len(found['skipped']):,} files and records that could not be read"))
    return facts

"""`moe-dist config`: shows a resolved config, checks one, and explains every key.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from typing import Annotated, Any

import typer

from launch.exit_codes import ExitCode
from moe_dist.config.explain import KeyRow, key_rows, resolved, rows_under, section_rows
from moe_dist.config.load import find_problems, load_config, read_tree, write_yaml
from moe_dist.errors import ConfigError

config_app = typer.Typer(no_args_is_help=True, help="Show, check and explain the configuration.")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's, such as train.steps=20."),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


@config_app.command()
def show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the whole config that a run would use: the file, its base, the overrides and all defaults."""
    tree = resolved(load_config(config, overrides or ()))
    if as_json:
        _print_json({"config": tree})
    else:
        typer.echo(write_yaml(tree), nl=False)


@config_app.command()
def check(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a config without running anything: `ok`, or every problem there is and exit code 2."""
    problems = _problems_of(config, overrides or ())
    for problem in problems:
        typer.echo(str(problem), err=True)
    if as_json:
        _print_json({"ok": not problems, "problems": [_problem_fields(problem) for problem in problems]})
    elif not problems:
        typer.echo(f"ok: {config}")
    if problems:
        raise typer.Exit(ExitCode.WRONG_INPUT)


@config_app.command()
def explain(
    key: Annotated[
        str | None, typer.Argument(help="A key or a section, such as model.moe; without it, all.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what each key means: type, unit, default, allowed values."""
    rows = key_rows() if key is None else rows_under(key)
    if as_json:
        _print_json({"keys": [dataclasses.asdict(row) for row in rows]})
    elif key == rows[0].path:
        _print_details(rows[0])
    else:
        _print_table(rows)


def _problems_of(path: str, overrides: list[str] | tuple[str, ...]) -> list[ConfigError]:
    try:
        tree = read_tree(path, overrides)
    except ConfigError as problem:
        return [problem]
    return find_problems(tree)


def _problem_fields(problem: ConfigError) -> dict[str, str]:
    return {"where": problem.where, "value": str(problem.value), "rule": problem.rule, "fix": problem.fix}


def _print_json(figures: dict[str, Any]) -> None:
    typer.echo(json.dumps(figures))


def _print_details(row: KeyRow) -> None:
    lines = (
        ("key", row.path),
        ("meaning", row.meaning),
        ("type", row.type),
        ("unit", row.unit),
        ("allowed", row.allowed),
        ("default", write_yaml(row.default, one_line=True)),
    )
    for name, value in lines:
        if value:
            typer.echo(f"{name:<9}{value}")


def _print_table(rows: list[KeyRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    meanings = {section.path: section.meaning for section in section_rows()}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("key", no_wrap=True)
    table.add_column("value", ratio=3)
    table.add_column("default", ratio=2)
    table.add_column("meaning", ratio=5)
    for section, keys in itertools.groupby(rows, key=lambda row: row.path.rpartition(".")[0]):
        if section:
            table.add_row(section, "", "", meanings[section.removesuffix(".NAME")], style="bold")
        indent = "  " if section else ""
        for row in keys:
            name = indent + row.path.rpartition(".")[2]
            table.add_row(name, _value_in_words(row), _shortened(write_yaml(row.default, one_line=True)), row.meaning)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def _value_in_words(row: KeyRow) -> str:
    kind = f"{row.type} ({row.unit})" if row.unit else row.type
    if row.type.startswith("one of"):
        return row.allowed
    return f"{kind}, {row.allowed}" if row.allowed else kind


def _shortened(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."

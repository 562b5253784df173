"""`moe-dist import` and `export` in this process, as a script sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from launch.exchange_commands import exchange_app


def answer(*arguments: str | Path | int) -> tuple[int, Any]:
    """Exit code and the last line of standard output; an error of the command is raised here."""
    done = CliRunner().invoke(exchange_app, [*map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])

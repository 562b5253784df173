"""The table of exit codes."""

from __future__ import annotations

from launch.exit_codes import ExitCode, table
from moe_dist import errors
from moe_dist.errors import MoeDistError
from tests.launch.conftest import ROOT


def named_errors() -> list[type[MoeDistError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MoeDistError)]


def test_operations_page_has_the_table_of_exit_codes() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"\n{table()}\n\n" in page


def test_every_named_error_has_a_code_of_the_table_and_every_failure_an_error() -> None:
    codes = {kind.exit_code for kind in named_errors()}
    assert codes <= {int(code) for code in ExitCode}
    assert {int(code) for code in ExitCode} - codes == {ExitCode.DONE, ExitCode.FAILED}
    assert (errors.NumericFault.exit_code, errors.Interrupted.exit_code) == (ExitCode.NOT_FINITE, ExitCode.INTERRUPTED)


def test_no_code_is_written_as_a_number_by_the_commands() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "sys.exit(1" not in line and "typer.Exit(1" not in line and "typer.Exit(2" not in line, path

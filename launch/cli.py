"""The `moe-dist` command: everything a person runs.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error. Exit
codes are in `launch/exit_codes.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import data_commands
from launch.ablate_command import ablate_app
from launch.checkpoint_commands import checkpoint_app
from launch.config_commands import config_app
from launch.exchange_commands import exchange_app
from launch.exit_codes import ExitCode
from launch.failure import RankCrash
from launch.model_commands import model_app
from launch.routing_commands import routing_app
from launch.run_directory import prepare, stored_config
from launch.upcycle_command import upcycle_app
from launch.verify_commands import verify
from moe_dist.config import Config, load_config
from moe_dist.errors import ConfigError, MoeDistError

if TYPE_CHECKING:
    from launch.progress import Display

_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=_SETTINGS,
    help="Trains mixture-of-experts language models. Start with: moe-dist train configs/demo.yaml",
)
data_app = typer.Typer(no_args_is_help=True, help="Text to shards; what they hold, whether they are whole.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(routing_app, name="routing")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(model_app, name="model")
app.command()(verify)
app.add_typer(upcycle_app)
app.add_typer(exchange_app)
app.add_typer(ablate_app)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Values that replace the file's, such as train.steps=20.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Again = Annotated[
    bool, typer.Option("--again", help="Set a finished run, or one of another config, aside and train anew.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="As `moe-dist submit` printed it.", show_default=False)]
JobAddress = Annotated[
    str, typer.Option("--address", metavar="URL", help="The head node's job server, like http://head:8265.")
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Ray cluster to join, or `local` for a new one. Else RAY_ADDRESS, a cluster running here, a new one.",
            show_default=False,
        ),
    ] = None,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Train on a Ray cluster: build the data, train, evaluate, sample. A stopped run continues when run again.

    Example: moe-dist train configs/demo.yaml train.steps=50 launch.workers=2
    """

    def run(checked: Config, display: Display) -> dict[str, Any]:
        from launch.generations import run_on_ray
        from launch.progress import follow
        from launch.ray_cluster import connect

        _check_layout(checked, checked.launch.workers.max)
        display.message("connecting to Ray")
        with connect(checked, address) as cluster:
            where = "started on this machine" if cluster.started_here else f"at {cluster.address}"
            display.message(f"Ray cluster {where}, {len(cluster.nodes)} node(s)")
            build_dir = _build(checked, True, display)
            with follow(Path(checked.run.dir), display):
                return run_on_ray(checked, build_dir, cluster, say=display.message)

    _run(load_config(config, overrides or ()), again, as_json, run)


@app.command()
def simulate(
    config: ConfigPath,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine's CPU.", show_default=False)],
    overrides: Overrides = None,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Train as N gloo processes on this CPU, without Ray: the same numbers as on a cluster with N ranks.

    Example: moe-dist simulate configs/demo.yaml --ranks 4 train.steps=20
    """

    def run(checked: Config, display: Display) -> dict[str, Any]:
        from launch.local import run_local
        from launch.progress import follow

        _check_layout(checked, ranks)
        build_dir = _build(checked, False, display)
        with follow(Path(checked.run.dir), display):
            return run_local(checked, build_dir, ranks, say=display.message)

    _run(load_config(config, overrides or ()), again, as_json, run)


@app.command()
def layout(
    config: ConfigPath,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run.", show_default=False)],
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines that share them evenly.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which rank holds which cut and which experts, and who talks to whom; starts nothing.

    A layout that cannot work is refused with the rule it breaks and the nearest that can.

    Example: moe-dist layout configs/demo.yaml --ranks 8 --nodes 2 parallel.tensor=2
    """
    from rich.console import Console

    from launch.layout_command import describe, show

    found = describe(load_config(config, overrides or ()), ranks, nodes)
    if as_json:
        _answer(True, found, "")
    else:
        show(found, Console())


@data_app.command("build")
def data_build(
    config: ConfigPath,
    overrides: Overrides = None,
    use_ray: Annotated[bool, typer.Option("--ray/--no-ray", help="On a Ray cluster, or in this process.")] = True,
    as_json: AsJson = False,
) -> None:
    """Turn raw text into shards; done already when the same text was built before.

    The input is a folder, a file, a pattern such as 'texts/**/*.md', or one of these on an object store. Killed or
    stopped, the same command goes on from the files and shards that are done.

    Example: moe-dist data build configs/demo.yaml data.input=s3://bucket/texts
    """
    checked = load_config(config, overrides or ())
    from launch.progress import open_display

    with open_display() as display, _output_to_stderr():
        if use_ray:
            from launch.ray_cluster import connect

            with connect(checked):
                build_dir = _build(checked, True, display)
        else:
            build_dir = _build(checked, False, display)
    from rich.console import Console

    from data_pipeline.manifest import read_manifest
    from launch.cleaning_table import print_cleaning

    cleaning = read_manifest(build_dir).cleaning
    if cleaning is not None:
        print_cleaning(cleaning, Console(file=sys.stderr if as_json else sys.stdout))
    _answer(as_json, {"build_dir": str(build_dir), "cleaning": cleaning}, f"shards are in {build_dir}")


data_app.command("inspect")(data_commands.inspect)
data_app.command("report")(data_commands.report)
data_app.command("verify")(data_commands.verify)
data_app.command("export")(data_commands.export)


@app.command()
def submit(
    config: ConfigPath,
    address: JobAddress,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the log until the job ends.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train as a Ray Job on a remote cluster; ends with the job's exit code.

    Example: moe-dist submit configs/demo.yaml run.dir=/shared/run1 --address http://head:8265
    """
    from launch.jobs import submit as submit_job

    log = sys.stderr if as_json else sys.stdout
    job_id, code = submit_job(config, overrides or (), address, follow, log)
    if as_json:
        _answer(True, {"job_id": job_id, "exit_code": code if follow else None}, "")
    elif not follow:
        typer.echo(job_id)
    raise typer.Exit(code)


@app.command()
def logs(
    job_id: JobId,
    address: JobAddress,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Stay until the job ends.")] = True,
) -> None:
    """Show a job's log.

    Example: moe-dist logs raysubmit_123 --address http://head:8265
    """
    from launch.jobs import logs as show_logs

    raise typer.Exit(show_logs(job_id, address, follow))


@app.command()
def status(job_id: JobId, address: JobAddress, as_json: AsJson = False) -> None:
    """Show a job's state.

    Example: moe-dist status raysubmit_123 --address http://head:8265
    """
    from launch.jobs import status as job_status

    state = job_status(job_id, address)
    _answer(as_json, state, f"{state['status']}  {state['message'] or ''}".rstrip())


@app.command()
def stop(job_id: JobId, address: JobAddress, as_json: AsJson = False) -> None:
    """Let a job write a checkpoint and end; submitting the same run again continues it.

    Example: moe-dist stop raysubmit_123 --address http://head:8265
    """
    from launch.jobs import stop as stop_job

    state = stop_job(job_id, address)
    _answer(as_json, state, state["status"])


@app.command()
def generate(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's directory.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A beginning to continue; may be given several times.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length; the run's own by default.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 takes the most probable token.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue text with a trained run's newest checkpoint.

    Example: moe-dist generate runs/demo --prompt "def " --max-new-tokens 64
    """
    stored = stored_config(Path(run_dir))
    if not stored.exists():
        raise ConfigError("RUN_DIR", run_dir, "the directory of a run, with its config.yaml", "moe-dist train first")
    settings = load_config(stored).generate
    prompts = prompt or list(settings.prompts)
    length = max_new_tokens or settings.max_new_tokens
    heat = settings.temperature if temperature is None else temperature
    from launch.samples import generate_from_run

    with _output_to_stderr():
        texts = generate_from_run(Path(run_dir), prompts, length, heat, seed)
    samples = [{"prompt": start, "text": text} for start, text in zip(prompts, texts, strict=True)]
    _answer(as_json, {"samples": samples}, "\n\n".join(texts))


def main() -> None:
    """The entry point: runs the command line and turns errors into exit codes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside training, the same as Ctrl-C
    try:
        code = app(standalone_mode=False) or ExitCode.DONE
        if code == ExitCode.INTERRUPTED and not isinstance(code, ExitCode):  # a bare number: typer's word for Ctrl-C
            raise KeyboardInterrupt
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except RankCrash as error:
        print(error, file=sys.stderr)
        code = ExitCode.FAILED
    except (KeyboardInterrupt, typer.Abort):
        print("stopped at once; the same command goes on from what is done", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: a wrong command line, or a bug
        code = _usage_or_bug(error)
    sys.exit(code)


def _usage_or_bug(error: Exception) -> int:
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):  # a wrong command or option: the parser explains it
        show()
        return int(error.exit_code)
    traceback.print_exc()
    return ExitCode.FAILED


def _run(config: Config, again: bool, as_json: bool, run: Callable[[Config, Display], dict[str, Any]]) -> None:
    """Trains, or finds the run finished; prints the report; exits with 130 after an interruption."""
    from rich.console import Console

    from launch.progress import open_display
    from launch.report import print_report

    summary = prepare(config, again)
    if summary is not None:
        print(f"{config.run.dir} is finished; --again trains anew, a larger train.steps goes on", file=sys.stderr)
    else:
        with open_display() as display, _output_to_stderr():
            summary = run(config, display)
    console = Console(file=sys.stderr if as_json else sys.stdout)
    print_report(summary, console)
    if as_json:
        _answer(True, summary, "")
    if summary.get("status") == "interrupted":
        print(
            f"interrupted after step {summary.get('steps')} of {config.train.steps}; the same command continues",
            file=sys.stderr,
        )
        raise typer.Exit(ExitCode.INTERRUPTED)


def _check_layout(config: Config, ranks: int) -> None:
    """Refuses an impossible layout before any process starts."""
    from moe_dist.parallel.layout import layout_of

    layout_of(config, ranks, config.parallel.ranks_per_node)


def _build(config: Config, use_ray: bool, display: Display) -> Path:
    from data_pipeline.build import build
    from launch.build_progress import BuildProgress

    return build(config, use_ray, BuildProgress(display))


def _answer(as_json: bool, figures: dict[str, Any], text: str) -> None:
    """The result of a command: one JSON object, or a line for people."""
    typer.echo(json.dumps(figures) if as_json else text)


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Keeps standard output for the result: what libraries print goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    main()

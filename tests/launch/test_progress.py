"""What a person sees of a run, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from data_pipeline.once import Progress
from launch.build_progress import BuildProgress
from launch.progress import PROGRESS_FILE, Clock, PlainDisplay, duration, follow, open_display
from launch.report import print_report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def append(path: Path, *lines: dict[str, Any] | str) -> None:
    with path.open("a") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 2.5, "tokens_per_second": 1234.0, "mfu": None, "max_vio": 0.25}


def tell(folder: Path, stream: io.StringIO) -> str:
    """A run whose first gang dies in the middle of a line."""
    path = folder / PROGRESS_FILE
    append(path, {"event": "message", "text": "of an earlier run"})
    with open_display(stream) as display, follow(folder, display):
        append(path, {"event": "start", "first_step": 0, "steps": 200, "ranks": 2}, *map(step, range(1, 51)))
        append(path, '{"event": "step", "st', {"event": "start", "first_step": 40, "steps": 200, "ranks": 2})
        append(path, {"event": "unheard of"}, *map(step, range(41, 201)))
        append(path, {"event": "evaluate", "step": 200, "loss": 2.0, "bits_per_byte": 1.5})
        append(path, {"event": "checkpoint", "step": 200, "path": "c/200"}, {"event": "message", "text": "[hm]"})
        append(path, {"event": "end", "status": "finished"})
    return stream.getvalue()


def test_follow_plain_stream_writes_few_lines(tmp_path: Path) -> None:
    text = tell(tmp_path, io.StringIO())
    lines = text.splitlines()
    assert lines[0] == "training 200 steps, 2 ranks"
    assert "workers started again: going on after step 40 of 200, 2 ranks" in lines
    assert lines[-3:] == [
        "step 200: held-out loss 2.0000, 1.500 bits per byte",
        "step 200: checkpoint c/200",
        "[hm]",
    ]
    assert any(line.startswith("step 200/200  loss 2.5000  1,234 tokens/s  MaxVio 0.25") for line in lines)
    assert len(lines) < 40
    assert "earlier run" not in text


def test_follow_terminal_draws_a_bar(tmp_path: Path) -> None:
    text = tell(tmp_path, Terminal())
    assert "200/200" in text
    assert "loss 2.5000" in text
    assert "[hm]" in text


def test_display_bytes_are_shown_in_megabytes() -> None:
    stream = io.StringIO()
    PlainDisplay(stream).update("read text", 1_500_000, 6_000_000, unit="bytes")
    assert stream.getvalue().startswith("read text 1.5/6.0 MB")


def test_clock_going_back_starts_its_pace_anew() -> None:
    clock = Clock(0)
    assert clock.left(0, 10) == ""
    assert clock.left(5, 10) == "0s left"
    assert clock.left(2, 10) == ""
    assert clock.left(10, 10) == ""


def test_clock_leaves_what_was_found_out_of_the_pace() -> None:
    clock = Clock(0)
    assert clock.left(5, 10, found=5) == ""
    assert clock.left(6, 10, found=5) == "0s left"


def test_build_progress_shows_rates_of_new_work_and_what_was_found() -> None:
    seconds = iter([10.0, 10.0, 12.0, 14.0, 20.0, 24.0, 30.0, 31.0])
    stream = io.StringIO()
    show = BuildProgress(PlainDisplay(stream), lambda: next(seconds))
    show(Progress("read text", 0, 20_000_000))
    show(Progress("read text", 8_000_000, 20_000_000, 8_000_000))
    show(Progress("read text", 14_000_000, 20_000_000, 8_000_000))
    show(Progress("read text", 20_000_000, 20_000_000, 8_000_000))
    show(Progress("write shards", 0, 20_000_000))
    show(Progress("write shards", 20_000_000, 20_000_000, 0, 5_000_000))
    show(Progress("train tokenizer", 0, 20_000_000))
    show(Progress("train tokenizer", 20_000_000, 20_000_000, 20_000_000))
    shown = [line.split("  ")[:-1] for line in stream.getvalue().splitlines()]
    shown = [[part for part in line if not part.endswith((" elapsed", " left"))] for line in shown]
    assert shown == [
        ["read text 0.0/20.0 MB"],
        ["read text 8.0/20.0 MB", "8.0 MB found done"],
        ["read text 14.0/20.0 MB", "3.0 MB/s", "8.0 MB found done"],
        ["read text 20.0/20.0 MB", "3.0 MB/s", "8.0 MB found done"],
        ["write shards 0.0/20.0 MB"],
        ["write shards 20.0/20.0 MB", "5.0 MB/s", "1,250,000 tokens/s"],
        ["train tokenizer 0.0/20.0 MB"],
        ["train tokenizer 20.0/20.0 MB", "found done"],
    ]


def test_duration_is_readable() -> None:
    assert [duration(s) for s in (0.4, 59.4, 190, 7500)] == ["0s", "59s", "3m 10s", "2h 05m"]


def test_print_report_fits_100_columns_without_colours() -> None:
    from rich.console import Console

    summary = {
        "status": "finished",
        "run_dir": "runs/demo",
        "steps": 100,
        "seconds": 81.5,
        "tokens_per_second": 5123.4,
        "mfu": 0.31,
        "parameters": {"total": 9_000_000, "active": 3_000_000},
        "heldout": {
            "before": {"loss": 7.62, "bits_per_byte": 3.1},
            "after": {"loss": 4.01, "bits_per_byte": 1.9},
            "bigram_bits_per_byte": 2.4,
        },
        "expert_load": [{"layer": i, "load": [1 / 16] * 16, "max_vio": 0.1} for i in range(4)],
        "drop_rate": 0.0,
        "left_out_rows": {"train-000001-0000.arrow": 12, "train-000003-0000.arrow": 1},
        "routing": {"experts": 64, "dead_experts": 3, "entropy_nats": 1.25, "even_entropy_nats": 2.773}
        | {"rank_load": 1.061, "bytes_sent": 12_345_678.0},
        "samples": [{"prompt": "def ", "text": "def f(x): [red]" + "a" * 200}] * 3,
        "workers": [{"rank": 0, "node": "a"}, {"rank": 1, "node": "b"}],
        "checkpoint": "runs/demo/checkpoints/100",
    }
    stream = io.StringIO()
    print_report(summary, Console(file=stream, width=100))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for part in ("7.6200", "2.400", "[red]", "MaxVio", "5,123 tokens/s, MFU 31.0%", "2 on 2 nodes", "runs/demo"):
        assert part in text
    assert "3 of 64 experts dead, entropy 1.25 of 2.77 nats, rank load 1.06, 12.3 MB sent a step" in text
    assert "13 rows of 2 damaged shards: train-000001-0000.arrow, train-000003" in text
    assert text.count("6.2") == 4 * 16 + 1
    assert "\x1b" not in text


def test_print_report_interrupted_run_has_what_there_is() -> None:
    from rich.console import Console

    stream = io.StringIO()
    print_report({"status": "interrupted", "steps": 3, "losses": []}, Console(file=stream))
    assert stream.getvalue().split() == ["steps", "3"]

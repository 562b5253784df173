"""A build that is killed goes on from what is done, and ends with the bytes of one that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build
from data_pipeline.manifest import read_manifest
from data_pipeline.once import Progress
from data_pipeline.work import WorkFolder, work_folder
from moe_dist.config import Config, parse_config
from moe_dist.errors import DataError

REPORTS = 45  # of the builds here; a few less, so that none that is to be killed ends before
CLEANING = {"clean": {"normalize": "NFC", "mask": ["email"]}, "dedup": {"exact": True}}


def _tree(source: Path, target: Path, **data: Any) -> dict[str, Any]:
    section = {"input": str(source), "dir": str(target), "shard_bytes": 10_000, "sequence_length_tokens": 32}
    return {"data": {**section, **CLEANING, **data}, "model": {"vocab_size": 300}}


def _configure(source: Path, target: Path, **data: Any) -> Config:
    return parse_config(_tree(source, target, **data))


def _files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps: list[Progress] = []
    folder = build(_configure(texts, tmp_path_factory.mktemp("undisturbed")), False, steps.append)
    assert len(steps) - 10 < REPORTS < len(steps) - 3
    return folder


@dataclass(frozen=True)
class Case:
    """An input, its undisturbed build, what its configuration has of its own, and how many reports a build makes."""

    source: Path
    undisturbed: Path
    data: dict[str, Any]
    reports: int

    def tree(self, target: Path) -> dict[str, Any]:
        return _tree(self.source, target, **self.data)


@pytest.fixture(scope="module")
def cleaned(texts: Path, undisturbed: Path) -> Case:
    return Case(texts, undisturbed, {}, REPORTS)


@pytest.fixture(scope="module")
def copied(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Text with exact copies, near-duplicates and evaluation text in it, also across work items."""
    folder = tmp_path_factory.mktemp("copied")
    source, evaluation = folder / "in", folder / "evaluation"
    source.mkdir()
    evaluation.mkdir()
    question = "which of the seven bridges did nobody cross twice in one and the same walk"
    (evaluation / "q.jsonl").write_text(json.dumps({"question": question}))
    draw = random.Random(0)
    for path in sorted(texts.iterdir()):
        text = f"{' '.join(f'w{draw.randrange(10**6)}' for _ in range(400))} {path.read_bytes().decode()}"
        (source / path.name).write_text(text, newline="")
        number = int(path.stem.removeprefix("text"))
        if number % 5 == 0:
            (source / f"u{number:03d}.txt").write_text(f"NEW! {text} the end", newline="")
        if number % 7 == 0:
            (source / f"v{number:03d}.txt").write_text(text, newline="")
        if number % 9 == 0:
            (source / f"w{number:03d}.txt").write_text(f"{text[:900]} {question} {text[900:1800]}", newline="")
    data: dict[str, Any] = {"clean": {}, "shard_bytes": 40_000, "dedup": {"exact": True, "near": {"similarity": 0.7}}}
    data |= {"decontaminate": {"against": [str(evaluation)], "text_field": "question"}}
    steps: list[Progress] = []
    undisturbed = build(_configure(source, folder / "out", **data), False, steps.append)
    account = read_manifest(undisturbed).cleaning
    assert account is not None
    assert sum(account["removed"]["exact_duplicate"].values()) == 9
    assert sum(account["removed"]["near_duplicate"].values()) == 12
    assert sum(account["removed"]["decontaminated"].values()) == 7
    assert (len(account["near_duplicates"]), len(account["decontaminated"])) == (12, 7)
    return Case(source, undisturbed, data, len(steps) - 5)


class Builder:
    """A builder in a process of its own, with those that it starts."""

    def __init__(self, tree: dict[str, Any], workers: int) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "tests.data_pipeline.builder", json.dumps(tree), str(workers)]
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def kill_after(self, reports: int, seconds: float) -> list[dict[str, Any]]:
        """Kills it so many reports and seconds after its start; returns the reports it made until then."""
        assert self._process.stdout is not None
        lines = [line for _, line in zip(range(reports), self._process.stdout, strict=False)]
        time.sleep(seconds)
        self._process.kill()
        lines += self._process.stdout
        self._process.wait(60)
        self._end_group()
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def finish(self) -> tuple[Path, list[dict[str, Any]]]:
        """The build and the reports."""
        *reports, folder = map(json.loads, self._process.communicate(timeout=120)[0].splitlines())
        assert self._process.returncode == 0
        return Path(folder), reports

    def _end_group(self) -> None:
        """What a killed driver leaves of its cluster goes too, as no test may leave processes."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _prove_kills(case: Case, target: Path, workers: int, kills: int, seed: int) -> None:
    """Kills builders at random moments of what is left to do, and lets one finish, with the undisturbed bytes."""
    tree, draw = case.tree(target), random.Random(seed)
    for turn in range(kills):
        earliest, latest = 1 + case.reports * turn // kills, case.reports * (turn + 1) // kills
        Builder(tree, workers).kill_after(draw.randint(earliest, latest), draw.uniform(0, 0.02))
    folder, reports = Builder(tree, workers).finish()
    assert _files(folder) == _files(case.undisturbed)
    # Without a report the last kill came just after the build had its name, and there was nothing left to find.
    assert not reports or max(report["found"] for report in reports) > 0
    assert list(target.iterdir()) == [folder]


def test_build_killed_at_three_moments_ends_with_the_same_bytes(cleaned: Case, tmp_path: Path) -> None:
    _prove_kills(cleaned, tmp_path, workers=0, kills=3, seed=0)


def test_build_without_copies_killed_at_three_moments_ends_with_the_same_bytes(copied: Case, tmp_path: Path) -> None:
    _prove_kills(copied, tmp_path, workers=0, kills=3, seed=3)


@pytest.mark.slow
def test_build_killed_at_ten_moments_ends_with_the_same_bytes(cleaned: Case, copied: Case, tmp_path: Path) -> None:
    for seed in range(3):
        _prove_kills(cleaned, tmp_path / f"cleaned{seed}", workers=0, kills=10, seed=seed)
        _prove_kills(copied, tmp_path / f"copied{seed}", workers=0, kills=10, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cleaned", "copied"])
def test_build_on_ray_killed_at_ten_moments_ends_with_the_same_bytes(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    _prove_kills(request.getfixturevalue(name), tmp_path, workers=2, kills=10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_build_on_any_number_of_workers_gives_the_same_bytes(
    cleaned: Case, copied: Case, tmp_path: Path, workers: int
) -> None:
    for case in (cleaned, copied):
        folder, _ = Builder(case.tree(tmp_path), workers).finish()
        assert _files(folder) == _files(case.undisturbed)


def test_build_begun_on_one_path_is_finished_on_the_other(texts: Path, undisturbed: Path, tmp_path: Path) -> None:
    _stop_after(_configure(texts, tmp_path), 30)
    folder, reports = Builder(_tree(texts, tmp_path), workers=1).finish()
    assert _files(folder) == _files(undisturbed)
    assert max(report["found"] for report in reports) > 0


class Stop(BaseException):
    """Ends a build in this process."""


def _stop_after(config: Config, reports: int) -> WorkFolder:
    """Stops a build after so many reports; the folder that it leaves."""
    steps: list[Progress] = []

    def report(step: Progress) -> None:
        steps.append(step)
        if len(steps) == reports:
            raise Stop

    with pytest.raises(Stop):
        build(config, False, report)
    (left,) = Path(config.data.dir).iterdir()
    return work_folder(left.with_name(left.name.removeprefix(".").removesuffix(".work")))


def _go_on(config: Config) -> tuple[Path, dict[str, Progress]]:
    """The finished build and the last report of each stage."""
    last: dict[str, Progress] = {}
    return build(config, False, lambda step: last.update({step.stage: step})), last


def test_build_started_again_does_only_what_is_not_done_and_says_so(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = _configure(texts, tmp_path)
    work = _stop_after(config, 40)
    recorded = [json.loads(path.read_bytes()[65:]) for path in work.path.glob("shards-*")]
    names = {row["file"] for record in recorded for rows in record["shards"].values() for row in rows}
    assert len(names) > 5
    before = {name: (work.build / name).stat().st_ino for name in names}
    folder, last = _go_on(config)
    assert _files(folder) == _files(undisturbed)
    assert {name: (folder / name).stat().st_ino for name in before} == before
    for stage in ("read text", "train tokenizer"):
        assert last[stage].found == last[stage].total
    assert 0 < last["write shards"].found < last["write shards"].total
    everything, own = (_tokens(place, names) for place, names in ((folder, None), (folder, set(before))))
    assert last["write shards"].tokens == everything - own
    assert list(tmp_path.iterdir()) == [folder]


def _tokens(folder: Path, names: set[str] | None) -> int:
    splits = json.loads((folder / "manifest.json").read_text())["splits"].values()
    return sum(row["tokens"] for rows in splits for row in rows if names is None or row["file"] in names)


def test_build_without_copies_goes_on_from_examples_and_counts_that_are_done(copied: Case, tmp_path: Path) -> None:
    """What a stopped one wrote down of examples and languages is all that the next one knows of those items."""
    config = parse_config(copied.tree(tmp_path))
    work = _stop_after(config, copied.reports)
    (work.path / "evaluation-runs").write_bytes(b"torn")
    folder, last = _go_on(config)
    assert _files(folder) == _files(copied.undisturbed)
    assert last["read text"].found == last["read text"].total
    assert 0.6 * last["write shards"].total < last["write shards"].found < last["write shards"].total


@pytest.mark.parametrize("damage", ["flipped", "torn", "empty", "missing"])
def test_what_was_done_and_is_damaged_is_done_again(
    texts: Path, undisturbed: Path, tmp_path: Path, damage: str
) -> None:
    config = _configure(texts, tmp_path)
    work = _stop_after(config, 40)
    damaged = ["survey-000003", "tokenizer", "shards-000002", "build/tokenizer.json"]
    damaged.append(f"build/{next(work.build.glob('train-000004-*')).name}")
    for name in damaged:
        whole = (work.path / name).read_bytes()
        middle = len(whole) // 2
        if damage == "missing":
            (work.path / name).unlink()
        else:
            flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            parts = {"flipped": flipped, "torn": whole[:middle], "empty": b""}
            (work.path / name).write_bytes(parts[damage])
    folder, last = _go_on(config)
    assert _files(folder) == _files(undisturbed)
    assert 0 < last["read text"].found < last["read text"].total
    assert last["train tokenizer"].found == 0
    assert 0 < last["write shards"].found < last["write shards"].total


def test_shards_of_another_tokenizer_are_not_taken_over(texts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """As where another version of a library trains another one, and the record of the first is lost."""
    config = _configure(texts, tmp_path)
    work = _stop_after(config, 40)
    for path in work.path.glob("shards-*"):
        line, contents = path.read_bytes()[:65], path.read_bytes()[65:]
        work.keep(path.name, contents, b"of another basis")
        assert path.read_bytes()[:65] != line
    folder, last = _go_on(config)
    assert _files(folder) == _files(undisturbed)
    assert last["write shards"].found == 0


def test_files_that_the_manifest_does_not_name_are_not_published(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = _configure(texts, tmp_path)
    work = _stop_after(config, 40)
    for name in ("train-000000-0007.arrow", ".train-000000-0000.arrow.0123", "manifest.json"):
        (work.build / name).write_bytes(b"of a killed builder")
    assert _files(_go_on(config)[0]) == _files(undisturbed)


@pytest.mark.parametrize("reports", [1, 2, 12, 24, 25, 26, 27, 40, 49])
def test_builder_that_another_overtakes_returns_its_build(
    texts: Path, undisturbed: Path, tmp_path: Path, reports: int
) -> None:
    config = _configure(texts, tmp_path)
    steps: list[Progress] = []
    others: list[Path] = []

    def report(step: Progress) -> None:
        steps.append(step)
        if len(steps) == reports:
            others.append(build(config, use_ray=False))

    folder = build(config, False, report)
    assert [folder] == others == list(tmp_path.iterdir())
    assert _files(folder) == _files(undisturbed)


def _copied(texts: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in texts.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("reports", [1, 30])
def test_input_that_changes_in_mid_build_stops_it_with_the_file(texts: Path, tmp_path: Path, reports: int) -> None:
    source = _copied(texts, tmp_path / "in")
    steps: list[Progress] = []

    def report(step: Progress) -> None:
        steps.append(step)
        if len(steps) == reports:
            (source / "text059.txt").write_text("another text")

    with pytest.raises(DataError, match=r"text059\.txt(.|\n)*does not change while"):
        build(_configure(source, tmp_path / "out"), False, report)
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_input_that_changes_between_two_tries_is_another_build(texts: Path, tmp_path: Path) -> None:
    source = _copied(texts, tmp_path / "in")
    work = _stop_after(_configure(source, tmp_path / "out"), 40)
    (source / "text059.txt").write_text("another text")
    folder, last = _go_on(_configure(source, tmp_path / "out"))
    assert work_folder(folder) != work
    assert last["read text"].found == 0

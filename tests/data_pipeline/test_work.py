from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from data_pipeline.work import WorkFolder, sweep, work_folder

DAY = 24 * 3600


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = work_folder(tmp_path / "0123")
    folder.open()
    return folder


def test_record_is_found_with_its_basis_and_with_no_other(work: WorkFolder) -> None:
    work.keep("survey-000000", b"what was found", b"of these files")
    assert work.kept("survey-000000", b"of these files") == b"what was found"
    assert work.kept("survey-000000", b"of those files") is None
    assert work.kept("survey-000000", b"of these file") is None
    assert work.kept("survey-000001", b"of these files") is None
    assert list(work.scratch.iterdir()) == []


def test_record_torn_or_flipped_anywhere_is_not_believed(work: WorkFolder) -> None:
    work.keep("tokenizer", b"contents of a record", b"basis")
    path = work.path / "tokenizer"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    draw = random.Random(0)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    for contents in (*damaged, whole + b"x"):
        path.write_bytes(contents)
        assert work.kept("tokenizer", b"basis") is None
    path.write_bytes(whole)
    assert work.kept("tokenizer", b"basis") == b"contents of a record"


def _aged(folder: Path, days: float, newest: float | None = None) -> Path:
    """A folder whose times are days ago, but for one file's in it."""
    (folder / "build").mkdir(parents=True)
    (folder / "build" / "train.arrow").write_bytes(b"x")
    for path in (folder / "build" / "train.arrow", folder / "build", folder):
        os.utime(path, (time.time() - days * DAY,) * 2)
    if newest is not None:
        os.utime(folder / "build" / "train.arrow", (time.time() - newest * DAY,) * 2)
    return folder


def test_sweep_removes_what_nobody_wrote_into_for_a_day(tmp_path: Path) -> None:
    own = _aged(tmp_path / ".own.work", 3)
    _aged(tmp_path / ".old.work", 1.1)
    _aged(tmp_path / ".old.0123.partial", 1.1)
    _aged(tmp_path / "old", 9)
    _aged(tmp_path / ".young.work", 0.9)
    _aged(tmp_path / ".busy.work", 9, newest=0.1)
    sweep(tmp_path, WorkFolder(own))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".busy.work", ".own.work", ".young.work", "old"]


def test_folder_that_is_opened_again_is_young(tmp_path: Path) -> None:
    own = WorkFolder(_aged(tmp_path / ".own.work", 3))
    own.open()
    sweep(tmp_path, WorkFolder(tmp_path / ".other.work"))
    assert own.path.is_dir()


def test_removed_folder_does_not_come_back_with_a_record(work: WorkFolder) -> None:
    work.remove()
    with pytest.raises(FileNotFoundError):
        work.keep("survey-000000", b"late", b"basis")
    assert not work.path.exists()

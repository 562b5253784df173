from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.listing import InputFile, list_input
from data_pipeline.survey import Sampled, Surveyor, WorkItem, merge, plan_items, training_texts, trim
from moe_dist.errors import DataError


def _item(folder: Path) -> WorkItem:
    return WorkItem(0, list_input(str(folder), (".txt",)).files)


@given(st.lists(st.tuples(st.sampled_from(["plain", ".jsonl"]), st.integers(0, 30_000)), max_size=40))
def test_plan_keeps_every_file_once_in_order_and_bounds_items(files: list[tuple[str, int]]) -> None:
    listed = [InputFile(f"{i:03d}", "", kind, size, 0) for i, (kind, size) in enumerate(files)]
    items = plan_items(listed, 20_000)
    assert [file for item in items for file in item.files] == listed
    assert [item.index for item in items] == list(range(len(items)))
    for item in items:
        assert item.size_bytes <= 20_000 or sum(file.size_bytes > 0 for file in item.files) == 1
        assert all(file.kind == "plain" for file in item.files) or len(item.files) == 1


def test_survey_of_a_damaged_file_stops_or_leaves_the_whole_file_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"good line\n" * 40_000 + b"\xff")
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(DataError, match="offset 400000"):
        Surveyor("text", False, 100, 100)(_item(tmp_path))
    found = Surveyor("text", True, 100, 100)(_item(tmp_path))
    assert (found.documents, found.empty, found.damaged) == (1, 1, {"b.txt"})
    assert [id_ for id_, _ in found.skipped] == ["b.txt"]
    assert "offset 400000" in found.skipped[0][1]
    assert [sampled.text for sampled in found.sample] == ["good"]


def test_survey_of_a_bad_record_leaves_only_the_record_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 1}\n{"text": "y"}\n')
    found = Surveyor("text", True, 100, 100)(_item(tmp_path))
    assert (found.documents, found.damaged) == (2, set())
    assert [id_ for id_, _ in found.skipped] == ["a.jsonl:2"]


def test_sample_is_the_same_however_the_work_is_cut(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 50)
    files = _item(tmp_path).files
    total = sum(file.size_bytes for file in files)
    surveyor = Surveyor("text", False, total // 4, total)
    texts = []
    for size in (1, 7, 60):
        items = [WorkItem(0, files[i : i + size]) for i in range(0, 60, size)]
        sample = trim(merge(map(surveyor, items)).sample, total // 2)
        texts.append(list(training_texts(sample, 0, total // 4)))
    assert texts[0][:10] == texts[1][:10] == texts[2][:10]
    assert sum(len(text) for text in texts[2]) == total // 4


@given(st.lists(st.tuples(st.integers(0, 99), st.text(min_size=1, max_size=9)), max_size=30), st.integers(1, 100))
def test_training_texts_are_within_the_limit_and_of_the_training_split(
    documents: list[tuple[int, str]], limit: int
) -> None:
    order = random.Random(0).sample(range(1000), len(documents))
    sample = [Sampled(o, s, text, len(text.encode())) for o, (s, text) in zip(order, documents, strict=True)]
    texts = list(training_texts(sample, 50, limit))
    kept = [s.text for s in sorted(sample, key=lambda s: s.order) if s.split >= 50]
    assert sum(len(text.encode()) for text in texts) <= limit
    assert "".join(kept).startswith("".join(texts))

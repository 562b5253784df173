from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.contamination import Decontaminator, list_evaluation, open_decontaminator
from data_pipeline.work import work_folder
from moe_dist.config import parse_config
from moe_dist.config.data_schema import DataConfig
from moe_dist.errors import DataError

TEXT = "one two three four five six seven"


def decontaminator(folder: Path, texts: list[str], **settings: Any) -> Decontaminator:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    tree = {"data": {"decontaminate": {"against": [str(folder)], **settings}}}
    evaluation, work = list_evaluation(parse_config(tree).data), work_folder(folder / ".build")
    assert evaluation is not None
    work.open()
    return open_decontaminator(evaluation, work)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, "one two three four five"),
        ("before it ONE, two\n\nThree (four) 'five' after", "ONE, two\n\nThree (four) 'five"),
        ("zero three four five six seven", "three four five six seven"),
        ("one two three four", None),
        ("one two three four 5 six seven", None),
        ("five four three two one", None),
        ("one two three four fivesix", None),
        ("", None),
        ("...", None),
    ],
)
def test_text_leaks_where_it_shares_a_whole_run_of_words(tmp_path: Path, text: str, expected: str | None) -> None:
    find = decontaminator(tmp_path, [TEXT], ngram_words=5)
    leaks = find(["another text of five words", text, "and one more of these"])
    assert leaks[0] is leaks[2] is None
    assert (leaks[1].text if leaks[1] else None) == expected


def test_chinese_leaks_by_characters(tmp_path: Path) -> None:
    find = decontaminator(tmp_path, ["白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"])
    leaks = find(
        ["詩云：白日依山盡黃河入海流，欲窮千里。", "白日依山盡，黃河入海", "又曰：黃河入海流欲窮千里目更上一層樓"]
    )
    assert [leak.text if leak else None for leak in leaks] == [
        "白日依山盡黃河入海流，欲窮千",
        None,
        "黃河入海流欲窮千里目更上一",
    ]


def test_leak_names_the_first_file_that_has_the_run(tmp_path: Path) -> None:
    find = decontaminator(tmp_path, ["nothing of the kind here", TEXT, f"again {TEXT}"], ngram_words=5)
    assert [leak.against for leak in find([TEXT, "again one two three four", f"x {TEXT}"]) if leak] == [
        "1.txt",
        "2.txt",
        "1.txt",
    ]
    assert find.figures == {"files": 3, "documents": 3, "too_short": 0, "runs": 1 + 3 + 1}


@given(st.lists(st.sampled_from("ab"), max_size=12), st.lists(st.lists(st.sampled_from("ab"), max_size=12), max_size=4))
def test_leaks_are_exactly_the_texts_that_share_a_run(
    tmp_path_factory: pytest.TempPathFactory, evaluation: list[str], texts: list[list[str]]
) -> None:
    runs = {tuple(evaluation[i : i + 4]) for i in range(len(evaluation) - 3)}
    find = decontaminator(tmp_path_factory.mktemp("e"), [" ".join(evaluation), "c c c c"], ngram_words=4)
    leaks = find([" ".join(text) for text in texts])
    for text, leak in zip(texts, leaks, strict=True):
        first = next((text[i : i + 4] for i in range(len(text) - 3) if tuple(text[i : i + 4]) in runs), None)
        assert (leak.text if leak else None) == (" ".join(first) if first else None)


def test_run_is_shown_as_written_also_where_lower_case_is_longer(tmp_path: Path) -> None:
    find = decontaminator(tmp_path, [TEXT], ngram_words=5)
    leak = find(["İİİ One two Three four five"])[0]
    assert leak is not None
    assert leak.text == "one two three four five"


def _against(*paths: Path | str) -> DataConfig:
    return parse_config({"data": {"decontaminate": {"against": list(map(str, paths)), "ngram_words": 5}}}).data


def _broken(folder: Path, kind: str) -> Path:
    path = folder / {"cut": "q.jsonl.gz", "dangling": "q.txt", "record": "q.jsonl", "missing": "q.txt"}[kind]
    if kind == "cut":
        path.write_bytes(gzip.compress(b'{"text": "one two three four five six"}\n' * 100)[:-20])
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere.txt")
    elif kind == "record":
        path.write_text('{"text": "one two three four five six"}\n{"question": "of another field"}\n')
    return path


@pytest.mark.parametrize(
    ("kind", "where", "problem"),
    [
        ("cut", ": q.jsonl.gz", "inside"),
        ("dangling", ": q.txt", "No such file"),
        ("record", ": q.jsonl:2", "question"),
        ("missing", "", "the input exists"),
    ],
)
def test_evaluation_text_that_cannot_be_read_is_named_as_such(
    tmp_path: Path, kind: str, where: str, problem: str
) -> None:
    path, work = _broken(tmp_path, kind), work_folder(tmp_path / ".out")
    work.open()
    with pytest.raises(DataError, match=problem) as caught:
        evaluation = list_evaluation(_against(path.parent if kind == "dangling" else path))
        assert evaluation is not None
        open_decontaminator(evaluation, work)
    assert caught.value.where == f"data.decontaminate.against{where}"
    assert "data.input" not in str(caught.value)


def test_evaluation_text_that_changes_after_it_was_hashed_stops_the_build(tmp_path: Path) -> None:
    path, work = tmp_path / "q.txt", work_folder(tmp_path / ".out")
    path.write_text(TEXT)
    evaluation = list_evaluation(_against(path))
    assert evaluation is not None
    path.write_text(f"{TEXT} eight")
    work.open()
    with pytest.raises(DataError, match="does not change"):
        open_decontaminator(evaluation, work)


def test_no_evaluation_text_is_listed_where_none_is_named() -> None:
    assert list_evaluation(parse_config({}).data) is None

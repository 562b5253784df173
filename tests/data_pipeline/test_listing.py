from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.listing import list_input
from moe_dist.errors import DataError

SUFFIXES = (".txt", ".py")


def _ids(source: Path | str) -> list[str]:
    return [file.id for file in list_input(str(source), SUFFIXES).files]


def test_listing_folder_is_recursive_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.TXT", "a.txt", "a/y.jsonl.zst", ".hidden.txt", ".git/x.txt", "__pycache__/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert _ids(tmp_path) == ["a.txt", "a/y.jsonl.zst", "a/z.TXT", "b.txt"]


def test_listing_other_endings_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", "c.PNG", "Makefile"):
        (tmp_path / name).write_text("x")
    assert list_input(str(tmp_path), SUFFIXES).ignored_endings == {"(none)": 1, ".png": 2}


def test_listing_link_to_a_folder_above_is_not_followed_and_one_aside_is(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "aside").mkdir()
    (tmp_path / "in/sub/a.txt").write_text("x")
    (tmp_path / "aside/b.txt").write_text("x")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/link").symlink_to(tmp_path / "aside")
    assert _ids(tmp_path / "in") == ["link/b.txt", "sub/a.txt"]


def test_listing_python_library_has_modules_and_no_tests_or_packages() -> None:
    ids = _ids("python-library")
    assert "json/decoder.py" in ids
    assert len(ids) > 300
    assert not [id_ for id_ in ids if "site-packages" in id_ or "/test/" in id_ or id_.startswith("test/")]


def test_listing_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError) as caught:
        list_input(str(tmp_path / "corpsu"), SUFFIXES)
    assert caught.value.fix == f"did you mean {tmp_path / 'corpus'}?"


def test_listing_missing_library_name_is_corrected() -> None:
    with pytest.raises(DataError, match="did you mean python-library"):
        list_input("python-libary", SUFFIXES)


def test_listing_folder_without_readable_file_says_what_was_seen_and_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(DataError) as caught:
        list_input(str(tmp_path), SUFFIXES)
    assert ".png (1)" in caught.value.value
    assert ".parquet" in caught.value.rule
    assert ".py" in caught.value.rule


def test_listing_single_file_needs_a_known_ending_or_none(tmp_path: Path) -> None:
    for name in ("a.dat", "enwik"):
        (tmp_path / name).write_text("x")
    assert _ids(tmp_path / "enwik") == ["enwik"]
    with pytest.raises(DataError) as caught:
        list_input(str(tmp_path / "a.dat"), SUFFIXES)
    assert ".dat" in caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("sub/*", ["b.txt", "c.py"]),
        ("s?b/**", ["sub/b.txt", "sub/c.py", "sub/deep/c.txt"]),
        ("**/deep/*.txt", ["sub/deep/c.txt"]),
        ("*/[!bd].*", ["sub/c.py"]),
        ("[[]x]/*.py", ["[x]/d.py"]),
        ("[x]", ["d.py"]),
    ],
)
def test_listing_pattern_chooses_files_below_its_first_wildcard(tmp_path: Path, pattern: str, ids: list[str]) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/c.py", "sub/deep/c.txt", "sub/.hidden/d.txt", "[x]/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert _ids(f"{tmp_path}/{pattern}") == ids
    if not pattern.startswith("[") and "/**" not in pattern:
        assert _ids(f"file://{tmp_path}/{pattern}") == ids


def test_listing_pattern_that_matches_nothing_says_how_patterns_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no files that match \*\.md") as caught:
        list_input(f"{tmp_path}/*.md", SUFFIXES)
    assert "**" in caught.value.fix
    (tmp_path / "b.dat").write_text("x")
    with pytest.raises(DataError, match=r"\.dat \(1\)"):
        list_input(f"{tmp_path}/*.dat", SUFFIXES)

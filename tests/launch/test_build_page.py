"""The page of `moe-dist data report`: whole, alone, and harmless whatever a manifest holds."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.build import build
from data_pipeline.inspection import describe_build
from data_pipeline.manifest import read_manifest, write_manifest
from launch.build_page import page, write_page
from launch.build_parts import parts_of
from launch.build_tables import print_parts
from launch.cleaning_table import print_cleaning
from moe_dist.config import parse_config
from moe_dist.errors import DataError
from tests.launch.test_cli import moe_dist

EVIL = "<script>alert(1)</script>\" onload='x' & [bold red]]]> \x1b[2J \u202e \udcff"
VOID = {"meta"}


class Outline(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with near-duplicates, a leak and a skipped record, of names and text that are mark-up."""
    folder = tmp_path_factory.mktemp("data")
    words = [" ".join(f"<i>{i}</i> a{i} b{i * k}" for k in range(30)) for i in range(40)]
    texts = [f"<b>page</b> {i} & the rest of the text, {text}" for i, text in enumerate(words)]
    texts += [f"{text.upper()} one more" for text in texts[:5]]
    texts.append("what is the answer to a question that nobody ever put to <b>you</b> before")
    source = folder / "<img src=x>"
    source.mkdir()
    (source / "a&b.jsonl").write_text("\n".join([*(json.dumps({"text": text}) for text in texts), "{bad"]))
    (folder / "test.txt").write_text("WHAT is the answer to a question that nobody ever put to b you b before")
    data: dict[str, Any] = {"input": str(folder), "dir": str(tmp_path_factory.mktemp("out")), "unreadable": "skip"}
    data |= {"dedup": {"near": {"similarity": 0.8}}, "sequence_length_tokens": 32, "suffixes": [".rst"]}
    data |= {"decontaminate": {"against": [str(folder / "test.txt")]}}
    config = parse_config({"data": {**data, "suffixes": [".txt"]}, "model": {"vocab_size": 300}})
    return build(config, use_ray=False)


def _changed(built: Path, folder: Path, **cleaning: Any) -> Path:
    copy = Path(shutil.copytree(built, folder / built.name))
    manifest = read_manifest(copy)
    write_manifest(copy, dataclasses.replace(manifest, cleaning={**(manifest.cleaning or {}), **cleaning}))
    return copy


def test_report_shows_figures_examples_and_reasons_on_the_page_and_in_the_terminal(built: Path, tmp_path: Path) -> None:
    done = moe_dist("data", "report", str(built), "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outline = Outline((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert outline.open == []
    figures = describe_build(built, 0)
    account = figures["cleaning"]
    first = account["near_duplicates"][0]
    expected = {built.name, "near_duplicate", "decontaminated", "<img src=x>", "a&b.jsonl:1", "test.txt"}
    expected |= {"nobody ever put to <b", "Expecting property name", first["gone"], first["kept"]}
    expected |= {first["gone_text"][:20], first["kept_text"][:20]}
    expected.add(f"{sum(account['kept'].values())} of {sum(account['documents'].values())} documents")
    expected.add(f"{account['content']['<img src=x>']['other']['tokens']:,}")
    for shown in (" ".join("".join(outline.shown).split()), " ".join(done.stdout.replace("│", " ").split())):
        assert {words for words in expected if words not in shown} == set()
        assert f"{figures['splits']['train']['tokens']:,}" in shown
    table = [line for line in done.stdout.splitlines() if line.startswith("┃") or line.startswith("│")]
    assert max(map(len, table)) <= 100


def test_report_of_a_config_is_that_of_its_build_and_says_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text {i} " * 40)
    path = tmp_path / "c.yaml"
    path.write_text("data: {input: in, dir: out, sequence_length_tokens: 32}\nmodel: {vocab_size: 300}\n")
    missing = moe_dist("data", "report", str(path), "data.count_languages=true", cwd=tmp_path)
    assert missing.returncode == 2
    assert "no such build" in missing.stderr
    assert "moe-dist data build" in missing.stderr
    for overrides in ((), ("data.count_languages=true",)):
        made = moe_dist("data", "build", str(path), *overrides, "--no-ray", "--json", cwd=tmp_path)
        done = moe_dist("data", "report", str(path), *overrides, "--json", cwd=tmp_path)
        found = json.loads(done.stdout)
        assert found["build_dir"] == json.loads(made.stdout)["build_dir"]
        assert found["page"] is None
        assert bool(found["cleaning"]) == bool(overrides)
    plain = moe_dist("data", "report", str(path), cwd=tmp_path)
    assert "data.count_languages=true" in plain.stdout
    folder = json.loads(made.stdout)["build_dir"]
    refused = moe_dist("data", "report", folder, "data.input=x", cwd=tmp_path)
    assert refused.returncode == 2
    assert "a build's folder has none" in refused.stderr
    parent = moe_dist("data", "report", "out", cwd=tmp_path)
    assert parent.returncode == 2
    assert folder in parent.stderr


def test_parts_add_up_over_sources_and_languages_and_put_the_most_first(built: Path) -> None:
    def figures(number: int) -> dict[str, int]:
        return {"documents": number, "text_bytes": 10 * number, "tokens": 3 * number}

    found = describe_build(built, 0)
    found["cleaning"] = {
        "documents": {"web": 10, "books": 60, "none": 1},
        "kept": {"web": 10, "books": 30, "none": 0},
        "changed": {"NFC": {"web": 2, "books": 3}},
        "removed": {"near_duplicate": {"books": 10}, "exact_duplicate": {"books": 20}, "language": {"none": 1}},
        "content": {"web": {"en": figures(4), "zh": figures(6)}, "books": {"en": figures(30)}},
    }
    parts = {part.title: part for part in parts_of(found)}
    assert parts["Sources"].note.startswith("40 of 71 documents")
    assert parts["Sources"].rows == [
        ("books", 60, 30, "50.0%", 90, "75.0%"),
        ("web", 10, 10, "100.0%", 30, "25.0%"),
        ("none", 1, 0, "0.0%", 0, "0.0%"),
    ]
    assert parts["Languages"].rows == [("en", 34, 340, 102, "85.0%"), ("zh", 6, 60, 18, "15.0%")]
    assert [row[:3] for row in parts["Sources and languages"].rows] == [
        ("books", "en", 30),
        ("web", "zh", 6),
        ("web", "en", 4),
    ]
    assert parts["What each step changed and left out"].rows == [
        ("NFC", 5, 0, "0.0%"),
        ("language", 0, 1, "1.4%"),
        ("exact_duplicate", 0, 20, "28.2%"),
        ("near_duplicate", 0, 10, "14.1%"),
    ]
    assert parts["What each step left out of each source"].rows[1] == ("exact_duplicate", "books", 20, "33.3%")
    assert not {"Near-duplicates, the least similar first", "Evaluation text"} & parts.keys()
    for part in parts.values():
        assert {len(row) for row in part.rows} <= {len(part.names)}


def test_page_needs_no_network_and_runs_nothing(built: Path) -> None:
    outline = Outline(page(describe_build(built, 2)))
    tags = {tag for tag, _ in outline.tags}
    assert tags <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td"}
    attributes = {name for _, found in outline.tags for name in found}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class"}
    policy = next(found["content"] for _, found in outline.tags if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_page_and_table_escape_whatever_a_manifest_holds(built: Path, tmp_path: Path) -> None:
    figures = {"documents": 1, "text_bytes": 2, "tokens": 3}
    pair = {"gone": EVIL, "kept": EVIL, "similarity": 0.9, "gone_text": EVIL * 1000, "kept_text": EVIL}
    evil: dict[str, Any] = {"documents": {EVIL: 2}, "kept": {EVIL: 1}, "changed": {EVIL: {EVIL: 1}}}
    evil |= {"removed": {EVIL: {EVIL: 1}}, "content": {EVIL: {EVIL: figures}}, "near_duplicates": [pair] * 500}
    evil |= {"decontaminated": [{"id": EVIL, "against": EVIL, "text": EVIL}]}
    found = describe_build(_changed(built, tmp_path, **evil), 0)
    found["created_from"][EVIL] = EVIL
    found["skipped"] = [{"where": EVIL, "reason": EVIL}] * 1000
    text = page(found)
    assert "<script" not in text
    assert not {"\x1b", "\u202e", "\udcff"} & set(text)
    assert len(text) < 1_000_000
    outline = Outline(text)
    assert {tag for tag, _ in outline.tags} & {"script", "b", "img"} == set()
    assert "<script>alert(1)</script>\" onload='x' & [bold red]]]>" in "".join(outline.shown)
    for show in (lambda to: print_cleaning(found["cleaning"], to), lambda to: print_parts(parts_of(found), to)):
        console = Console(width=200, record=True, file=io.StringIO())
        show(console)
        printed = console.export_text()
        assert "[bold red]" in printed
        assert not {"\x1b", "\u202e", "\udcff"} & set(printed)


@pytest.mark.parametrize(
    ("cleaning", "problem"),
    [
        ({"documents": []}, "cleaning.documents"),
        ({"kept": {}}, "other sources"),
        ({"removed": {"x": {"y": "1"}}}, "cleaning.removed.x.y"),
        ({"removed": {"x": {"y": -1}}}, "cleaning.removed.x.y"),
        ({"content": {"x": {"en": {"documents": 1}}}}, "cleaning.content.x.en"),
        ({"near_duplicates": [{"gone": 1}]}, "cleaning.near_duplicates.0.gone"),
        ({"near_duplicates": {}}, "cleaning.near_duplicates"),
        ({"decontaminated": ["x"]}, "cleaning.decontaminated.0"),
        ({"evaluation": {"files": True}}, "cleaning.evaluation.files"),
        (
            {"evaluation": {"files": 1, "documents": 1, "too_short": 0, "runs": 1, "found_in": {"a": "1"}}},
            "cleaning.evaluation.found_in.a",
        ),
    ],
)
def test_account_of_other_types_is_refused(built: Path, tmp_path: Path, cleaning: dict[str, Any], problem: str) -> None:
    folder = _changed(built, tmp_path, **cleaning)
    with pytest.raises(DataError, match=problem):
        describe_build(folder, 0)


def test_report_replaces_an_earlier_report_and_no_other_file(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    found = describe_build(built, 1)
    assert write_page(found, path) == write_page(found, path) == path.stat().st_size
    path.write_text("something of mine")
    with pytest.raises(DataError, match="another file"):
        write_page(found, path)
    assert path.read_text() == "something of mine"
    with pytest.raises(DataError, match="No such file"):
        write_page(found, tmp_path / "nowhere" / "r.html")


def test_inspect_prints_content_and_examples_within_100_columns(built: Path) -> None:
    done = moe_dist("data", "inspect", str(built), "--samples", "0")
    assert done.returncode == 0, done.stderr
    for words in ("<img src=x>", "near_duplicate", "near-duplicates, least similar first", "test.txt", "tokens"):
        assert words in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("┃") or line.startswith("│")]
    assert max(map(len, table)) <= 100

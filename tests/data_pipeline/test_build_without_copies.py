"""Whole builds that leave out near-duplicates and evaluation text, and the account they give of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build
from data_pipeline.manifest import SPLITS, read_manifest
from moe_dist.errors import DataError
from tests.data_pipeline.test_build import _documents, _hashes, configure, ray_cluster  # noqa: F401 - a fixture

CHINESE = "春天的時候河水從山上流下來淹沒了低處的田地農民們早就習慣了這樣的事情也不覺得奇怪"
QUESTION = "Which of the seven bridges did Leonhard Euler say nobody could cross twice in one walk?"


def _words(source: random.Random, number: int) -> list[str]:
    return [f"w{source.randrange(10**6)}" for _ in range(number)]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents in two files; the second has every other one again, with one word changed, and five exactly."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "in").mkdir()
    source = random.Random(0)
    first = [
        f"The cat and the dog of {i} are at it: it has {i} of them. " + " ".join(_words(source, 150)) for i in range(30)
    ]
    again = [text.replace("them. ", "them: NEW! ").upper() for text in first[::2]]
    leaks = [f"{text} {QUESTION.lower()}" for text in (" ".join(_words(source, 80)) for _ in range(3))]
    chinese = [CHINESE, CHINESE[::-1], CHINESE[:30] + "，" + CHINESE[30:]]
    (folder / "in" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in first))
    rows = [*again, *first[1:10:2], *leaks, leaks[0].upper(), leaks[1], *chinese]
    (folder / "in" / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    for i in range(6):
        (folder / "in" / f"c{i}.txt").write_text("A page. " + " ".join(_words(source, 60)))
    (folder / "in" / "c9.txt").write_text((folder / "in" / "c0.txt").read_text() + "\n\n -- \n")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "q.jsonl").write_text(
        json.dumps({"question": f"Q: {QUESTION} A: nobody"}) + '\n{"question": "short"}'
    )
    return folder


def _settings(folder: Path, **changed: Any) -> dict[str, Any]:
    against = {"against": [str(folder / "evaluation")], "text_field": "question"}
    return {"dedup": {"exact": True, "near": {"similarity": 0.8}}, "decontaminate": against, **changed}


def test_build_leaves_out_each_kind_and_gives_an_account(copied: Path, tmp_path: Path) -> None:
    folder = build(configure(copied / "in", tmp_path, **_settings(copied)), use_ray=False)
    manifest = read_manifest(folder)
    account = manifest.cleaning
    assert account is not None
    assert account["removed"] == {
        "decontaminated": {"b.jsonl": 5},
        "exact_duplicate": {"b.jsonl": 5},
        "near_duplicate": {"b.jsonl": 15 + 1, "c9.txt": 1},
    }
    texts = _documents(folder, "train") + _documents(folder, "heldout")
    assert len(texts) == 30 + 2 + 6
    assert not any(QUESTION.lower() in text.lower() for text in texts)
    assert CHINESE in texts
    assert account["evaluation"] == {
        "files": 1,
        "documents": 2,
        "too_short": 1,
        "runs": 19 - 13 + 1,
        "found_in": {"q.jsonl": 5},
    }
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_account_of_content_is_that_of_the_shards(copied: Path, tmp_path: Path) -> None:
    manifest = read_manifest(build(configure(copied / "in", tmp_path, **_settings(copied)), use_ray=False))
    assert manifest.cleaning is not None
    found: Counter[str] = Counter()
    for languages in manifest.cleaning["content"].values():
        for figures in languages.values():
            found.update(figures)
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    for measure in ("documents", "text_bytes", "tokens"):
        assert found[measure] == sum(getattr(shard, measure) for shard in shards)
    assert manifest.cleaning["content"]["b.jsonl"]["zh"]["documents"] == 2
    kept = {
        source: sum(row["documents"] for row in rows.values()) for source, rows in manifest.cleaning["content"].items()
    }
    assert kept == {source: number for source, number in manifest.cleaning["kept"].items() if number}


def test_examples_name_both_documents_and_show_where_they_differ(copied: Path, tmp_path: Path) -> None:
    account = read_manifest(build(configure(copied / "in", tmp_path, **_settings(copied)), use_ray=False)).cleaning
    assert account is not None
    pairs = {row["gone"]: row for row in account["near_duplicates"]}
    assert len(pairs) == 17
    assert [row["similarity"] for row in account["near_duplicates"]] == sorted(
        row["similarity"] for row in account["near_duplicates"]
    )
    assert pairs["b.jsonl:1"]["kept"] == "a.jsonl:1"
    assert pairs["b.jsonl:28"]["kept"] == "b.jsonl:26"
    assert "，" in pairs["b.jsonl:28"]["gone_text"]
    assert pairs["c9.txt"]["kept"] == "c0.txt"
    assert pairs["c9.txt"]["similarity"] == 1.0
    leaks = account["decontaminated"]
    assert sorted(row["id"] for row in leaks) == [f"b.jsonl:{number}" for number in range(21, 26)]
    assert {row["against"] for row in leaks} == {"q.jsonl"}
    assert {row["text"].lower() for row in leaks} == {" ".join(QUESTION.lower().split()[:13])}


def test_build_is_the_same_on_ray_and_for_any_cut_of_the_work(
    copied: Path,
    tmp_path: Path,
    ray_cluster: None,  # noqa: F811 - the fixture
) -> None:
    settings = _settings(copied)
    plain = build(configure(copied / "in", tmp_path / "plain", **settings), use_ray=False)
    assert _hashes(build(configure(copied / "in", tmp_path / "ray", **settings), use_ray=True)) == _hashes(plain)
    other = build(configure(copied / "in", tmp_path / "cut", shard_bytes=10_000_000, **settings), use_ray=False)
    assert read_manifest(other).cleaning == read_manifest(plain).cleaning
    for split in SPLITS:
        assert _documents(other, split) == _documents(plain, split)


def test_name_of_a_build_follows_names_and_contents_of_the_evaluation_text_and_not_its_place(
    copied: Path, tmp_path: Path
) -> None:
    def name(**changed: Any) -> str:
        return build(configure(copied / "in", tmp_path / "out", **_settings(copied, **changed)), use_ray=False).name

    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "q.jsonl"
    moved.write_bytes((copied / "evaluation" / "q.jsonl").read_bytes())
    against = {"against": [str(moved)], "text_field": "question"}
    assert name(decontaminate=against) == name()
    names = {name(), name(decontaminate={**against, "ngram_words": 12})}
    names |= {
        name(dedup={"exact": True, "near": near}) for near in ({"similarity": 0.85}, {"similarity": 0.8, "rows": 7})
    }
    names.add(name(dedup={"exact": True}))
    moved.write_bytes(moved.read_bytes() + b'\n{"question": "another"}')
    names.add(name(decontaminate=against))
    named = moved.rename(moved.with_name("p.jsonl"))
    names.add(name(decontaminate={**against, "against": [str(named)]}))
    assert len(names) == 7


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ('{"question": "too short"}', "1 documents, all shorter"),
        ('{"text": "another field"}', "fields: text"),
        ("{bad", "Expecting property name"),
        (None, "the input exists"),
    ],
)
def test_evaluation_text_that_is_of_no_use_stops_the_build(
    copied: Path, tmp_path: Path, contents: str | None, problem: str
) -> None:
    path = tmp_path / "q.jsonl"
    if contents is not None:
        path.write_text(contents)
    against = {"against": [str(path)], "text_field": "question"}
    with pytest.raises(DataError, match=problem) as caught:
        build(configure(copied / "in", tmp_path / "out", unreadable="skip", decontaminate=against), use_ray=False)
    assert "data.decontaminate.against" in str(caught.value)


def test_counts_by_language_can_be_asked_for_and_change_no_token(texts: Path, built: Path, tmp_path: Path) -> None:
    counted = build(configure(texts, tmp_path, holdout_fraction=0.1, count_languages=True), use_ray=False)
    manifest, plain = read_manifest(counted), read_manifest(built)
    assert manifest.splits == plain.splits
    assert counted.name != built.name
    assert manifest.cleaning is not None
    assert sum(manifest.cleaning["kept"].values()) == 60
    assert sorted(manifest.cleaning["content"]) == sorted(path.name for path in texts.iterdir())

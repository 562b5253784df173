"""Input on an object store: a real server over HTTP, the same documents, and its faults."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline import storage
from data_pipeline.build import build
from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile, list_input
from data_pipeline.manifest import read_manifest
from data_pipeline.survey import Surveyor, WorkItem
from moe_dist.errors import DataError, StorageError
from tests.data_pipeline.test_build import configure
from tests.data_pipeline.test_tables import _save
from tests.support.object_store import BUCKET, Store, breaking_store, point_to, running_store

SUFFIXES = (".txt", ".md")


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with running_store() as store:
        store.files.create_dir(BUCKET)
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    point_to(server.endpoint, monkeypatch)
    return server


def _all_formats(folder: Path) -> Path:
    """The same kinds of documents in every format that is read, in folders, with names that need care in a URL."""
    source = random.Random(0)
    words = ["alpha", "größe", "猫", "🙂", "def f(x):\n", "the", "of", "12345"]
    texts = [" ".join(source.choices(words, k=200)) for _ in range(40)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    (folder / "a b%20+ü?").mkdir(parents=True)
    (folder / "a b%20+ü?" / "one.txt").write_text(texts[0])
    (folder / "large.md").write_text("a line of a large file, which is cut into pieces\n" * 7000)
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "a.jsonl").write_bytes(b"{bad\n" + lines)
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    pq.write_table(pa.table({"text": texts}), folder / "d.parquet", row_group_size=15)
    _save(folder / "saved", pa.table({"text": texts}))
    return folder


def _shards(folder: Path) -> dict[str, str]:
    names = [*folder.glob("*.arrow"), folder / "tokenizer.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_evaluation_text_on_a_store_keeps_out_what_the_local_copy_does(store: Store, tmp_path: Path) -> None:
    local, source = tmp_path / "evaluation", tmp_path / "in"
    for folder in (local, source):
        folder.mkdir()
    leak = "a question that nobody ever put to anyone in quite these words before"
    (local / "q.jsonl.gz").write_bytes(gzip.compress(json.dumps({"question": leak}).encode(), mtime=0))
    for i in range(30):
        (source / f"{i}.txt").write_text(f"text {i} of many " * 40 + (leak if i % 10 == 0 else ""))
    store.put_folder("evaluation", local)
    builds = []
    for number, against in enumerate((str(local), f"s3://{BUCKET}/evaluation")):
        settings = {"against": [against], "text_field": "question"}
        builds.append(build(configure(source, tmp_path / str(number), decontaminate=settings), use_ray=False))
    cleaning = read_manifest(builds[0]).cleaning
    assert cleaning is not None
    assert cleaning["evaluation"]["found_in"] == {"q.jsonl.gz": 3}
    assert builds[0].name == builds[1].name
    assert [path.read_bytes() for path in sorted(builds[0].iterdir())] == [
        path.read_bytes() for path in sorted(builds[1].iterdir())
    ]


def test_evaluation_text_that_a_store_does_not_have_is_named_as_such(store: Store, tmp_path: Path) -> None:
    against = {"against": [f"s3://{BUCKET}/no/such/folder.jsonl"]}
    with pytest.raises(StorageError, match=r"data\.decontaminate\.against(.|\n)*the input exists") as caught:
        build(configure("python-library", tmp_path / "out", decontaminate=against), use_ray=False)
    assert "data.input" not in caught.value.where + caught.value.fix


def _errors(file: InputFile) -> StorageError:
    with pytest.raises(StorageError) as caught:
        list(read_documents(file, "text"))
    return caught.value


def test_store_of_all_formats_builds_the_shards_of_the_local_copy(store: Store, tmp_path: Path) -> None:
    local = _all_formats(tmp_path / "in")
    store.put_folder("all", local)
    on_store = list_input(f"s3://{BUCKET}/all", SUFFIXES)
    here = list_input(str(local), SUFFIXES)
    assert [(f.id, f.kind, f.size_bytes) for f in on_store.files] == [(f.id, f.kind, f.size_bytes) for f in here.files]
    assert on_store.ignored_endings == here.ignored_endings == {".png": 1}
    assert {file.kind for file in here.files} == {"plain", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".arrow"}
    first = build(configure(local, tmp_path / "out", unreadable="skip"), use_ray=False)
    second = build(configure(f"s3://{BUCKET}/all/", tmp_path / "out", unreadable="skip"), use_ray=False)
    assert _shards(second) == _shards(first)
    assert read_manifest(second).skipped == read_manifest(first).skipped
    assert build(configure(f"s3://{BUCKET}/all", tmp_path / "out", unreadable="skip"), use_ray=False) == second


def test_store_pattern_and_single_object_are_listed_as_local_ones(store: Store, tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/c.md", "sub/d.bin"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    store.put_folder("globs", tmp_path / "in")
    for pattern in ("*.txt", "**/*.txt", "sub/*", "su?/**/*.txt", "**", "*/[cd].*", "sub/**/c.*"):
        here, there = (list_input(f"{root}/{pattern}", SUFFIXES) for root in (tmp_path / "in", f"s3://{BUCKET}/globs"))
        assert [file.id for file in there.files] == [file.id for file in here.files]
        assert there.ignored_endings == here.ignored_endings
    (alone,) = list_input(f"s3://{BUCKET}/globs/sub/c.md", SUFFIXES).files
    assert (alone.id, alone.kind, alone.path) == ("c.md", "plain", f"{BUCKET}/globs/sub/c.md")
    assert pickle.loads(pickle.dumps(alone)) == alone  # noqa: S301 - our own


def test_store_object_with_other_contents_of_the_same_size_has_another_identity(store: Store) -> None:
    identities = []
    for contents in (b"one text", b"two text", b"one text"):
        store.put("same/a.txt", contents)
        identities.append(list_input(f"s3://{BUCKET}/same", SUFFIXES).files[0].identity)
    assert identities[0] == identities[2] != identities[1]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_store_object_that_changed_since_it_was_listed_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    tables = []
    for text in ("one", "two"):
        pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
        tables.append((tmp_path / "a.parquet").read_bytes())
    before, after = {
        "a.txt": (b"one", b"two"),
        "a.jsonl": (b'{"text": "one"}', b'{"text": "two"}'),
        "a.parquet": (tables[0], tables[1]),
    }[name]
    store.put(f"changed/{name}", before)
    (file,) = list_input(f"s3://{BUCKET}/changed/{name}", SUFFIXES).files
    assert len(list(read_documents(file, "text"))) == 1
    store.put(f"changed/{name}", after)
    assert "does not change" in _errors(file).rule
    store.put(f"changed/{name}", after + b" ")
    assert "bytes, not" in _errors(file).value
    store.files.delete_file(f"{BUCKET}/changed/{name}")
    assert "no such object" in _errors(file).value


def test_store_object_that_changes_while_it_is_read_is_refused_at_its_end(store: Store) -> None:
    store.put("moving.jsonl", b'{"text": "first"}\n' * 10)
    (file,) = list_input(f"s3://{BUCKET}/moving.jsonl", SUFFIXES).files
    reading = read_documents(file, "text")
    assert isinstance(next(reading), Document)
    store.put("moving.jsonl", b'{"text": "other"}\n' * 10)
    with pytest.raises(StorageError, match="does not change"):
        list(reading)


@pytest.mark.parametrize(
    ("url", "value", "fix"),
    [
        ("s3://nobucket/a", "NO_SUCH_BUCKET", "name of the bucket"),
        (f"s3://{BUCKET}/nearby/corpsu", "corpsu", "corpus"),
        (f"s3://{BUCKET}/nearby/corpsu/*.txt", "corpsu", "corpus"),
        (f"s3://key:secret@{BUCKET}/a", "s3://...@texts", "AWS_ACCESS_KEY_ID"),
        ("s3:///a", "s3:///a", "BUCKET"),
        ("nosuchscheme://a/b", "nosuchscheme", "another input"),
    ],
)
def test_store_input_that_is_wrong_is_a_named_error(store: Store, url: str, value: str, fix: str) -> None:
    store.put("nearby/corpus/a.txt", b"text")
    with pytest.raises(StorageError) as caught:
        list_input(url, SUFFIXES)
    assert value in str(caught.value.value)
    assert fix in caught.value.fix
    assert "secret@" not in str(caught.value)


def test_store_without_a_file_that_is_read_says_what_it_holds(store: Store) -> None:
    store.put("pictures/a.png", b"x")
    with pytest.raises(DataError, match=r"\.png \(1\)"):
        list_input(f"s3://{BUCKET}/pictures", SUFFIXES)


def test_store_saved_dataset_without_a_file_it_names_is_a_named_error(store: Store, tmp_path: Path) -> None:
    store.put_folder("lost", _save(tmp_path / "saved", pa.table({"text": ["a", "b"]})))
    store.files.delete_file(f"{BUCKET}/lost/data-00001-of-00002.arrow")
    with pytest.raises(DataError, match="no such object") as caught:
        list_input(f"s3://{BUCKET}/lost", SUFFIXES)
    assert caught.value.where == "data-00001-of-00002.arrow"
    (first,) = list_input(f"s3://{BUCKET}/lost/*-00000-*", SUFFIXES).files
    assert (first.id, first.kind) == ("data-00000-of-00002.arrow", ".arrow")


def test_store_that_refuses_access_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_store(INITIAL_NO_AUTH_ACTION_COUNT="0") as closed:
        point_to(closed.endpoint, monkeypatch)
        with pytest.raises(StorageError) as caught:
            list_input(f"s3://{BUCKET}/a", SUFFIXES)
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.fix


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_store_killed_in_mid_read_is_an_error_that_skip_does_not_pass_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    texts = [os.urandom(3000).hex() for _ in range(2000)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=300, compression="none")
    contents = lines if ending == ".jsonl" else (tmp_path / "a.parquet").read_bytes()
    assert len(contents) > storage._BUFFER_BYTES + 2**20
    with running_store() as doomed:
        point_to(doomed.endpoint, monkeypatch)
        doomed.files.create_dir(BUCKET)
        doomed.put(f"a{ending}", contents)
        (file,) = list_input(f"s3://{BUCKET}/a{ending}", SUFFIXES).files
        reading = read_documents(file, "text")
        assert isinstance(next(reading), Document)
        doomed.kill()
        with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):
            list(reading)
        if ending == ".jsonl":  # each try takes seconds
            with pytest.raises(StorageError):
                Surveyor("text", skip_unreadable=True, sample_bytes=0, total_bytes=1)(WorkItem(0, (file,)))


@pytest.mark.parametrize("breaks", [1, 100])
def test_store_that_breaks_off_an_answer_is_asked_again_or_an_error(
    monkeypatch: pytest.MonkeyPatch, breaks: int
) -> None:
    lines = [json.dumps({"text": f"record {i} {os.urandom(50).hex()}"}) for i in range(5000)]
    data = "\n".join(lines).encode()
    with breaking_store({"a.jsonl": data}, breaks) as endpoint:
        point_to(endpoint, monkeypatch)
        version = '"' + hashlib.md5(data, usedforsecurity=False).hexdigest() + '"'
        file = InputFile("a.jsonl", f"{BUCKET}/a.jsonl", ".jsonl", len(data), 0, f"s3://{BUCKET}", version)
        if breaks == 1:
            found = list(read_documents(file, "text"))
            assert [document.text for document in found if isinstance(document, Document)] == [
                json.loads(line)["text"] for line in lines
            ]
        else:
            assert _errors(file).where.endswith("a.jsonl")

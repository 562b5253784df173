"""Damaged, hostile and oversized input, each injected for real: what is listed, what is refused, what is never read.

The rows of one table go through one build together, so that the job is seen to complete, and each alone, so that it is
seen to stop. What a shard or a stream does byte for byte stands below, and in tests/data_pipeline/test_streams.py,
test_tables.py and test_verification.py.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.build import build, open_tokenizer
from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile, list_input
from data_pipeline.manifest import SPLITS, Manifest, read_manifest, write_manifest
from data_pipeline.shards import ShardWriter, TokenSplit
from data_pipeline.tokenizer import load_tokenizer
from moe_dist.errors import DataError
from tests.data_pipeline.test_build import configure

GOOD = [f"a good record, number {i}, with some words in it" for i in range(12)]
LINES = "\n".join(json.dumps({"text": text}) for text in GOOD).encode() + b"\n"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def _zst(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


def _parquet(columns: dict[str, object], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def _repeated(text: str) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), [text])


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]


def _with(line: bytes) -> bytes:
    """A bad line between good ones: line 13."""
    return LINES + line + b"\n" + LINES


VARIED = [f"record {i} {random.Random(i).randbytes(8).hex()}" for i in range(240)]
VARIED_LINES = "\n".join(json.dumps({"text": text}) for text in VARIED).encode()
CONVERSATIONS = json.dumps({"conversations": TURNS}).encode()
PAIR = json.dumps({"chosen": TURNS, "rejected": TURNS}).encode()
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# name: (contents, where it is listed after the name, a part of the reason)
FAULTS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "long_line.jsonl": (lambda: _with(b'{"text": "' + b"x" * 100 * 2**20 + b'"}'), ":13", "at most 67,108,864 bytes"),
    "not_utf8.jsonl": (lambda: _with(b'{"text": "caf\xe9"}'), ":13", "byte 0xe9 at offset 13"),
    "nul.jsonl": (lambda: _with(b'{"text": "a\x00b"}'), ":13", "byte 0x00"),
    "nul_escaped.jsonl": (lambda: _with(b'{"text": "a\\u0000b"}'), ":13", "byte 0x00"),
    "surrogate.jsonl": (lambda: _with(b'{"text": "\\ud83d"}'), ":13", "half of a surrogate pair"),
    "deep.jsonl": (lambda: _with(DEEP), ":13", "one JSON object"),
    "deep_object.jsonl": (lambda: _with(b'{"a":' * 100_000), ":13", "one JSON object"),
    "array_line.jsonl": (lambda: _with(json.dumps([{"text": "x"}]).encode()), ":13", "an array"),
    "number.jsonl": (lambda: _with(b"7"), ":13", "one JSON object"),
    "huge_number.jsonl": (lambda: _with(b'{"text": ' + b"9" * 10_000 + b"}"), ":13", "one JSON object"),
    "no_text.jsonl": (lambda: _with(b'{"id": 1}'), ":13", "there is a field 'text'"),
    "null_text.jsonl": (lambda: _with(b'{"text": null}'), ":13", "a string"),
    "torn_line.jsonl": (lambda: LINES + b'{"text": "no en', ":13", "one JSON object"),
    "dialogue.jsonl": (lambda: _with(CONVERSATIONS), ":13", "turns of a dialogue"),
    "dialogue.jsonl.gz": (lambda: gzip.compress(_with(CONVERSATIONS)), ":13", "turns of a dialogue"),
    "dialogue.jsonl.zst": (lambda: _zst(_with(CONVERSATIONS)), ":13", "turns of a dialogue"),
    "dialogue.parquet": (lambda: _parquet({"conversations": [TURNS]}), "", "turns of a dialogue"),
    "pair.jsonl": (lambda: _with(PAIR), ":13", "turns of a dialogue"),
    "pair.jsonl.gz": (lambda: gzip.compress(_with(PAIR)), ":13", "turns of a dialogue"),
    "pair.jsonl.zst": (lambda: _zst(_with(PAIR)), ":13", "turns of a dialogue"),
    "pair.parquet": (lambda: _parquet({"chosen": [TURNS], "rejected": [TURNS]}), "", "turns of a dialogue"),
    "cut.jsonl.zst": (lambda: _zst(LINES)[:-5], "", "ends inside frame 0"),
    "cut.jsonl.gz": (lambda: gzip.compress(LINES)[:-5], "", "ends inside member 0"),
    "cut.parquet": (lambda: _parquet({"text": GOOD})[:-5], "", "read to its end"),
    "nothing.jsonl.zst": (lambda: b"", "", "ends inside frame 0"),
    "nothing.parquet": (lambda: b"", "", "read to its end"),
    "flipped.jsonl.zst": (lambda: _flipped(_zst(LINES), 60), "", "zstd frames"),
    "flipped.jsonl.gz": (lambda: _flipped(gzip.compress(LINES), 60), "", "gzip members"),
    "flipped.parquet": (lambda: _flipped(_parquet({"text": GOOD}, write_page_checksum=True), 60), "", "CRC"),
    "tail.jsonl.zst": (lambda: _zst(LINES) + b"tail", "", "frame 1"),
    "window.jsonl.zst": (lambda: b"\x28\xb5\x2f\xfd\x00\xa8" + b"\0" * 20, "", "zstd frames"),  # asks for 2 GiB
    "bomb.jsonl.zst": (lambda: _zst(b'{"text": "' + b" " * 2**26 + b'"}\n' + LINES), ":1", "bytes"),
    "bomb.parquet": (lambda: _parquet({"text": [" " * 2**25]}, compression="zstd"), "", "as no text does"),
    "bomb_dictionary.parquet": (
        lambda: _parquet({"text": _repeated(" " * 2**21)}, compression="zstd"),
        "",
        "as no text does",
    ),
    "no_column.parquet": (lambda: _parquet({"body": GOOD}), "", "there is a field 'text'"),
    "numbers.parquet": (lambda: _parquet({"text": [1, 2]}), "", "holds strings"),
    "null.parquet": (lambda: _parquet({"text": [*GOOD, None, *GOOD]}), ":12", "is null"),
    "footer.parquet": (lambda: b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1", "", "read to its end"),
    "no_table.parquet": (lambda: LINES, "", "read to its end"),
    "latin.txt": (lambda: b"caf\xe9", "", "byte 0xe9 at offset 3"),
    "utf16.txt": (lambda: "text".encode("utf-16-le"), "", "byte 0x00"),
}
EMPTY = ("empty.jsonl", "empty.txt")
ALONE = sorted(set(FAULTS) - {"long_line.jsonl"})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fault as a file, beside a good file and empty ones."""
    folder = tmp_path_factory.mktemp("faulty") / "in"
    folder.mkdir()
    for name, (contents, _, _) in FAULTS.items():
        (folder / name).write_bytes(contents())
    for name in EMPTY:
        (folder / name).touch()
    (folder / "good.jsonl").write_bytes(LINES)
    return folder


def test_job_with_every_fault_completes_and_lists_file_line_and_reason(faulty: Path, tmp_path: Path) -> None:
    folder = build(configure(faulty, tmp_path / "out", unreadable="skip"), use_ray=False)
    manifest = read_manifest(folder)
    skipped = dict(manifest.skipped)
    assert len(skipped) == len(manifest.skipped)
    assert skipped.keys() == {f"{name}{place}" for name, (_, place, _) in FAULTS.items()}
    for name, (_, place, words) in FAULTS.items():
        assert words in skipped[f"{name}{place}"], name
    assert manifest.empty_documents == 1
    records = sum(24 if place in (":13", ":12") else 12 for _, place, _ in FAULTS.values() if place)
    torn = 12  # nothing follows the line that is torn
    assert sum(shard.documents for split in SPLITS for shard in manifest.splits[split]) == records - torn + len(GOOD)
    tokenizer = open_tokenizer(folder)
    for split in SPLITS:
        stream = TokenSplit(folder, split)
        text = tokenizer.decode(stream.tokens(0, stream.num_tokens).tolist())
        assert set(text.split("<|endoftext|>")) <= {*GOOD, ""}


@pytest.mark.parametrize("name", ALONE)
def test_fault_stops_a_job_that_does_not_skip_and_names_the_place(faulty: Path, name: str) -> None:
    _, place, words = FAULTS[name]
    (file,) = list_input(str(faulty / name), (".txt",)).files
    with pytest.raises(DataError) as caught:
        for found in read_documents(file, "text"):
            if isinstance(found, DataError):
                raise found
    assert caught.value.where == name + place
    assert words in f"{caught.value.value} {caught.value.rule}"
    assert caught.value.fix


def _outcome(file: InputFile) -> list[str] | None:
    """The texts of a file; None where it or a record of it is refused."""
    try:
        found = list(read_documents(file, "text"))
    except DataError:
        return None
    return [d.text for d in found if isinstance(d, Document)] if all(isinstance(d, Document) for d in found) else None


@pytest.mark.parametrize(
    ("name", "contents", "covered"),
    [
        ("a.jsonl.zst", _zst(VARIED_LINES), True),
        ("b.jsonl.zst", _zst(VARIED_LINES, checksum=False), False),
        ("a.parquet", _parquet({"text": VARIED}, row_group_size=100, write_page_checksum=True), True),
        ("b.parquet", _parquet({"text": VARIED}, row_group_size=100), False),
    ],
)
def test_flipped_byte_is_refused_or_changes_letters_and_never_loses_a_record(
    tmp_path: Path, name: str, contents: bytes, covered: bool
) -> None:
    """Under checksums no text is ever another; without them nothing can tell letters, but records stay whole."""
    source, refused = random.Random(0), 0
    path = tmp_path / name
    file = InputFile(name, str(path), name[1:], len(contents), 0)
    places = set(source.sample(range(len(contents)), 200))
    if name == "b.parquet":  # no checksum covers a footer
        footer_bytes = struct.unpack("<I", contents[-8:-4])[0]
        places |= set(range(len(contents) - footer_bytes - 8, len(contents)))
    for place in sorted(places):
        path.write_bytes(_flipped(contents, place))
        found = _outcome(file)
        refused += found is None
        if found is not None and covered:
            assert found == VARIED, f"byte {place}"
        elif found is not None and name.endswith("parquet"):
            assert len(found) == len(VARIED), f"byte {place}"
    assert refused > 50


_MEASURE = """
import sys
from data_pipeline.documents import read_documents
from data_pipeline.listing import list_input
def peak():  # of this program; that of getrusage begins with what the parent had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
files = [list_input(path, (".txt",)).files[0] for path in sys.argv[1:]]
list(read_documents(files[0], "text"))
before = peak()
for file in files[1:]:
    try:
        print(file.id, sum(1 for _ in read_documents(file, "text")))
    except Exception as error:
        print(file.id, error.value.partition(":")[0])
print(peak() - before)
"""


def test_parquet_that_expands_to_gigabytes_takes_little_memory(tmp_path: Path) -> None:
    mebibyte = " " * 2**20
    noise = random.Random(0).randbytes(2**19).hex()  # expands no more than text does, but a thousand rows repeat it
    files = {
        "small": _parquet({"text": GOOD}),
        "one": _parquet({"text": [mebibyte * 128]}, compression="zstd", use_dictionary=False),
        "rows": _parquet({"text": [mebibyte] * 128}, compression="zstd", use_dictionary=False),
        "repeated": _parquet({"text": _repeated(mebibyte * 2)}, compression="zstd"),
        "noise": _parquet({"text": _repeated(noise)}),
    }
    for name, contents in files.items():
        (tmp_path / f"{name}.parquet").write_bytes(contents)
    command = [sys.executable, "-c", _MEASURE, *(str(tmp_path / f"{name}.parquet") for name in files)]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *found, grown = done.stdout.splitlines()
    assert [line.split()[0] for line in found] == [f"{name}.parquet" for name in list(files)[1:]]
    assert found[-1] == "noise.parquet 1024"
    assert all("that expand to" in line for line in found[:-1])
    assert int(grown) < 64 * 1000, f"{grown} KiB"


@pytest.mark.parametrize("header_bytes", [2**31 - 1, -1, 2**25, 7])
def test_saved_dataset_with_an_oversized_header_is_refused(tmp_path: Path, header_bytes: int) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "a.arrow").write_bytes(struct.pack("<Ii", 0xFFFFFFFF, header_bytes) + b"\xff" * 64)
    (file,) = list_input(str(folder), (".txt",)).files
    with pytest.raises(DataError, match="read to its end"):
        list(read_documents(file, "text"))


def _small_build(folder: Path, tokens: np.ndarray) -> Path:
    writer = ShardWriter(folder / "train-000000-0000.arrow", 300)
    writer.add(tokens, 10)
    splits = {"train": (writer.close(),), "heldout": ()}
    write_manifest(folder, Manifest(1, "f", {}, "", 300, 0, splits, 0, (), {}))
    return folder / "train-000000-0000.arrow"


def test_shard_flipped_at_every_byte_cut_or_missing_gives_no_wrong_token(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    path = _small_build(tmp_path, tokens)
    good = path.read_bytes()
    assert TokenSplit(tmp_path, "train").tokens(0, 40).tolist() == tokens.tolist()
    assert len(good) >= 500
    for place in range(len(good)):
        path.write_bytes(_flipped(good, place))
        with pytest.raises(DataError, match=path.name):
            TokenSplit(tmp_path, "train").tokens(0, 40)
    for length in range(0, len(good), 37):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=path.name):
            TokenSplit(tmp_path, "train")
    path.write_bytes(good + b"\0")
    with pytest.raises(DataError, match=path.name):
        TokenSplit(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        TokenSplit(tmp_path, "train")


class _Stranger:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_tokenizer_of_a_stranger_is_refused_and_executes_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "tokenizer.json", tmp_path / "mark"
    pickle.loads(pickle.dumps(_Stranger(mark)))  # noqa: S301 - our own: proves that the pickle would act
    mark.unlink()
    zeros = "Ag" * 1000
    for contents in (
        pickle.dumps(_Stranger(mark)),
        pickle.dumps(_Stranger(mark), protocol=0),
        b"[" * 1_000_000,
        b'{"model": ' * 100_000,
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": 3}',
        b"QQ== 0\n" * 5,
        f'{{"vocab": [{{"rank": 0, "token_bytes": "{zeros}"}}], "config": {{}}}}'.encode(),
        b"\0" * (65 * 2**20),
    ):
        path.write_bytes(contents)
        for kind in ("auto", "gpt2"):
            with pytest.raises(DataError, match=r"data\.tokenizer\.path"):
                load_tokenizer(path, 2**20, kind)
    with pytest.raises(DataError, match=r"data\.tokenizer\.path"):
        load_tokenizer("/dev/zero", 2**20)
    assert not mark.exists()

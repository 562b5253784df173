"""Checkpoints and tokenizers from strangers: nothing is executed, nothing is written outside, the error says where.

Every case makes a good checkpoint hostile, with a manifest that is well hashed where that is what it takes to be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.tokenizer import load_tokenizer
from launch.checkpoint_commands import checkpoint_app
from moe_dist.checkpoint import store
from moe_dist.checkpoint.load import load_model
from moe_dist.checkpoint.manifest import MANIFEST, hash_of, manifest_bytes, read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.checkpoint.reshard import reshard
from moe_dist.errors import MoeDistError
from tests.support.checkpoints import one_rank_checkpoint

Change = Callable[[Path], None]
OUTSIDE = "outside"


class Touch:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def trap(path: Path) -> Touch:
    return Touch(path.parent.parent / OUTSIDE / "executed")


def as_pt(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"model": trap(path)}, content)
    return content.getvalue()


def as_npy(path: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([trap(path)], dtype=object), allow_pickle=True)
    return content.getvalue()


def hashed(text: bytes) -> bytes:
    """A manifest's text with the hash that it needs."""
    body = text.rstrip()[:-1]
    return body + f', "xxh3_128": "{hash_of(body)}"}}\n'.encode()


def first_part(path: Path) -> Path:
    return path / read_manifest(path).parts[0].file


def tree(change: Callable[[dict[str, Any]], None]) -> Change:
    """Changes the manifest, and hashes it anew."""

    def apply(path: Path) -> None:
        told = read_manifest(path).model_dump(exclude_none=True)
        change(told)
        (path / MANIFEST).write_bytes(hashed(json.dumps(told).encode()))

    return apply


def text(old: str, new: str | bytes) -> Change:
    """Changes the manifest as text, and hashes it anew."""

    def apply(path: Path) -> None:
        body = json.dumps(read_manifest(path).model_dump(exclude_none=True)).encode()
        assert old.encode() in body
        (path / MANIFEST).write_bytes(
            hashed(body.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1))
        )

    return apply


def named(name: str) -> Change:
    return tree(lambda told: told["parts"][0].update(file=name))


def entry(**fields: Any) -> Change:
    """Changes what the manifest says of one tensor."""

    def change(told: dict[str, Any]) -> None:
        next(iter(told["parts"][0]["tensors"].values())).update(fields)

    return tree(change)


def part(make: Callable[[Path], bytes]) -> Change:
    """Replaces a part."""
    return lambda path: first_part(path).write_bytes(make(path)) and None


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes the header of a part, and makes the manifest say of it whatever it then must."""

    def apply(path: Path) -> None:
        file = first_part(path)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])
        new = change(told)
        new = json.dumps(told).encode() if new is None else new
        begin = len(new).to_bytes(8, "little") + new
        file.write_bytes(begin + content[8 + length :])
        manifest = read_manifest(path).model_dump(exclude_none=True)
        moved = len(begin) - 8 - length
        mine = manifest["parts"][0]
        mine.update(bytes=mine["bytes"] + moved, header_bytes=len(begin), header_hash=hash_of(begin))
        for tensor in mine["tensors"].values():
            tensor.update(start=tensor["start"] + moved, end=tensor["end"] + moved)
        (path / MANIFEST).write_bytes(hashed(json.dumps(manifest).encode()))

    return apply


def length(number: int) -> Change:
    def make(path: Path) -> bytes:
        return number.to_bytes(8, "little") + first_part(path).read_bytes()[8:]

    def apply(path: Path) -> None:
        content = make(path)
        told = read_manifest(path).model_dump(exclude_none=True)
        first_part(path).write_bytes(content)
        told["parts"][0]["header_hash"] = hash_of(content[: told["parts"][0]["header_bytes"]])
        (path / MANIFEST).write_bytes(hashed(json.dumps(told).encode()))

    return apply


def some_tensor(told: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in told.items() if name != "__metadata__")


def instead(which: str, make: Callable[[Path], None]) -> Change:
    """Puts something that is no regular file in the place of the manifest or of a part."""

    def apply(path: Path) -> None:
        file = path / MANIFEST if which == "manifest" else first_part(path)
        shutil.copyfile(file, path.parent.parent / OUTSIDE / "target")
        file.unlink()
        make(file)

    return apply


def link(file: Path) -> None:
    file.symlink_to(file.parent.parent.parent / OUTSIDE / "target")


def only_pickle(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / ".metadata").write_bytes(pickle.dumps(trap(path)))
    (path / "__0_0.distcp").write_bytes(pickle.dumps(trap(path)))


def format_one(change: Callable[[dict[str, Any]], None]) -> Change:
    def apply(path: Path) -> None:
        whole = read_manifest(path)
        parts = [
            {"file": p.file, "bytes": p.bytes, "sha256": "0" * 64, "tensors": dict.fromkeys(p.tensors)}
            for p in whole.parts
        ]
        old = {"format": 1, "step": 7, "config": whole.config, "data": {}, "layout": "", "parts": parts}
        change(old)
        digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
        (path / MANIFEST).write_text(json.dumps({**old, "sha256": digest}))

    return apply


def twice(told: dict[str, Any]) -> None:
    told["parts"].append(told["parts"][0])


def same_tensor(told: dict[str, Any]) -> None:
    """The second part says that it holds what the first one holds."""
    first, second = (told["parts"][number]["tensors"] for number in (0, 1))
    name = next(name for name, value in second.items() if value["shape"] == next(iter(first.values()))["shape"])
    second[next(iter(first))] = second.pop(name)


def rename_tensor(told: dict[str, Any]) -> None:
    tensors = told["parts"][0]["tensors"]
    tensors["model/../../x"] = tensors.pop(next(iter(tensors)))


DEEP = b"[" * 200_000
CASES: dict[str, tuple[Change, str]] = {
    "only a pickled .metadata": (only_pickle, MANIFEST),
    "part is a .pt file": (part(as_pt), "part-00000"),
    "part is a pickle": (part(lambda path: pickle.dumps(trap(path))), "part-00000"),
    "part is a .npy of objects": (part(as_npy), "part-00000"),
    "manifest is a pickle": (lambda p: (p / MANIFEST).write_bytes(pickle.dumps(trap(p))) and None, MANIFEST),
    "manifest is a .pt file": (lambda p: (p / MANIFEST).write_bytes(as_pt(p)) and None, MANIFEST),
    "part named .pt": (named("weights.pt"), "parts.0.file"),
    "part named .npy": (named("weights.npy"), "parts.0.file"),
    "part outside": (named("../../outside/x.safetensors"), "parts.0.file"),
    "part at an absolute place": (named("/etc/x.safetensors"), "parts.0.file"),
    "part in a folder": (named("a/x.safetensors"), "parts.0.file"),
    "part above, spelled for Windows": (named("..\\x.safetensors"), "parts.0.file"),
    "part name with a zero byte": (named("x\0.safetensors"), "parts.0.file"),
    "part name with a line end": (named("x.safetensors\n"), "parts.0.file"),
    "part without a name": (named(""), "parts.0.file"),
    "part name is no text": (tree(lambda told: told["parts"][0].update(file=["x"])), "parts.0.file"),
    "part is a link": (instead("part", link), "part-00000"),
    "part is a pipe": (instead("part", os.mkfifo), "part-00000"),
    "part is a folder": (instead("part", Path.mkdir), "part-00000"),
    "part is a device": (instead("part", lambda file: file.symlink_to("/dev/zero")), "part-00000"),
    "manifest is a link": (instead("manifest", link), MANIFEST),
    "manifest is a pipe": (instead("manifest", os.mkfifo), MANIFEST),
    "manifest is a folder": (instead("manifest", Path.mkdir), MANIFEST),
    "header of 2^63 bytes": (length(2**63), "part-00000"),
    "header of 2^40 bytes": (length(2**40), "part-00000"),
    "header longer than the file": (length(2**24), "part-00000"),
    "header of no bytes": (length(0), "header"),
    "header is deep": (header(lambda told: b'{"a":' + DEEP), "header"),
    "header is not UTF-8": (header(lambda told: b'{"caf\xe9": 1}'), "header"),
    "header says a key twice": (header(lambda told: b'{"a": {}, "a": {}}'), "header"),
    "header is an array": (header(lambda told: b"[1]"), "header"),
    "header has negative offsets": (header(lambda told: some_tensor(told).update(data_offsets=[-8, 0])), "header"),
    "header has overlapping offsets": (header(lambda told: some_tensor(told).update(data_offsets=[8, 24])), "header"),
    "header has another dtype": (header(lambda told: some_tensor(told).update(dtype="I64")), "header"),
    "header has an unknown dtype": (header(lambda told: some_tensor(told).update(dtype="F3")), "header"),
    "header has a huge shape": (header(lambda told: some_tensor(told).update(shape=[2**60, 2**60])), "header"),
    "header has a negative shape": (header(lambda told: some_tensor(told).update(shape=[-1])), "header"),
    "header has a stranger's tensor": (header(lambda told: told.update(x=some_tensor(told))), "header"),
    "negative offset": (entry(start=-8), "start"),
    "offsets that overlap": (entry(start=0), "no overlap"),
    "offsets the wrong way round": (entry(start=900, end=800), "no overlap"),
    "offset past the end": (entry(end=2**61), "no overlap"),
    "offset past all ends": (entry(end=2**70), "end"),
    "huge shape": (entry(shape=[2**60, 2**60]), "no overlap"),
    "negative shape": (entry(shape=[-1, -8]), "shape"),
    "shape of fractions": (entry(shape=[1.5]), "shape"),
    "shape of a thousand dimensions": (entry(shape=[1] * 1000), "shape"),
    "unknown dtype": (entry(dtype="O"), "dtype"),
    "other dtype": (entry(dtype="I64"), "header"),
    "no hashes": (entry(hashes=[]), "hashes"),
    "hash is no hash": (entry(hashes=["../../x"]), "hashes"),
    "part of another size": (tree(lambda told: told["parts"][0].update(bytes=2**40)), "end at byte"),
    "part twice": (tree(twice), "duplicate part"),
    "tensor in two parts": (tree(same_tensor), "duplicate tensor"),
    "tensor of another name": (tree(rename_tensor), "header"),
    "step is negative": (tree(lambda told: told.update(step=-1)), "step"),
    "step is text": (tree(lambda told: told.update(step="7")), "step"),
    "step is beyond all numbers": (tree(lambda told: told.update(step=2**80)), "step"),
    "unknown key": (tree(lambda told: told.update({"__reduce__": "x"})), "__reduce__"),
    "no parts": (tree(lambda told: told.pop("parts")), "parts"),
    "parts are text": (tree(lambda told: told.update(parts="x")), "parts"),
    "key twice": (text('"step":', '"step": 1, "step":'), "duplicate key"),
    "deep": (text('"data": {', b'"data": {"x": ' + DEEP + b"]" * 200_000 + b', "y": {'), "one JSON object"),
    "not UTF-8": (text('"data"', b'"dat\xe9"'), "UTF-8"),
    "infinite": (text('"step": 7', '"step": Infinity'), "Infinity"),
    "number of 10,000 digits": (text('"step": 7', '"step": ' + "7" * 10_000), "one JSON object"),
    "manifest is an array": (lambda p: (p / MANIFEST).write_bytes(b"[]") and None, "array|list"),
    "manifest is empty": (lambda p: (p / MANIFEST).write_bytes(b"") and None, MANIFEST),
    "manifest without end": (lambda p: os.truncate(p / MANIFEST, 2**40), "at most"),
    "config of a thousand million layers": (
        tree(lambda told: told["config"]["model"].update(num_layers=10**9)),
        "parameters",
    ),
    "config of another model": (tree(lambda told: told["config"]["model"].update(vocab_size=10**12)), "parameters"),
    "config with a stranger's key": (tree(lambda told: told["config"].update(hook="os.system")), "hook"),
    "config is no config": (tree(lambda told: told["config"].update(model=7)), "model"),
    "format 1 with a part outside": (format_one(lambda old: old["parts"][0].update(file="../../outside/x")), "folder"),
    "format 1 with a part that is no text": (format_one(lambda old: old["parts"][0].update(file=7)), "folder"),
    "format 1 with another hash": (format_one(lambda old: None), "SHA-256"),
    "format 1 without parts": (format_one(lambda old: old.pop("parts")), "parts"),
    "format 1 of another shape": (format_one(lambda old: old.update(parts={"a": 1})), "format 1"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return reshard(one_rank_checkpoint(root / "one", 7), root / "cut", 3)


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    """A copy, and a folder outside that must stay as it is."""
    (tmp_path / OUTSIDE).mkdir()
    (tmp_path / OUTSIDE / "kept").write_text("kept")
    return Path(shutil.copytree(good, tmp_path / "checkpoints" / good.name))


def everything_under(folder: Path) -> dict[str, Any]:
    """Names, kinds and contents."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        if file.is_file() and file.stat().st_size < 2**30
        else oct(file.lstat().st_mode)
        for file in sorted(folder.rglob("*"))
    }


def test_there_are_enough_cases():
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_hostile_checkpoint_is_refused_by_name_and_does_nothing(path, name):
    change, says = CASES[name]
    change(path)
    before = everything_under(path.parent.parent)

    def prove() -> None:
        manifest = read_manifest(path)
        verify(path, manifest)
        load_model(path, manifest, torch.device("cpu"))

    with pytest.raises(MoeDistError, match=f"(?s){says}"):
        prove()
    for command in (["list"], ["verify"], ["show"], ["reshard", "--parts", "2", "--out", str(path.parent / "new")]):
        done = CliRunner().invoke(checkpoint_app, [command[0], str(path.parent), *command[1:], "--json"])
        assert done.exception is None or isinstance(done.exception, MoeDistError | SystemExit), (
            command,
            done.exception,
        )
        if command == ["verify"]:
            assert done.exit_code == 1
    shutil.rmtree(path.parent / "new", ignore_errors=True)
    assert everything_under(path.parent.parent) == before


def test_pickle_beside_a_good_checkpoint_is_not_opened(path):
    for name in (".metadata", "optimizer.pt", "x.npy", "extra.pkl"):
        (path / name).write_bytes(pickle.dumps(trap(path)))
    manifest = read_manifest(path)
    verify(path, manifest)
    load_model(path, manifest, torch.device("cpu"))
    assert not (path.parent.parent / OUTSIDE / "executed").exists()


def test_traps_are_real(path):
    pickle.loads(pickle.dumps(trap(path)))  # noqa: S301 - what the product never does
    assert (path.parent.parent / OUTSIDE / "executed").exists()


def test_links_in_the_folder_of_checkpoints_are_not_followed_by_a_sweep(path):
    root, outside = path.parent, path.parent.parent / OUTSIDE
    (root / ".writing-step-00000009-aaaaaaaa").symlink_to(outside)
    (root / "step-00000003").symlink_to(outside)
    store.begin(root, 9, 0)
    store.prune(root, path, keep=1)
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Touch(Path("executed"))),
        b"",
        b"[]",
        b"null",
        b'{"model": 7}',
        b'{"model": {"type": "BPE"}}',
        b'{"version": "1.0", "model": ' + DEEP,
        b'{"caf\xe9": 1}',
        b'{"version": "1.0", "added_tokens": [{"id": -1}], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"auto_map": {"AutoTokenizer": "evil.py--Tokenizer"}}',
    ],
    ids=["pickle", "empty", "array", "null", "number", "no vocabulary", "deep", "not UTF-8", "negative ids", "code"],
)
def test_tokenizer_of_a_stranger_is_refused_by_name(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(MoeDistError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json", 300)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_manifest_that_is_read_is_written_alike(path):
    """Guards the helpers of this table: a tree that nobody changed is read."""
    tree(lambda told: None)(path)
    manifest = read_manifest(path)
    verify(path, manifest)
    assert manifest_bytes(manifest).startswith(b'{"config"')

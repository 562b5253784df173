"""Directories and files of strangers: each is refused by name, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.errors import ConfigError, ExchangeError, MoeDistError
from moe_dist.interop.minimind import StateDict
from moe_dist.interop.shards import INDEX, Shards
from tests.support.exchange import answer
from tests.support.small_hub import write_llama, write_mixtral

FILE = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A small Mixtral in two files, made without any library of theirs."""
    return write_mixtral(tmp_path / "hub")


def set_index(hub: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((hub / INDEX).read_text())
    change(index["weight_map"])
    (hub / INDEX).write_text(json.dumps(index))


def set_field(hub: Path, **fields: Any) -> None:
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | fields))


def set_header(hub: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = (hub / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    change(tree)
    text = json.dumps(tree).encode()
    (hub / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def resave(hub: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(hub / FILE)
    change(tensors)
    save_file(tensors, hub / FILE, {"format": "pt"})


def link(hub: Path, name: str) -> None:
    (hub / name).rename(hub.parent / "elsewhere")
    (hub / name).symlink_to(hub.parent / "elsewhere")


def outside(hub: Path) -> None:
    shutil.copy(hub / FILE, hub.parent / FILE)
    set_index(hub, lambda files: files.update(dict.fromkeys([n for n, f in files.items() if f == FILE], f"../{FILE}")))


def first_of(tree: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in tree.items() if name != "__metadata__")


def overlap(tree: dict[str, Any]) -> None:
    one, two = [entry for name, entry in tree.items() if name != "__metadata__"][:2]
    start, size = one["data_offsets"][0], two["data_offsets"][1] - two["data_offsets"][0]
    two["data_offsets"] = [start, start + size]


NORM = "model.layers.0.input_layernorm.weight"
# What is done to the directory: (what is done, a word of the refusal).
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file outside the directory": (outside, "without any folder"),
    "an absolute path": (lambda hub: set_index(hub, lambda m: m.update({NORM: "/etc/passwd"})), "without any folder"),
    "a file that is a link": (lambda hub: link(hub, FILE), "no links"),
    "an index that is a link": (lambda hub: link(hub, INDEX), "no links"),
    "a config that is a link": (lambda hub: link(hub, "config.json"), "no links"),
    "a pipe": (lambda hub: ((hub / FILE).unlink(), os.mkfifo(hub / FILE)), "regular files"),
    "a header longer than the file": (
        lambda hub: (hub / FILE).write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        "a header fits into the file",
    ),
    "a header that is no JSON": (lambda hub: (hub / FILE).write_bytes((8).to_bytes(8, "little") + b"x" * 8), "JSON"),
    "a key twice": (
        lambda hub: (hub / "config.json").write_text('{"model_type": "mixtral", "model_type": "llama"}'),
        "each key once",
    ),
    "tensors that overlap": (lambda hub: set_header(hub, overlap), "no gap, no overlap"),
    "a tensor beyond the end": (
        lambda hub: set_header(hub, lambda tree: first_of(tree).update(data_offsets=[0, 2**50])),
        "no gap, no overlap",
    ),
    "a shape of another size": (
        lambda hub: set_header(hub, lambda tree: first_of(tree).update(shape=[2**40, 2**40])),
        "no gap, no overlap",
    ),
    "a type that is unknown": (
        lambda hub: set_header(hub, lambda tree: first_of(tree).update(dtype="F8_E4M3")),
        "a type that is carried",
    ),
    "a file cut short": (lambda hub: os.truncate(hub / FILE, (hub / FILE).stat().st_size - 8), "the tensors end"),
    "bytes at the end": (lambda hub: (hub / FILE).write_bytes((hub / FILE).read_bytes() + b"x"), "the tensors end"),
    "a tensor that is missing": (lambda hub: resave(hub, lambda t: t.pop(NORM)), "the index says"),
    "a tensor nobody asked for": (
        lambda hub: (
            resave(hub, lambda t: t.update({"model.extra": torch.ones(2)})),
            set_index(hub, lambda m: m.update({"model.extra": FILE})),
        ),
        "nothing is left out",
    ),
    "a tensor of another shape": (lambda hub: resave(hub, lambda t: t.update({NORM: torch.ones(7)})), "makes it [16]"),
    "whole numbers for weights": (
        lambda hub: resave(hub, lambda t: t.update({NORM: torch.ones(16, dtype=torch.int32)})),
        "a float type",
    ),
    "numbers that fp32 cannot hold": (
        lambda hub: resave(hub, lambda t: t.update({NORM: torch.full((16,), 1 / 3, dtype=torch.float64)})),
        "holds every number exactly",
    ),
    "pickled weights alone": (
        lambda hub: [file.unlink() for file in hub.glob("*.safetensors*")] and (hub / "pytorch_model.bin").touch(),
        "pickles",
    ),
    "another family": (lambda hub: set_field(hub, model_type="../../bert"), "families that are carried"),
    "weights that are quantised": (
        lambda hub: set_field(hub, quantization_config={"quant_method": "fp8"}),
        "plain float",
    ),
    "a field that is unknown": (lambda hub: set_field(hub, attention_chunk_size=4), "not known may change"),
    "a rotary embedding that is unknown": (
        lambda hub: set_field(hub, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "default, linear and yarn",
    ),
    "an activation that is unknown": (lambda hub: set_field(hub, hidden_act="gelu"), "'silu'"),
    "heads without number": (lambda hub: set_field(hub, num_attention_heads=0), "whole number"),
    "layers that are no number": (lambda hub: set_field(hub, num_hidden_layers="2"), "integer"),
    "layers beyond reason": (lambda hub: set_field(hub, num_hidden_layers=10**9), "as many tensors as it has blocks"),
    "experts beyond reason": (lambda hub: set_field(hub, num_local_experts=10**9), "at most a million"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_directory_is_refused_by_name(what: str, hub: Path, tmp_path: Path) -> None:
    spoil, word = HOSTILE[what]
    spoil(hub)
    with pytest.raises(MoeDistError) as caught:
        answer("import", hub, tmp_path / "run")
    assert isinstance(caught.value, ExchangeError | ConfigError) and caught.value.exit_code == 2
    assert word in str(caught.value), str(caught.value)
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_unknown_field_and_extra_tensor_may_be_left_out_knowingly(hub: Path, tmp_path: Path) -> None:
    set_field(hub, attention_chunk_size=4)
    HOSTILE["a tensor nobody asked for"][0](hub)
    code, found = answer("import", hub, tmp_path / "run", "--ignore", "attention_chunk_size", "--drop", "model.ext*")
    assert code == 0 and found["family"] == "mixtral"


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def expanded() -> dict[str, torch.Tensor]:
    return {"tok_embeddings.weight": torch.ones(1).expand(300, 16)}


PICKLES: dict[str, tuple[Any, str]] = {
    "code": (Evil(), "weights_only"),
    "no dict": ([torch.ones(2)], "a dict of tensors"),
    "a dict of dicts": ({"model": {"a": torch.ones(2)}, "optimizer": {}}, "a plain tensor"),
    "a tensor of few bytes and many numbers": (expanded(), "a plain tensor"),
    "names of nobody": ({"a": torch.ones(2)}, "three layouts"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_hostile_pickle_is_refused_by_name(what: str, tmp_path: Path) -> None:
    value, word = PICKLES[what]
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(ExchangeError, match=word):
        answer("import", tmp_path / "a.pth", tmp_path / "run", "--trust-pickle")


def test_pickle_is_not_opened_unless_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil()))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ExchangeError, match="--trust-pickle"):
        answer("import", tmp_path / "a.pth", tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ExchangeError, match="weights_only"):
        StateDict(tmp_path / "a.pth")


def test_tied_output_must_be_the_embedding(tmp_path: Path) -> None:
    hub = write_llama(tmp_path / "hub", tie_word_embeddings=True)
    file = hub / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert answer("import", hub, tmp_path / "run")[0] == 0
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ExchangeError, match="another tensor than the embedding"):
        answer("import", hub, tmp_path / "other")


def test_open_files_are_closed_when_a_directory_is_refused(hub: Path) -> None:
    set_header(hub, overlap)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ExchangeError), Shards(hub):
        pass
    assert len(os.listdir("/proc/self/fd")) == before

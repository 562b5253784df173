"""Real inputs in temporary folders, and one small build that read-only tests share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build
from data_pipeline.listing import InputFile, list_input
from moe_dist.config import Config, parse_config


def _write_texts(folder: Path, number: int, seed: int = 0) -> Path:
    """A folder of `number` text files of some kilobytes, with words, digits, code and other scripts in them."""
    source = random.Random(seed)
    words = ["alpha", "beta", "def f(x):\n    return x", "größe", "猫", "🙂", "12345", "\t", "the", "of", "\r\n", "!"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        text = " ".join(source.choices(words, k=source.randint(200, 800)))
        (folder / f"text{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def _configure(source: Path | str, target: Path, **data: Any) -> Config:
    """Small shards and rows; `data` replaces keys of the data section."""
    section = {"input": str(source), "dir": str(target), "shard_bytes": 20_000, "sequence_length_tokens": 32}
    return parse_config({"data": {**section, **data}, "model": {"vocab_size": 300}})


@pytest.fixture
def input_file(tmp_path: Path) -> Callable[[str, bytes], InputFile]:
    """Writes one file and lists it."""

    def write(name: str, contents: bytes) -> InputFile:
        path = tmp_path / name
        path.write_bytes(contents)
        return list_input(str(path), (".txt", ".py")).files[0]

    return write


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_texts(tmp_path_factory.mktemp("texts") / "in", 60)


@pytest.fixture(scope="session")
def built(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of `texts` with several shards. Not to be changed: copy it."""
    return build(_configure(texts, tmp_path_factory.mktemp("built"), holdout_fraction=0.1), use_ray=False)

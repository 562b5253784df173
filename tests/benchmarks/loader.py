"""How fast batches come from cold shards, and how much memory their order takes.

    python -m tests.benchmarks.loader [--quick] [--json] [--megatokens N] [--length S]

The interpreter's library, encoded with 8,192 tokens, is repeated document by document until there are N million tokens
in shards of the usual size. `ours` opens the build, in windows of the default size, and takes every row of an epoch in
batches of 64 rows, as int64; shards are dropped from the page cache before, hashed and decoded. `ours, 2 ahead` makes
them in a thread and is asked for nothing else; `each rank of 2` is one rank's half of every batch. `megatron` is
Megatron-Core's GPTDataset over `data export --format megatron` of the same build (its own package, see peers.txt; left
out without it), row by row, as tensors stacked into batches of the same shape; its index is built before the clock
starts, which `open_seconds` tells. Ways take turns, the first place changing. `order` is one more process that draws
samples of an order of 10**10 rows of two sources at random places: `rss_megabytes` is all its resident memory at the
most. `--json` ends with {"rows": [{way, tokens_per_second, open_seconds}], "order": {samples, rss_megabytes,
microseconds_per_sample}, "tokens", "megabytes_on_disk"}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.build import build
from data_pipeline.lengths import find_lengths
from data_pipeline.loader import BatchLoader, open_training
from data_pipeline.manifest import TOKENIZER_NAME, Manifest, read_manifest, write_manifest
from data_pipeline.megatron import export_megatron
from data_pipeline.prefetch import Prefetch
from data_pipeline.shards import ShardWriter, TokenSplit
from moe_dist.config import Config, parse_config
from tests.benchmarks.options import parser_of

VOCABULARY, BATCH = 8192, 64
SHARD_TOKENS = 600_000  # what 2 MB of text come to
ORDER = """
import json, re, time
import numpy as np
from data_pipeline.mixture import each_once
from data_pipeline.run_order import RunOrder
rows = {"a": 4 * 10**9, "b": 6 * 10**9}
order = RunOrder(0, rows, each_once(rows), 2048, 8_388_608)
places = np.random.default_rng(0).integers(0, 10**10, 200).tolist()
started = time.perf_counter()
for place in places:
    order.locate_range(place, place + 4096)
seconds = time.perf_counter() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"samples": 10**10, "rss_megabytes": peak, "microseconds_per_sample": seconds / 200 / 4096 * 1e6}))
"""


def config_of(target: Path, length: int) -> Config:
    """The build of the library, and the order of its rows."""
    data = {"input": "python-library", "dir": str(target), "sequence_length_tokens": length}
    return parse_config({"data": data, "model": {"vocab_size": VOCABULARY}, "train": {"global_batch_sequences": BATCH}})


def repeated_build(folder: Path, config: Config, tokens: int) -> Path:
    """A build with so many tokens: the documents of the library's build, again and again."""
    small = build(config, use_ray=False)
    manifest, split = read_manifest(small), TokenSplit(small, "train")
    stream = split.tokens(0, split.num_tokens).astype(np.int32)
    documents = np.split(stream, np.cumsum(find_lengths([stream], manifest.end_of_text))[:-1])
    target = folder / "repeated"
    target.mkdir()
    (target / TOKENIZER_NAME).write_bytes((small / TOKENIZER_NAME).read_bytes())
    shards, number, written = [], 0, 0
    while written < tokens:
        writer = ShardWriter(target / f"train-{len(shards):06d}-0000.arrow", VOCABULARY)
        while writer.tokens < SHARD_TOKENS:
            document = documents[number % len(documents)]
            writer.add(document, 3 * len(document))
            number += 1
        written += writer.tokens
        shards.append(writer.close())
    heldout = ShardWriter(target / "heldout-000000-0000.arrow", VOCABULARY)
    heldout.add(documents[0], 1)
    made: Manifest = replace(manifest, splits={"train": tuple(shards), "heldout": (heldout.close(),)})
    write_manifest(target, made)
    return target


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the pages of every file of a folder."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(folder: Path, config: Config, ahead: int, ranks: int) -> tuple[float, float, int]:
    """(seconds to open, seconds to read, tokens read) of one epoch by rank 0."""
    drop_from_cache(folder)
    started = time.perf_counter()
    training = open_training(config, folder)
    batches = Prefetch(BatchLoader(training, BATCH, 0, ranks), ahead)
    steps = sum(split.num_rows(training.order.sequence_length) for split in training.sources.values()) // BATCH
    opened, read = time.perf_counter() - started, 0
    for _ in range(steps):
        rows = next(batches).rows
        read += rows.shape[0] * (rows.shape[1] - 1)
    seconds = time.perf_counter() - started - opened
    batches.close()
    return opened, seconds, read


def megatron(prefix: Path, length: int, tokens: int, end_of_text: int) -> tuple[float, float, int]:
    """The same of Megatron-Core's own data set, in its own shuffled order."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    drop_from_cache(prefix.parent)
    started = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=length,
        blend=([f"{prefix}_train"], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=types.SimpleNamespace(eod=end_of_text, pad=end_of_text, vocab_size=VOCABULARY, unique_identifiers={}),
    )
    tables = IndexedDataset(f"{prefix}_train", mmap=True)
    numbers = np.arange(len(tables), dtype=np.int32)
    rows = (tokens - 1) // length
    samples = GPTDataset(tables, f"{prefix}_train", numbers, rows, Split.train, config)
    opened, read = time.perf_counter() - started, 0
    for first in range(0, rows - rows % BATCH, BATCH):
        found = [samples[place] for place in range(first, first + BATCH)]
        batch = torch.stack([row["tokens"] for row in found]), torch.stack([row["labels"] for row in found])
        read += batch[0].numel()
    return opened, time.perf_counter() - started - opened, read


def measure(folder: Path, megatokens: float, length: int, rounds: int) -> dict[str, Any]:
    """Rows of all ways; the first round does not count."""
    config = config_of(folder, length)
    built = repeated_build(folder, config, int(megatokens * 1e6))
    manifest = read_manifest(built)
    ways: dict[str, Callable[[], tuple[float, float, int]]] = {
        "ours": lambda: ours(built, config, 0, 1),
        "ours, 2 ahead": lambda: ours(built, config, 2, 1),
        "each rank of 2": lambda: ours(built, config, 0, 2),
    }
    if importlib.util.find_spec("megatron"):
        prefix = folder / "megatron" / "export"
        export_megatron(built, prefix)
        ways["megatron"] = lambda: megatron(prefix, length, manifest.num_tokens("train"), manifest.end_of_text)
    taken: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in _turned(list(ways), turn):
            taken[way].append(ways[way]())
    rows = [
        {
            "way": way,
            "tokens_per_second": statistics.median(tokens / seconds for _, seconds, tokens in found[1:]),
            "open_seconds": statistics.median(opened for opened, _, _ in found[1:]),
        }
        for way, found in taken.items()
    ]
    size = sum(shard.file_bytes for shard in manifest.splits["train"])
    drawn = subprocess.run([sys.executable, "-c", ORDER], capture_output=True, text=True, check=True)
    figures = {"tokens": manifest.num_tokens("train"), "megabytes_on_disk": size / 1e6}
    return {"rows": rows, "order": json.loads(drawn.stdout), **figures}


def _turned(ways: list[str], turn: int) -> Iterator[str]:
    yield from (ways[(turn + place) % len(ways)] for place in range(len(ways)))


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--megatokens", type=float, default=64, help="in the shards")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.megatokens, options.length, 2 if options.quick else 5)
    title = f"{found['tokens']:,} tokens, {found['megabytes_on_disk']:.0f} MB, rows of {options.length}"
    table = Table(*found["rows"][0], title=title, caption=f"order: {found['order']}")
    for row in found["rows"]:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

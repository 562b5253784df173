"""How much of the tokenizer's own speed a build keeps.

    python -m tests.benchmarks.data_build [--quick] [--json] [--input PATH] [--megabytes N]

All ways turn the same documents into the same ids with the same tokenizer (8,192 tokens, trained on them before) and
take turns within each round, the first place changing, each in a fresh process as a build is, which encodes 0.3 MB
before the clock starts. `encode_batch` and `encode_batch_fast` are one call of the
library for all texts, which lie in memory, and leave its objects; they write nothing, nor does `encode_batch by 1 MB`,
which drops what each call leaves and so pays less for memory. `write shards` is the second pass
of `data build --no-ray`: it reads the files, encodes, packs, compresses, hashes and writes; `data build` is the whole
of it with a tokenizer that is given, both passes. `datasets.map` is that of Hugging Face with `encode_batch_fast` on
texts in memory, written to its Arrow file; without the package (see peers.txt) the row is left out. Shares are medians
over the rounds of the time of `encode_batch` by that of the way. `--json` ends with one object: {"rows": [{way,
seconds, megabytes_per_second, tokens_per_second, share_of_encode_batch}], "documents", "megabytes", "tokens"}.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as Library

from data_pipeline.build import build
from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import PYTHON_LIBRARY, list_input
from data_pipeline.manifest import read_manifest
from data_pipeline.once import Progress
from data_pipeline.tokenizer import train_tokenizer
from moe_dist.config import Config, parse_config
from tests.benchmarks.options import parser_of

VOCABULARY, THREADS = 8192, 2  # of the library, unless RAYON_NUM_THREADS says another number
TRAINED_ON, WARMED_UP_WITH, BATCH_CHARACTERS = 4_000_000, 300_000, 2**20
SUFFIXES = [".txt", ".md", ".rst", ".py"]


@dataclass(frozen=True)
class Corpus:
    """The same text in memory and in files.

    Attributes:
        texts: Its documents.
        tokenizer: A tokenizer.json.
        input: Files that hold those documents.
        folder: For what is written.
    """

    texts: list[str]
    tokenizer: Path
    input: Path
    folder: Path

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode("utf-8")) for text in self.texts)

    def config(self, target: str) -> Config:
        """The build of it."""
        data = {"input": str(self.input), "dir": target, "sequence_length_tokens": 64}
        return parse_config(
            {"data": {**data, "tokenizer": {"path": str(self.tokenizer)}}, "model": {"vocab_size": VOCABULARY}}
        )


def corpus_of(source: str, limit: int, folder: Path) -> Corpus:
    """Takes documents in the order of the listing up to a limit in bytes; many small ones go into files of records."""
    documents, size = [], 0
    for file in list_input(source, tuple(SUFFIXES)).files:
        for document in read_documents(file, "text"):
            if isinstance(document, Document) and document.text and size < limit:
                documents.append(document)
                size += document.num_bytes
    inside = folder / "input"
    inside.mkdir()
    per_file = max(1, len(documents) // 8)
    for number, start in enumerate(range(0, len(documents), per_file)):
        lines = [json.dumps({"text": d.text}, ensure_ascii=False) for d in documents[start : start + per_file]]
        (inside / f"{number:03d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(_first(texts, TRAINED_ON), VOCABULARY)
    tokenizer.save(folder / "tokenizer.json")
    return Corpus(texts, folder / "tokenizer.json", inside, folder)


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def bare(corpus: Corpus, method: str) -> dict[str, float]:
    """One call of the library."""
    library = Library.from_file(str(corpus.tokenizer))
    library.encode_special_tokens = True
    with seconds_of(method) as found:
        encoded = getattr(library, method)(corpus.texts, add_special_tokens=False)
    found["tokens"] = sum(map(len, encoded)) + len(encoded)
    return found


def in_batches(corpus: Corpus) -> dict[str, float]:
    """A call for each megabyte, whose objects are dropped."""
    library = Library.from_file(str(corpus.tokenizer))
    library.encode_special_tokens = True
    batches: list[list[str]] = [[]]
    for text in corpus.texts:
        if sum(map(len, batches[-1])) >= BATCH_CHARACTERS:
            batches.append([])
        batches[-1].append(text)
    tokens = 0
    with seconds_of("encode_batch by 1 MB") as found:
        for batch in batches:
            encoded = library.encode_batch(batch, add_special_tokens=False)
            tokens += sum(map(len, encoded)) + len(encoded)
    found["tokens"] = tokens
    return found


def ours(corpus: Corpus) -> dict[str, float]:
    """A whole build, and its second pass by the clock."""
    times: list[float] = []

    def report(step: Progress) -> None:
        if step.stage == "write shards":
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=corpus.folder) as target:
        with seconds_of("data build") as found:
            built = build(corpus.config(target), False, report)
        manifest = read_manifest(built)
    found["tokens"] = sum(manifest.num_tokens(split) for split in manifest.splits)
    return {"write shards": times[-1] - times[0], **found}


def mapped(corpus: Corpus) -> dict[str, float]:
    """`datasets.map` in this process; the function's fingerprint is given, which spares it to pickle the tokenizer."""
    import datasets

    datasets.disable_progress_bars()
    library = Library.from_file(str(corpus.tokenizer))
    library.encode_special_tokens = True
    texts = datasets.Dataset.from_dict({"text": corpus.texts})

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [e.ids for e in library.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    with tempfile.TemporaryDirectory(dir=corpus.folder) as target:
        settings = {"remove_columns": ["text"], "cache_file_name": f"{target}/ids.arrow", "new_fingerprint": "ids"}
        with seconds_of("datasets.map") as found:
            done = texts.map(encode, batched=True, load_from_cache_file=False, **settings)
        found["tokens"] = sum(map(len, done["ids"])) + len(done)
    return found


@contextmanager
def seconds_of(way: str) -> Iterator[dict[str, float]]:
    """Clocks the block, under the name of the way."""
    found: dict[str, float] = {}
    started = time.perf_counter()
    yield found
    found[way] = time.perf_counter() - started


WAYS: dict[str, Callable[[Corpus], dict[str, float]]] = {
    "encode_batch": lambda corpus: bare(corpus, "encode_batch"),
    "encode_batch_fast": lambda corpus: bare(corpus, "encode_batch_fast"),
    "encode_batch by 1 MB": in_batches,
    "data build": ours,
    "datasets.map": mapped,
}


def in_this_process(way: str, folder: Path) -> None:
    """Times one way over the corpus that lies in a folder, and prints what it found."""
    texts = [json.loads(line)["text"] for path in sorted((folder / "input").iterdir()) for line in path.open()]
    corpus = Corpus(texts, folder / "tokenizer.json", folder / "input", folder)
    Library.from_file(str(corpus.tokenizer)).encode_batch_fast(list(_first(texts, WARMED_UP_WITH)))
    print(json.dumps(WAYS[way](corpus)))


def in_fresh_process(way: str, folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.data_build", "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(corpus: Corpus, rounds: int) -> dict[str, Any]:
    """Rows of all ways; the first round does not count."""
    ways = [way for way in WAYS if way != "datasets.map" or importlib.util.find_spec("datasets")]
    taken: dict[str, list[float]] = {}
    tokens = set()
    for turn in range(rounds + 1):
        for place in range(len(ways)):
            found = in_fresh_process(ways[(turn + place) % len(ways)], corpus.folder)
            tokens.add(int(found.pop("tokens")))
            for way, seconds in found.items():
                taken.setdefault(way, []).append(seconds)
    (number,) = tokens  # all ways give the same
    rows = []
    for way, seconds in taken.items():
        pairs = zip(taken["encode_batch"][1:], seconds[1:], strict=True)
        own = statistics.median(seconds[1:])
        rates = {"megabytes_per_second": corpus.num_bytes / 1e6 / own, "tokens_per_second": number / own}
        share = statistics.median(theirs / mine for theirs, mine in pairs)
        rows.append({"way": way, "seconds": own, **rates, "share_of_encode_batch": share})
    return {"rows": rows, "documents": len(corpus.texts), "megabytes": corpus.num_bytes / 1e6, "tokens": number}


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--input", default=PYTHON_LIBRARY, help="a folder or file of text; the interpreter's library")
    parser.add_argument("--megabytes", type=float, default=12, help="of text")
    parser.add_argument("--way", choices=WAYS, help="time this one, once, over the corpus of an earlier call")
    parser.add_argument("--folder", type=Path, help="where that corpus is")
    options = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", str(THREADS))
    if options.way:
        in_this_process(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_of(options.input, int(options.megabytes * 1e6), Path(folder))
        found = measure(corpus, 3 if options.quick else 7)
    title = (
        f"{found['documents']} documents, {found['megabytes']:.1f} MB, {found['tokens']:,} tokens, {THREADS} threads"
    )
    table = Table(*found["rows"][0], title=title)
    for row in found["rows"]:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Decontamination: documents that share a run of words with evaluation text are left out.

A run is 13 words by default, as for GPT-3 (Brown et al. 2020, appendix C); words are those of `shingles.py`, so case,
punctuation and white space do not hide a leak, and Chinese is compared by characters. Unlike GPT-3's, a document goes
as a whole, however often a run occurs.

The runs of the evaluation text are a sorted array of 64-bit hashes in a file, which the processes of one machine share
by a memory map. A document is left out in error where two different runs share a hash: for D runs in the corpus and M
in the evaluation text about D * M / 2**64 times in all, so 5e-4 times for a corpus of 10**9 words and M = 10**7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile, list_input
from data_pipeline.shards import file_sha256
from data_pipeline.shingles import BATCH_CHARACTERS, SHINGLES_VERSION, shingles_of, word_spans
from moe_dist.config.schema import DataConfig
from moe_dist.errors import DataError

RUNS_NAME = (
    ".evaluation-runs"  # hashes as little-endian uint64, ascending, then the number of each one's file as uint32
)
_MOST_BITS = 26  # of a table in every process: 64 MiB
_WHERE = "data.decontaminate.against"


@dataclass(frozen=True)
class Leak:
    """A run of words that a document shares with evaluation text.

    Attributes:
        against: The first file of evaluation text that has it.
        text: The run as the document has it.
    """

    against: str
    text: str


@dataclass(frozen=True)
class Decontaminator:
    """Finds documents that share a run of words with evaluation text; small and picklable.

    Attributes:
        path: The file of the runs.
        ngram_words: Words of a run.
        names: Ids of the files of evaluation text.
        figures: How many `files`, `documents`, `runs` there are, and documents `too_short` to have one.
    """

    path: Path
    ngram_words: int
    names: tuple[str, ...]
    figures: dict[str, int]

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return np.memmap(self.path, dtype="<u8", mode="r", shape=(self.figures["runs"],))

    @cached_property
    def _files(self) -> NDArray[np.uint32]:
        number = self.figures["runs"]
        return np.memmap(self.path, dtype="<u4", mode="r", offset=8 * number, shape=(number,))

    @cached_property
    def _shift(self) -> np.uint64:
        """Bits to drop of a hash, so that four to eight times as many beginnings are told apart as there are runs."""
        return np.uint64(64 - min(_MOST_BITS, max(3, (4 * self.figures["runs"]).bit_length())))

    @cached_property
    def _beginnings(self) -> NDArray[np.bool_]:
        """Which beginnings the runs' hashes have: most other hashes are sorted out by one look, without a search."""
        found = np.zeros(1 << (64 - int(self._shift)), dtype=np.bool_)
        found[self._hashes >> self._shift] = True
        return found

    def __call__(self, texts: Sequence[str]) -> list[Leak | None]:
        """The first leak of each text."""
        shingles = shingles_of(texts, self.ngram_words)
        likely = np.flatnonzero(self._beginnings[shingles.hashes >> self._shift])
        places = np.minimum(np.searchsorted(self._hashes, shingles.hashes[likely]), len(self._hashes) - 1)
        same = self._hashes[places] == shingles.hashes[likely]
        hits, places = likely[same], places[same]
        ends = np.cumsum(shingles.counts)
        owners, first = np.unique(np.searchsorted(ends, hits, side="right"), return_index=True)
        leaks: list[Leak | None] = [None] * len(texts)
        for owner, hit, place in zip(owners.tolist(), hits[first].tolist(), places[first].tolist(), strict=True):
            word = hit - int(ends[owner] - shingles.counts[owner])
            name = self.names[self._files[place]]
            leaks[owner] = Leak(name, _words_from(texts[owner], word, self.ngram_words))
        return leaks


def evaluation_created_from(data: DataConfig) -> dict[str, Any]:
    """What decides which documents are left out: hashes of the evaluation files, wherever they lie; nothing if off."""
    settings = data.decontaminate
    if not settings.against:
        return {}
    hashes = sorted(file_sha256(Path(file.path)) for file in _files(data))
    return {
        "data.decontaminate.sha256": hashlib.sha256("".join(hashes).encode("ascii")).hexdigest(),
        "data.decontaminate.ngram_words": settings.ngram_words,
        "data.decontaminate.text_field": _text_field(data),
        "data.decontaminate.version": list(SHINGLES_VERSION),
    }


def open_decontaminator(data: DataConfig, path: Path) -> Decontaminator:
    """Reads the evaluation text and writes its runs to a file.

    Raises:
        DataError: Evaluation text is missing or cannot be read, or all of it is too short. None is skipped in silence,
            whatever `data.unreadable` says.
    """
    length, files = data.decontaminate.ngram_words, _files(data)
    parts: list[NDArray[np.uint64]] = []
    documents = too_short = 0
    for file in files:
        own = [np.zeros(0, dtype=np.uint64)]
        for batch in _batches(file, _text_field(data)):
            shingles = shingles_of(batch, length)
            long = shingles.words >= length
            own.append(np.unique(shingles.hashes[np.repeat(long, shingles.counts)]))
            documents, too_short = documents + len(batch), too_short + int((~long).sum())
        parts.append(np.unique(np.concatenate(own)))
    hashes, first = np.unique(np.concatenate(parts), return_index=True)
    if not len(hashes):
        rule = f"evaluation text has a document of at least {length} words"
        raise DataError(_WHERE, f"{documents} documents, all shorter", rule, "a smaller data.decontaminate.ngram_words")
    owners = np.repeat(np.arange(len(parts)), [len(own) for own in parts])[first]
    with open(path, "wb") as output:
        output.write(hashes.astype("<u8").tobytes())
        output.write(owners.astype("<u4").tobytes())
    figures = {"files": len(files), "documents": documents, "too_short": too_short, "runs": len(hashes)}
    return Decontaminator(path, length, tuple(file.id for file in files), figures)


def _files(data: DataConfig) -> tuple[InputFile, ...]:
    try:
        return tuple(file for path in data.decontaminate.against for file in list_input(path, data.suffixes).files)
    except DataError as error:
        raise DataError(_WHERE, error.value, error.rule, error.fix) from None


def _text_field(data: DataConfig) -> str:
    return data.decontaminate.text_field or data.text_field


def _batches(file: InputFile, text_field: str) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in read_documents(file, text_field):
        if not isinstance(document, Document):
            fix = "correct it, or data.decontaminate.text_field"
            raise DataError(f"{_WHERE}: {document.where}", document.value, document.rule, fix)
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _words_from(text: str, first: int, number: int) -> str:
    """Some words of a text, with what stands between them."""
    lowered = text.lower()
    spans = word_spans(text)[first : first + number]
    shown = text if len(text) == len(lowered) else lowered
    return shown[spans[0][0] : spans[-1][1]]

"""Decontamination: documents that share a run of words with evaluation text are left out.

A run is 13 words by default, as for GPT-3 (Brown et al. 2020, appendix C); words are those of `shingles.py`, so case,
punctuation and white space do not hide a leak, and Chinese is compared by characters. Unlike GPT-3's, a document goes
as a whole, however often a run occurs.

The runs of the evaluation text are a sorted array of 64-bit hashes in a file, which the processes of one machine share
by a memory map. A document is left out in error where two different runs share a hash: for D runs in the corpus and M
in the evaluation text about D * M / 2**64 times in all, so 5e-4 times for a corpus of 10**9 words and M = 10**7.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.documents import Document, read_documents
from data_pipeline.listing import InputFile, is_unchanged, list_input
from data_pipeline.shingles import BATCH_CHARACTERS, SHINGLES_VERSION, shingles_of, word_spans
from data_pipeline.streams import open_file
from data_pipeline.work import WorkFolder
from moe_dist.config.data_schema import DataConfig
from moe_dist.errors import DataError

RUNS_NAME = "evaluation-runs"  # hashes as little-endian uint64, ascending, then the number of each one's file as uint32
_READ_BYTES = 2**20
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


@dataclass(frozen=True)
class Evaluation:
    """The evaluation text that a build is kept clear of.

    Attributes:
        files: Its files, in the order of `data.decontaminate.against`.
        sha256: Hash of each file.
        ngram_words: Words of a run.
        text_field: Field of a record that holds its text.
    """

    files: tuple[InputFile, ...]
    sha256: tuple[str, ...]
    ngram_words: int
    text_field: str

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def created_from(self) -> dict[str, Any]:
        """What decides which documents are left out and what is said of them: names and contents, not places."""
        names = [[file.id, sha256] for file, sha256 in zip(self.files, self.sha256, strict=True)]
        return {
            "data.decontaminate.sha256": hashlib.sha256(json.dumps(names).encode("ascii")).hexdigest(),
            "data.decontaminate.ngram_words": self.ngram_words,
            "data.decontaminate.text_field": self.text_field,
            "data.decontaminate.version": list(SHINGLES_VERSION),
        }


def list_evaluation(data: DataConfig) -> Evaluation | None:
    """Lists and hashes the evaluation text, on this machine or an object store; None where none is named.

    Raises:
        DataError: There is none where it should be, or it cannot be read.
    """
    settings = data.decontaminate
    if not settings.against:
        return None
    files: list[InputFile] = []
    for path in settings.against:
        with _named():
            files += list_input(path, data.suffixes).files
    with _named():
        hashes = tuple(map(_sha256, files))
    return Evaluation(tuple(files), hashes, settings.ngram_words, settings.text_field or data.text_field)


def open_decontaminator(evaluation: Evaluation, work: WorkFolder) -> Decontaminator:
    """Reads the evaluation text and writes its runs into the working folder of a build.

    It is done again at each try: what other builders of the same input write there is the same.

    Raises:
        DataError: Evaluation text cannot be read or changes, or all of it is too short. None is skipped in silence,
            whatever `data.unreadable` says.
        OSError: The runs cannot be written.
    """
    length = evaluation.ngram_words
    parts: list[NDArray[np.uint64]] = []
    documents = too_short = 0
    for file in evaluation.files:
        own = [np.zeros(0, dtype=np.uint64)]
        for batch in _batches(file, evaluation.text_field):
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
    path = work.share(RUNS_NAME, hashes.astype("<u8").tobytes() + owners.astype("<u4").tobytes())
    figures = {"files": len(parts), "documents": documents, "too_short": too_short, "runs": len(hashes)}
    return Decontaminator(path, length, tuple(file.id for file in evaluation.files), figures)


def _sha256(file: InputFile) -> str:
    digest = hashlib.sha256()
    try:
        with open_file(file) as source:
            while data := source.read(_READ_BYTES):
                digest.update(data)
    except OSError as error:
        rule, fix = "evaluation text can be read", "correct its permissions, or name another file"
        raise DataError(file.id, error.strerror or error, rule, fix) from None
    return digest.hexdigest()


def _batches(file: InputFile, text_field: str) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    with _named():
        for document in read_documents(file, text_field):
            if not isinstance(document, Document):
                fix = "correct it, or data.decontaminate.text_field"
                raise DataError(document.where, document.value, document.rule, fix)
            batch.append(document.text)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if not is_unchanged(file):
            found, rule = "another size or time than when it was listed", "evaluation text does not change in mid-build"
            raise DataError(file.id, found, rule, "build again when nothing writes to it")
    if batch:
        yield batch


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Lets an error say that it is about evaluation text and not about the input."""
    try:
        yield
    except DataError as error:
        where = _WHERE if error.where == "data.input" else f"{_WHERE}: {error.where}"
        raise type(error)(where, error.value, error.rule, error.fix.replace("data.input", _WHERE)) from None


def _words_from(text: str, first: int, number: int) -> str:
    """Some words of a text, with what stands between them."""
    lowered = text.lower()
    spans = word_spans(text)[first : first + number]
    shown = text if len(text) == len(lowered) else lowered
    return shown[spans[0][0] : spans[-1][1]]

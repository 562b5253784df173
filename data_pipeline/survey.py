"""The first pass over the text: everything is read once, so that damage shows before any work is spent.

It finds what must be left out, the lowest split hash, and an even sample of documents to train the tokenizer on. Here
and in the second pass documents are cleaned alike, and what cleaning removes counts for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from data_pipeline.clean import Cleaner
from data_pipeline.dedup import PRINT_BYTES, document_print, find_repeated, split_hashes
from data_pipeline.documents import Document, read_documents
from data_pipeline.holdout import HASH_RANGE, sample_hash, split_hash
from data_pipeline.listing import InputFile
from data_pipeline.tally import Tally, source_of
from moe_dist.errors import DataError, StorageError


@dataclass(frozen=True)
class WorkItem:
    """Files that are read and written together.

    Attributes:
        index: Their place in the order of all text.
        files: The files.
        repeated: Which of their documents that cleaning leaves are copies of an earlier one; None leaves out none.
    """

    index: int
    files: tuple[InputFile, ...]
    repeated: NDArray[np.bool_] | None = field(default=None, compare=False)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def source(self) -> str:
        """The source that all its files belong to; empty without named sources."""
        return self.files[0].source if self.files else ""


@dataclass(frozen=True)
class Sampled:
    """A document that may serve to train the tokenizer, with its hashes for order and split."""

    order: int
    split: int
    text: str
    num_bytes: int


@dataclass
class Survey:
    """What one pass over some files found.

    Attributes:
        documents: Documents with text that stay.
        empty: Documents without text.
        lowest_hash: The lowest `split_hash` of those that stay.
        damaged: Ids of files that cannot be read.
        skipped: (id, reason) of files and records that cannot be read.
        sample: Documents that may serve to train the tokenizer.
        tally: What cleaning did.
        prints: A `document_print` of each document that cleaning leaves, where duplicates are looked for.
        sources: (source, number of prints from it), in the order of the prints.
    """

    documents: int = 0
    empty: int = 0
    lowest_hash: int | None = None
    damaged: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sample: list[Sampled] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    prints: bytearray = field(default_factory=bytearray)
    sources: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Surveyor:
    """Surveys work items; small and picklable, to be sent to other processes.

    Attributes:
        text_field: Field or column that holds the text of a record.
        skip_unreadable: List what cannot be read in place of raising it.
        sample_bytes: Text that is wanted for the tokenizer; 0 for none.
        total_bytes: Size of the whole input, to judge which share of it to sample.
        cleaner: Cleans each document.
        finds_duplicates: Leave a print of each document.
    """

    text_field: str
    skip_unreadable: bool
    sample_bytes: int
    total_bytes: int
    cleaner: Cleaner = field(default_factory=Cleaner)
    finds_duplicates: bool = False

    def __call__(self, item: WorkItem) -> Survey:
        """Reads every file of an item.

        Raises:
            DataError: The first file or record that cannot be read, unless such are skipped.
        """
        found = merge(map(self._survey_file, item.files))
        below = min(1.0, 2 * self.sample_bytes / max(1, self.total_bytes)) * HASH_RANGE
        found.sample = trim([s for s in found.sample if s.order < below] or found.sample[:1], self.sample_bytes)
        return found

    def _survey_file(self, file: InputFile) -> Survey:
        found, source = Survey(), source_of(file.id)
        try:
            for document in read_documents(file, file.text_field or self.text_field):
                self._add(found, document, source)
        except DataError as error:
            if not self.skip_unreadable or isinstance(error, StorageError):
                raise
            return Survey(damaged={file.id}, skipped=[(file.id, _reason(error))])
        found.sample = trim(found.sample, self.sample_bytes)
        found.sources = [(source, len(found.prints) // PRINT_BYTES)]
        return found

    def _add(self, found: Survey, document: Document | DataError, source: str) -> None:
        if isinstance(document, DataError):
            if not self.skip_unreadable:
                raise document
            found.skipped.append((document.where, _reason(document)))
        elif not document.text:
            found.empty += 1
        else:
            cleaned = self.cleaner(document)
            found.tally.add(source, cleaned.changed_by, cleaned.removed_by)
            if cleaned.document is not None:
                self._add_kept(found, cleaned.document)

    def _add_kept(self, found: Survey, document: Document) -> None:
        place = split_hash(document.id)
        found.documents += 1
        found.lowest_hash = place if found.lowest_hash is None else min(place, found.lowest_hash)
        found.sample.append(Sampled(sample_hash(document.id), place, document.text, document.num_bytes))
        if len(found.sample) % 256 == 0:
            found.sample = trim(found.sample, self.sample_bytes)
        if self.finds_duplicates:
            found.prints += document_print(document.text, place)


def plan_items(files: Iterable[InputFile], shard_bytes: int) -> list[WorkItem]:
    """Groups the listing, in order: plain files of a source up to `shard_bytes`, each file of records on its own."""
    groups: list[list[InputFile]] = []
    room = -1
    for file in files:
        if file.kind != "plain" or file.size_bytes > room or file.source != groups[-1][0].source:
            groups.append([])
            room = max(shard_bytes, file.size_bytes) if file.kind == "plain" else -1
        groups[-1].append(file)
        room -= file.size_bytes if room >= 0 else 0
    return [WorkItem(index, tuple(group)) for index, group in enumerate(groups)]


def merge(surveys: Iterable[Survey]) -> Survey:
    """Adds surveys up, in the order given."""
    total = Survey()
    for part in surveys:
        total.documents += part.documents
        total.empty += part.empty
        hashes = [place for place in (total.lowest_hash, part.lowest_hash) if place is not None]
        total.lowest_hash = min(hashes, default=None)
        total.damaged |= part.damaged
        total.skipped += part.skipped
        total.sample += part.sample
        total.tally.merge(part.tally)
        total.prints += part.prints
        total.sources += part.sources
    total.sample.sort(key=lambda s: s.order)
    return total


def take_out_repeated(found: Survey) -> NDArray[np.bool_]:
    """Takes documents with the text of an earlier one out of a whole survey.

    Returns:
        Which ones they are, in the order of the prints: [N].
    """
    repeated = find_repeated(found.prints)
    splits = split_hashes(found.prints)
    gone = set(splits[repeated].tolist())
    found.sample = [sampled for sampled in found.sample if sampled.split not in gone]
    found.documents = int((~repeated).sum())
    found.lowest_hash = int(splits[~repeated].min()) if found.documents else None
    start = 0
    for source, number in found.sources:
        found.tally.removed["exact_duplicate", source] += int(repeated[start : start + number].sum())
        start += number
    found.tally.removed = +found.tally.removed
    return repeated


def mark_repeated(items: list[WorkItem], numbers: list[int], repeated: NDArray[np.bool_]) -> list[WorkItem]:
    """Gives each item its part of what `take_out_repeated` found; `numbers` are the items' numbers of prints."""
    parts = np.split(repeated, list(accumulate(numbers))[:-1])
    return [replace(item, repeated=part) for item, part in zip(items, parts, strict=True)]


def trim(sample: list[Sampled], limit_bytes: int) -> list[Sampled]:
    """Keeps the documents lowest in order until `limit_bytes` are reached; the last one may go over."""
    kept: list[Sampled] = []
    size = 0
    for candidate in sorted(sample, key=lambda s: s.order):
        if size >= limit_bytes:
            break
        kept.append(candidate)
        size += candidate.num_bytes
    return kept


def training_texts(sample: list[Sampled], cut: int, limit_bytes: int) -> Iterator[str]:
    """Yields the sampled documents of the training split in hash order, the last one cut to the limit."""
    left = limit_bytes
    for document in sorted(sample, key=lambda s: s.order):
        if document.split < cut:
            continue
        if document.num_bytes >= left:
            yield document.text.encode("utf-8")[:left].decode("utf-8", "ignore")
            return
        left -= document.num_bytes
        yield document.text


def _reason(error: DataError) -> str:
    return f"{error.value} (rule: {error.rule})"

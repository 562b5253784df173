"""The first pass over the text: everything is read once, so that damage shows before any work is spent.

It finds what must be left out, the lowest split hash, and an even sample of documents to train the tokenizer on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_pipeline.documents import Document, read_documents
from data_pipeline.holdout import HASH_RANGE, sample_hash, split_hash
from data_pipeline.listing import InputFile
from moe_dist.errors import DataError


@dataclass(frozen=True)
class WorkItem:
    """Files that are read and written together; `index` gives their place in the order of all text."""

    index: int
    files: tuple[InputFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Sampled:
    """A document that may serve to train the tokenizer, with its hashes for order and split."""

    order: int
    split: int
    text: str
    num_bytes: int


@dataclass
class Survey:
    """What one pass over some files found. `damaged` are ids of files, `skipped` of files and records."""

    documents: int = 0
    empty: int = 0
    lowest_hash: int | None = None
    damaged: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sample: list[Sampled] = field(default_factory=list)


@dataclass(frozen=True)
class Surveyor:
    """Surveys work items; small and picklable, to be sent to other processes.

    Attributes:
        text_field: Field or column that holds the text of a record.
        skip_unreadable: List what cannot be read in place of raising it.
        sample_bytes: Text that is wanted for the tokenizer; 0 for none.
        total_bytes: Size of the whole input, to judge which share of it to sample.
    """

    text_field: str
    skip_unreadable: bool
    sample_bytes: int
    total_bytes: int

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
        found = Survey()
        try:
            for document in read_documents(file, self.text_field):
                self._add(found, document)
        except DataError as error:
            if not self.skip_unreadable:
                raise
            return Survey(damaged={file.id}, skipped=[(file.id, _reason(error))])
        found.sample = trim(found.sample, self.sample_bytes)
        return found

    def _add(self, found: Survey, document: Document | DataError) -> None:
        if isinstance(document, DataError):
            if not self.skip_unreadable:
                raise document
            found.skipped.append((document.where, _reason(document)))
        elif not document.text:
            found.empty += 1
        else:
            place = split_hash(document.id)
            found.documents += 1
            found.lowest_hash = place if found.lowest_hash is None else min(place, found.lowest_hash)
            found.sample.append(Sampled(sample_hash(document.id), place, document.text, document.num_bytes))
            if len(found.sample) % 256 == 0:
                found.sample = trim(found.sample, self.sample_bytes)


def plan_items(files: Iterable[InputFile], shard_bytes: int) -> list[WorkItem]:
    """Groups the listing, in order: plain files up to `shard_bytes`, each file of records on its own."""
    groups: list[list[InputFile]] = []
    room = -1
    for file in files:
        if file.kind != "plain" or file.size_bytes > room:
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
    total.sample.sort(key=lambda s: s.order)
    return total


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

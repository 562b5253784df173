"""The first pass over the text: everything is read once, so that damage shows before any work is spent.

It finds what must be left out, the lowest split hash, and an even sample of documents to train the tokenizer on. Here
and in the second pass documents are cleaned alike, and what cleaning removes counts for nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.clean import Cleaner
from data_pipeline.contamination import Decontaminator, Leak
from data_pipeline.dedup import PRINT_BYTES, document_print
from data_pipeline.documents import Document, read_documents
from data_pipeline.examples import MOST_EXAMPLES, cut_short
from data_pipeline.holdout import HASH_RANGE, sample_hash, split_hash
from data_pipeline.listing import InputFile
from data_pipeline.minhash import Signer
from data_pipeline.shingles import BATCH_CHARACTERS
from data_pipeline.tally import Tally, source_of
from moe_dist.errors import DataError, StorageError


@dataclass(frozen=True)
class WorkItem:
    """Files that are read and written together.

    Attributes:
        index: Their place in the order of all text.
        files: The files.
        repeated: Which of their documents that cleaning leaves go all the same (leaks, copies); None leaves out none.
        first: Number in the whole input of the first of these documents, where `repeated` is known.
        noted: Numbers in the item of documents that may be shown as examples.
    """

    index: int
    files: tuple[InputFile, ...]
    repeated: NDArray[np.bool_] | None = field(default=None, compare=False)
    first: int = 0
    noted: tuple[int, ...] = ()

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
        signatures: The MinHash signature of each of them, where near-duplicates are looked for.
        leaked: For each of them 1 where it shares a run with evaluation text, else 0, where such are looked for.
        leaked_by: How many share one with which file of evaluation text.
        leaks: (hash for order, id, file of evaluation text, shared run) of some that do, the lowest hashes first.
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
    signatures: bytearray = field(default_factory=bytearray)
    leaked: bytearray = field(default_factory=bytearray)
    leaked_by: Counter[str] = field(default_factory=Counter)
    leaks: list[tuple[int, str, str, str]] = field(default_factory=list)
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
        signer: Leaves a signature of each document; None leaves none.
        decontaminator: Finds documents that share text with evaluation text; None finds none.
    """

    text_field: str
    skip_unreadable: bool
    sample_bytes: int
    total_bytes: int
    cleaner: Cleaner = field(default_factory=Cleaner)
    finds_duplicates: bool = False
    signer: Signer | None = None
    decontaminator: Decontaminator | None = None

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
        batch: list[Document] = []
        size = 0
        try:
            for document in read_documents(file, file.text_field or self.text_field):
                cleaned = self._cleaned(found, document, source)
                if cleaned is not None:
                    batch.append(cleaned)
                    size += len(cleaned.text)
                if size >= BATCH_CHARACTERS:
                    self._add_kept(found, batch, source)
                    batch, size = [], 0
        except DataError as error:
            if not self.skip_unreadable or isinstance(error, StorageError):
                raise
            return Survey(damaged={file.id}, skipped=[(file.id, _reason(error))])
        self._add_kept(found, batch, source)
        found.sample = trim(found.sample, self.sample_bytes)
        found.sources = [(source, len(found.prints) // PRINT_BYTES)]
        return found

    def _cleaned(self, found: Survey, document: Document | DataError, source: str) -> Document | None:
        """The document as cleaning leaves it; counts what becomes of it otherwise."""
        if isinstance(document, DataError):
            if not self.skip_unreadable:
                raise document
            found.skipped.append((document.where, _reason(document)))
            return None
        if not document.text:
            found.empty += 1
            return None
        cleaned = self.cleaner(document)
        found.tally.add(source, cleaned.changed_by, cleaned.removed_by)
        return cleaned.document

    def _add_kept(self, found: Survey, batch: list[Document], source: str) -> None:
        """Adds documents that cleaning leaves; many at once, for the sake of what looks at their words."""
        texts = [document.text for document in batch]
        leaks = self.decontaminator(texts) if self.decontaminator is not None else [None] * len(batch)
        for document, leak in zip(batch, leaks, strict=True):
            place = split_hash(document.id)
            if self.finds_duplicates:
                found.prints += document_print(document.text, place)
            if leak is None:
                self._add_staying(found, document, place)
            else:
                _add_leak(found, document, leak, source)
        if sum(sampled.num_bytes for sampled in found.sample) > 2 * self.sample_bytes:  # so that sorting stays rare
            found.sample = trim(found.sample, self.sample_bytes)
        if self.signer is not None:
            found.signatures += self.signer(texts).tobytes()
        if self.decontaminator is not None:
            found.leaked += bytes(leak is not None for leak in leaks)

    def _add_staying(self, found: Survey, document: Document, place: int) -> None:
        found.documents += 1
        found.lowest_hash = place if found.lowest_hash is None else min(place, found.lowest_hash)
        found.sample.append(Sampled(sample_hash(document.id), place, document.text, document.num_bytes))


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
        total.signatures += part.signatures
        total.leaked += part.leaked
        total.leaked_by.update(part.leaked_by)
        total.leaks += part.leaks
        total.sources += part.sources
    total.sample.sort(key=lambda s: s.order)
    total.leaks = sorted(total.leaks)[:MOST_EXAMPLES]
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


def _add_leak(found: Survey, document: Document, leak: Leak, source: str) -> None:
    found.tally.removed["decontaminated", source] += 1
    found.leaked_by[leak.against] += 1
    row = (sample_hash(document.id), document.id, leak.against, cut_short(leak.text))
    found.leaks = sorted([*found.leaks, row])[:MOST_EXAMPLES]

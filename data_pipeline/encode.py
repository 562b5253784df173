"""The second pass over the text: a work item -> its shards of both splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.clean import Cleaner
from data_pipeline.content import Counts, count_document
from data_pipeline.documents import Document, read_documents
from data_pipeline.examples import NOTED_CHARACTERS, Note
from data_pipeline.holdout import split_hash
from data_pipeline.manifest import TOKENIZER_NAME, Shard
from data_pipeline.shards import ShardWriter
from data_pipeline.survey import WorkItem
from data_pipeline.tally import source_of
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from moe_dist.errors import DataError

_Batch = list[tuple[str, Document]]  # (source, document)
_Encoded = tuple[_Batch, list[NDArray[np.int32]]]
_BATCH_BYTES = 2**20  # text that is encoded at once


@dataclass
class Written:
    """What the second pass made of a work item.

    Attributes:
        shards: The shards of each split.
        content: Counts by source and language, where they are asked for.
        notes: Documents that may be shown.
    """

    shards: dict[str, list[Shard]] = field(default_factory=dict)
    content: Counts = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """Encodes work items; small and picklable, to be sent to other processes.

    Attributes:
        folder: Where the shards go; it holds the tokenizer.
        text_field: Field or column that holds the text of a record.
        skip_unreadable: Leave out records that cannot be read (the survey has listed them).
        cut: Documents whose `split_hash` is below it are held out.
        shard_bytes: A shard is closed when it holds this much text.
        vocab_size: `model.vocab_size`.
        cleaner: Cleans each document, as it did in the survey.
        scratch: Folder for shards that are being written; by default where they go.
        is_stopped: Asked before each batch; where it says yes, the item is given up.
        counts_languages: Count documents, bytes and tokens by source and language.
    """

    folder: Path
    text_field: str
    skip_unreadable: bool
    cut: int
    shard_bytes: int
    vocab_size: int
    cleaner: Cleaner = field(default_factory=Cleaner)
    scratch: Path | None = None
    is_stopped: Callable[[], bool] | None = None
    counts_languages: bool = False

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / TOKENIZER_NAME, self.vocab_size)

    def __call__(self, item: WorkItem) -> Written:
        """Writes the shards of an item; the same bytes in whichever process.

        Raises:
            DataError: A file changed since the survey.
            OSError: A shard cannot be written.
            CancelledError: It was stopped.
        """
        output, written = _ItemShards(self, item), Written()
        try:
            with closing(self._encoded(_batches(self._documents(item, written)))) as batches:
                for batch, encoded in batches:
                    for (source, document), ids in zip(batch, encoded, strict=True):
                        output.add(document, ids)
                        if self.counts_languages:
                            count_document(written.content, source, document.text, (document.num_bytes, len(ids)))
            written.shards = output.close()
            return written
        except BaseException:
            output.discard()
            raise

    def _encoded(self, batches: Iterator[_Batch]) -> Generator[_Encoded, None, None]:
        """Yields each batch with the ids of its documents, end-of-text included.

        The library works without the interpreter's lock: meanwhile this thread reads what comes next, and packs,
        compresses and hashes what is done.
        """
        with ThreadPoolExecutor(1) as pool:
            earlier: tuple[_Batch, Future[list[NDArray[np.int32]]]] | None = None
            for batch in batches:
                if self.is_stopped is not None and self.is_stopped():
                    raise CancelledError
                at_work = (batch, pool.submit(self._tokenizer.encode_documents, [d.text for _, d in batch]))
                if earlier is not None:
                    yield earlier[0], earlier[1].result()
                earlier = at_work
            if earlier is not None:
                yield earlier[0], earlier[1].result()

    def _documents(self, item: WorkItem, written: Written) -> Iterator[tuple[str, Document]]:
        """(source, document) of those that are no copies of an earlier one; notes those that may be shown."""
        if item.repeated is None:
            yield from self._cleaned(item)
            return
        number = 0
        for source, document in self._cleaned(item):
            if number in item.noted:
                written.notes.append((item.first + number, document.id, document.text[:NOTED_CHARACTERS]))
            if number < len(item.repeated) and not item.repeated[number]:
                yield source, document
            number += 1
        if number != len(item.repeated):
            raise DataError(
                item.files[0].id if item.files else f"item {item.index}",
                f"{number} documents where the first pass had {len(item.repeated)}",
                "the input does not change while it is built",
                "build again when nothing writes to data.input",
            )

    def _cleaned(self, item: WorkItem) -> Iterator[tuple[str, Document]]:
        for file in item.files:
            source = source_of(file.id)
            for document in read_documents(file, file.text_field or self.text_field):
                if isinstance(document, Document):
                    kept = self.cleaner(document).document if document.text else None
                    if kept is not None:
                        yield source, kept
                elif not self.skip_unreadable:
                    raise document


class _ItemShards:
    """The shards that one work item is being written to, at most one open per split."""

    def __init__(self, encoder: Encoder, item: WorkItem) -> None:
        self._encoder, self._index, self._source = encoder, item.index, item.source
        self._open: dict[str, ShardWriter] = {}
        self._done: dict[str, list[Shard]] = {"train": [], "heldout": []}

    def add(self, document: Document, ids: NDArray[np.int32]) -> None:
        split = "heldout" if split_hash(document.id) < self._encoder.cut else "train"
        if split not in self._open:
            name = f"{split}-{self._index:06d}-{len(self._done[split]):04d}.arrow"
            encoder = self._encoder
            path = encoder.folder / name
            self._open[split] = ShardWriter(path, encoder.vocab_size, encoder.scratch, self._source)
        self._open[split].add(ids, document.num_bytes)
        if self._open[split].text_bytes >= self._encoder.shard_bytes:
            self._done[split].append(self._open.pop(split).close())

    def close(self) -> dict[str, list[Shard]]:
        for split in list(self._open):
            self._done[split].append(self._open.pop(split).close())
        return self._done

    def discard(self) -> None:
        for writer in self._open.values():
            writer.discard()


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for source, document in documents:
        batch.append((source, document))
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

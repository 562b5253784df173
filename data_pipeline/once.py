"""Work on an item that is done once: its result is recorded in the working folder, and the next try finds it there."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from data_pipeline.encode import Encoder, Written
from data_pipeline.listing import is_unchanged
from data_pipeline.manifest import Shard
from data_pipeline.shards import file_sha256
from data_pipeline.survey import Survey, Surveyor, WorkItem
from data_pipeline.survey_form import SURVEY_FORM, survey_from_bytes, survey_to_bytes
from data_pipeline.work import WorkFolder
from moe_dist.errors import DataError

T = TypeVar("T")
_WRITTEN_FORM = 2  # raised when a record of what was written means something else to the next program


@dataclass(frozen=True)
class Done(Generic[T]):
    """The work on an item.

    Attributes:
        result: What it gave.
        was_there: An earlier run had it done.
        new_tokens: Tokens that were written now.
    """

    result: T
    was_there: bool
    new_tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a stage of a build is.

    Attributes:
        stage: `read evaluation text`, `read text`, `find duplicates`, `train tokenizer` or `write shards`.
        done: Bytes of input done.
        total: Bytes in all.
        found: Bytes of `done` that an earlier run had done.
        tokens: Tokens written by this run.
    """

    stage: str
    done: int
    total: int
    found: int = 0
    tokens: int = 0

    def after(self, size_bytes: int, done: Done[Any]) -> Progress:
        """The progress with one more item."""
        found = self.found + (size_bytes if done.was_there else 0)
        return replace(self, done=self.done + size_bytes, found=found, tokens=self.tokens + done.new_tokens)


@dataclass(frozen=True)
class SurveyOnce:
    """The first pass over an item; small and picklable, to be sent to other processes."""

    surveyor: Surveyor
    work: WorkFolder

    def __call__(self, item: WorkItem) -> Done[Survey]:
        """Surveys the item, or reads what was found in it before.

        Raises:
            DataError: What `Surveyor` raises, or the input changes.
            OSError: The survey cannot be recorded.
        """
        name, basis = f"survey-{item.index:06d}", basis_of(item, SURVEY_FORM)
        kept = self.work.kept(name, basis)
        if kept is not None:
            return Done(survey_from_bytes(kept), True)
        found = self.surveyor(item)
        check_unchanged(item)
        self.work.keep(name, survey_to_bytes(found), basis)
        return Done(found, False)


@dataclass(frozen=True)
class EncodeOnce:
    """The second pass over an item; small and picklable, to be sent to other processes.

    Attributes:
        encoder: Writes its shards into the working folder's build.
        work: The working folder.
        tokenizer_sha256: Hash of the tokenizer that the encoder reads there.
    """

    encoder: Encoder
    work: WorkFolder
    tokenizer_sha256: str

    def __call__(self, item: WorkItem) -> Done[Written]:
        """Writes the item's shards, or finds them written.

        Raises:
            DataError: What `Encoder` raises, or the input changes.
            OSError: A shard cannot be written.
        """
        name = f"shards-{item.index:06d}"
        basis = basis_of(item, _WRITTEN_FORM, self.tokenizer_sha256, self.encoder.cut)
        kept = self.work.kept(name, basis)
        if kept is not None:
            written = written_from_bytes(kept)
            if all(map(self._is_whole, _shards_of(written))):
                return Done(written, True)
        written = self.encoder(item)
        check_unchanged(item)
        self.work.keep(name, written_to_bytes(written), basis)
        return Done(written, False, sum(shard.tokens for shard in _shards_of(written)))

    def _is_whole(self, shard: Shard) -> bool:
        """A power cut may tear what a killed process had written; reading it again is cheap beside making it."""
        try:
            return file_sha256(self.work.build / shard.file) == shard.sha256
        except FileNotFoundError:
            return False


def written_to_bytes(written: Written) -> bytes:
    """The bytes of what was written; equal ones give equal bytes."""
    tree = {
        "shards": {name: [dataclasses.asdict(shard) for shard in rows] for name, rows in written.shards.items()},
        "content": sorted([*key, figure] for key, figure in written.content.items()),
        "notes": written.notes,
    }
    return json.dumps(tree).encode("ascii")


def written_from_bytes(contents: bytes) -> Written:
    """What `written_to_bytes` was given; the hash of the bytes is known to be right."""
    tree = json.loads(contents)
    shards = {split: [Shard(**row) for row in rows] for split, rows in tree["shards"].items()}
    content = Counter({(source, language, measure): n for source, language, measure, n in tree["content"]})
    return Written(shards, content, [(number, id_, text) for number, id_, text in tree["notes"]])


def _shards_of(written: Written) -> list[Shard]:
    return [shard for rows in written.shards.values() for shard in rows]


def basis_of(item: WorkItem, *others: Any) -> bytes:
    """What the result of the work on an item depends on, beside what gives the working folder its name."""
    files = [file.identity for file in item.files]
    repeated = b"" if item.repeated is None else b"repeated" + item.repeated.tobytes()
    return json.dumps([item.index, files, item.first, item.noted, others]).encode("ascii") + repeated


def check_unchanged(item: WorkItem) -> None:
    """The files must still be those that were listed, or the result would be kept under another input's name.

    Raises:
        DataError: One has another size or time.
    """
    for file in item.files:
        if not is_unchanged(file):
            raise DataError(
                file.id,
                "another size or time than when it was listed",
                "the input does not change while it is built",
                "build again when nothing writes to data.input",
            )

"""Work on an item that is done once: its result is recorded in the working folder, and the next try finds it there."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from data_pipeline.encode import Encoder
from data_pipeline.listing import is_unchanged
from data_pipeline.manifest import Shard
from data_pipeline.shards import file_sha256
from data_pipeline.survey import Survey, Surveyor, WorkItem
from data_pipeline.survey_form import SURVEY_FORM, survey_from_bytes, survey_to_bytes
from data_pipeline.work import WorkFolder
from moe_dist.errors import DataError

Shards = dict[str, list[Shard]]
T = TypeVar("T")


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
        stage: `read text`, `train tokenizer` or `write shards`.
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

    def __call__(self, item: WorkItem) -> Done[Shards]:
        """Writes the item's shards, or finds them written.

        Raises:
            DataError: What `Encoder` raises, or the input changes.
            OSError: A shard cannot be written.
        """
        name, basis = f"shards-{item.index:06d}", basis_of(item, self.tokenizer_sha256, self.encoder.cut)
        kept = self.work.kept(name, basis)
        if kept is not None:
            shards = {split: [Shard(**row) for row in rows] for split, rows in json.loads(kept).items()}
            if all(self._is_whole(shard) for rows in shards.values() for shard in rows):
                return Done(shards, True)
        shards = self.encoder(item)
        check_unchanged(item)
        rows = {split: [dataclasses.asdict(shard) for shard in found] for split, found in shards.items()}
        self.work.keep(name, json.dumps(rows).encode("ascii"), basis)
        return Done(shards, False, sum(shard.tokens for found in shards.values() for shard in found))

    def _is_whole(self, shard: Shard) -> bool:
        """A power cut may tear what a killed process had written; reading it again is cheap beside making it."""
        try:
            return file_sha256(self.work.build / shard.file) == shard.sha256
        except FileNotFoundError:
            return False


def basis_of(item: WorkItem, *others: Any) -> bytes:
    """What the result of the work on an item depends on, beside what gives the working folder its name."""
    files = [file.identity for file in item.files]
    repeated = b"" if item.repeated is None else b"repeated" + item.repeated.tobytes()
    return json.dumps([item.index, files, others]).encode("ascii") + repeated


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

"""Raw text -> a folder of shards, in two passes over work items, on Ray or in this process; both write the same bytes.

`<data.dir>/<fingerprint>` appears by one rename when it is whole. Until then the work lies in a folder beside it, from
which a build that was killed goes on (work.py). Builders of the same input share that folder and do not wait for each
other: the first gives the build its name. With Ray on several machines, `data.input` and `data.dir` must be on storage
that all of them see; only the input may be an object store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.account import account_of
from data_pipeline.clean import Cleaner
from data_pipeline.contamination import Decontaminator, Evaluation, list_evaluation, open_decontaminator
from data_pipeline.dedup import PRINT_BYTES
from data_pipeline.encode import Encoder
from data_pipeline.examples import Pair
from data_pipeline.fingerprint import fingerprint, gives_account, made_from, sources_of
from data_pipeline.holdout import holdout_cut
from data_pipeline.leave_out import leave_out
from data_pipeline.lengths import write_lengths
from data_pipeline.listing import Listing, list_data
from data_pipeline.manifest import (
    CLEANED_VERSION,
    FORMAT_VERSION,
    LENGTHS_VERSION,
    MANIFEST_NAME,
    SOURCES_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    read_manifest,
)
from data_pipeline.minhash import Signer
from data_pipeline.once import Done, EncodeOnce, Progress, SurveyOnce
from data_pipeline.survey import (
    Sampled,
    Survey,
    Surveyor,
    WorkItem,
    merge,
    plan_items,
    training_texts,
    trim,
)
from data_pipeline.threads import in_threads
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data_pipeline.work import WorkFolder, sweep, work_folder
from moe_dist.config import Config
from moe_dist.config.data_schema import DataConfig
from moe_dist.errors import DataError

T = TypeVar("T")
_Surveyed = tuple[Survey, list[WorkItem], list[Pair] | None]  # the whole input, the second pass's items, examples
_ITEMS_AT_ONCE = 2  # that are encoded in this process: while one is read or closed, the other keeps the cores busy
_MAX_TASKS = 1000  # Ray tasks of one pass; more items than that share tasks


def build(config: Config, use_ray: bool, progress: Callable[[Progress], None] | None = None) -> Path:
    """Builds the data of a configuration, unless it is there already.

    Args:
        config: `data.*` and `model.vocab_size` are used.
        use_ray: Spread the work over the Ray cluster that the caller has connected to.
        progress: Called at the beginning of each stage and after each work item.

    Returns:
        The folder of the build.

    Raises:
        DataError: The input, the tokenizer or the disk does not allow it, or a split fills no row.
    """
    listing, evaluation = list_data(config.data), list_evaluation(config.data)
    created_from = made_from(config, evaluation)
    folder = Path(config.data.dir) / fingerprint(listing, created_from)
    if not _is_there(folder):
        work, given = work_folder(folder), _given_tokenizer(config)
        run = _Build(config, listing, use_ray, progress or _silent, work, given, evaluation)
        _build_or_find(run, folder, created_from)
    check_rows(read_manifest(folder), config.data.sequence_length_tokens)
    return folder


def find_build(config: Config) -> Path:
    """The folder of a configuration's build, which is there already.

    Raises:
        DataError: It is not there, or the input cannot be listed.
    """
    listing = list_data(config.data)
    name = fingerprint(listing, made_from(config, list_evaluation(config.data)))
    folder = Path(config.data.dir) / name
    if not _is_there(folder):
        rule = "the input and the keys of this configuration were built"
        raise DataError(str(folder), "no such build", rule, "moe-dist data build with the same configuration")
    return folder


def _is_there(folder: Path) -> bool:
    try:
        return (folder / MANIFEST_NAME).is_file()
    except OSError as error:
        fix = "correct its permissions, or set data.dir"
        raise DataError(f"data.dir={folder.parent}", error.strerror, "its builds can be read", fix) from None


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a build.

    Raises:
        DataError: It is missing or is not the one the build was made with.
    """
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME, manifest.tokenizer_size)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        found = f"sha256 {tokenizer.sha256}, not {manifest.tokenizer_sha256}"
        fix = "remove the folder of this build and build again"
        raise DataError(str(folder / TOKENIZER_NAME), found, "the tokenizer is as the manifest says", fix)
    return tokenizer


def check_rows(manifest: Manifest, sequence_length: int) -> None:
    """Each split must fill at least one row.

    Raises:
        DataError: For the smaller split, with the tokens there are and the tokens needed.
    """
    split = min(SPLITS, key=manifest.num_tokens)
    tokens = manifest.num_tokens(split)
    if tokens > sequence_length:
        return
    documents = sum(shard.documents for shard in manifest.splits[split])
    other = "larger" if split == "heldout" else "smaller"
    shorter = f"data.sequence_length_tokens={tokens - 1} or less, " if tokens > 2 else ""
    raise DataError(
        "data.input",
        f"{tokens} tokens in {documents} documents of the {split} split",
        f"a split fills at least one row: {sequence_length + 1} tokens with "
        f"data.sequence_length_tokens={sequence_length}",
        f"more text, {shorter}or a {other} data.holdout_fraction",
    )


def _given_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that the configuration names, proven usable before any work is spent."""
    asked = config.data.tokenizer
    return None if asked.path is None else load_tokenizer(asked.path, config.model.vocab_size, asked.kind)


@dataclass(frozen=True)
class _Build:
    """What the stages of one build share."""

    config: Config
    listing: Listing
    use_ray: bool
    progress: Callable[[Progress], None]
    work: WorkFolder
    given: Tokenizer | None  # looked at before any work is spent
    evaluation: Evaluation | None
    stop: threading.Event = field(default_factory=threading.Event)  # set when the plain path gives up

    def decontaminator(self) -> Decontaminator | None:
        """What finds evaluation text, where it is looked for."""
        if self.evaluation is None:
            return None
        step = Progress("read evaluation text", 0, self.evaluation.size_bytes)
        self.progress(step)
        found = open_decontaminator(self.evaluation, self.work)
        self.progress(replace(step, done=step.total))
        return found

    def survey(self, items: list[WorkItem], decontaminator: Decontaminator | None) -> _Surveyed:
        """First pass; finds what is unreadable before any work is spent, and what the second pass leaves out."""
        data, signer = self.data, self.signer
        wanted = 0 if self.given else data.tokenizer.train_bytes
        finds = data.dedup.exact or signer is not None or decontaminator is not None
        looks = (self.cleaner, finds, signer, decontaminator)
        surveyor = Surveyor(data.text_field, self._skips, wanted, self.listing.size_bytes, *looks)
        parts: dict[int, Survey] = {}
        sample: list[Sampled] = []
        for index, part in self.run("read text", SurveyOnce(surveyor, self.work), items):
            sample = trim(sample + part.sample, 2 * wanted)
            part.sample = []
            parts[index] = part
        numbers = [len(parts[index].prints) // PRINT_BYTES for index in sorted(parts)]
        found, pairs = merge(parts[index] for index in sorted(parts)), list[Pair]()
        found.sample = sample
        parts.clear()  # their prints and signatures are in the whole survey
        if finds:
            step = Progress("find duplicates", 0, self.listing.size_bytes)
            self.progress(step)
            items, pairs = leave_out(found, items, numbers, data.dedup)
            self.progress(replace(step, done=step.total))
        items = [replace(i, files=tuple(f for f in i.files if f.id not in found.damaged)) for i in items]
        return found, items, pairs if signer is not None else None

    def tokenizer(self, found: Survey, cut: int) -> Tokenizer:
        """The given tokenizer, or one trained on the sample's training documents."""
        if self.given is not None:
            return self.given
        stage, total, basis = "train tokenizer", self.listing.size_bytes, str(cut).encode("ascii")
        self.progress(Progress(stage, 0, total))
        kept = self.work.kept("tokenizer", basis)
        if kept is not None:
            tokenizer = Tokenizer(kept, "the trained tokenizer")
        else:
            texts = training_texts(found.sample, cut, self.data.tokenizer.train_bytes)
            tokenizer = train_tokenizer(texts, self.config.model.vocab_size)
            self.work.keep("tokenizer", tokenizer.file_bytes, basis)
        self.progress(Progress(stage, total, total, total if kept is not None else 0))
        return tokenizer

    def encode(self, tokenizer: Tokenizer, cut: int) -> EncodeOnce:
        """The second pass's work on one item."""
        data, work = self.data, self.work
        settings = (data.text_field, self._skips, cut, data.shard_bytes, self.config.model.vocab_size)
        is_stopped = None if self.use_ray else self.stop.is_set
        encoder = Encoder(work.build, *settings, self.cleaner, work.scratch, is_stopped, gives_account(data))
        return EncodeOnce(encoder, work, tokenizer.sha256)

    def run(
        self, stage: str, work: Callable[[WorkItem], Done[T]], items: list[WorkItem], at_once: int = 1
    ) -> Iterator[tuple[int, T]]:
        """Does the work on every item; yields (index of the item, result) as they are done.

        Args:
            stage: Its name.
            work: What is done.
            items: All items of the build.
            at_once: Items at work at the same time on the plain path.
        """
        step = Progress(stage, 0, sum(item.size_bytes for item in items))
        self.progress(step)
        results = _on_ray(work, items) if self.use_ray else in_threads(work, items, at_once, self.stop)
        with contextlib.closing(results):
            for index, done in results:
                step = step.after(items[index].size_bytes, done)
                self.progress(step)
                yield index, done.result

    @property
    def data(self) -> DataConfig:
        return self.config.data

    @property
    def cleaner(self) -> Cleaner:
        return Cleaner(self.data.clean)

    @property
    def signer(self) -> Signer | None:
        """What leaves signatures, where near-duplicates are looked for."""
        return None if self.data.dedup.near.similarity is None else Signer(self.data.dedup.near)

    @property
    def _skips(self) -> bool:
        return self.data.unreadable == "skip"


def _build_or_find(run: _Build, folder: Path, created_from: dict[str, Any]) -> None:
    """Builds, unless another builder of the same input is first: then what they share is gone, and its build is there.

    After an error the working folder stays: what is done may serve the next try, and a day later it is swept.
    """
    try:
        _build_beside(run, folder, created_from)
    except (OSError, DataError) as error:
        if not _is_there(folder):
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"data.dir={run.data.dir}",
                error,
                "shards can be written",
                "free space and build again: it goes on from what is done; or set data.dir",
            ) from None
    run.work.remove()


def _build_beside(run: _Build, folder: Path, created_from: dict[str, Any]) -> None:
    """Makes the build in its working folder and gives it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, run.work)
    run.work.open()
    _write(run, folder.name, created_from)
    run.work.publish(folder)


def _write(run: _Build, name: str, created_from: dict[str, Any]) -> None:
    """Writes a whole build into the working folder, the manifest last."""
    decontaminator = run.decontaminator()
    found, items, pairs = run.survey(plan_items(run.listing.files, run.data.shard_bytes), decontaminator)
    _check_documents(run, found)
    cut = holdout_cut(run.data.holdout_fraction, found.lowest_hash)
    tokenizer = run.tokenizer(found, cut)
    run.work.put(TOKENIZER_NAME, tokenizer.file_bytes)
    found.sample.clear()
    results = dict(run.run("write shards", run.encode(tokenizer, cut), items, _ITEMS_AT_ONCE))
    written = [results[index] for index in sorted(results)]
    splits = {split: tuple(shard for part in written for shard in part.shards[split]) for split in SPLITS}
    cleaned, packed = gives_account(run.data), run.data.packing == "best_fit"
    manifest = Manifest(
        version=_version(run.data, cleaned, packed),
        fingerprint=name,
        created_from={**({} if run.data.sources else {"data.input": run.data.input}), **created_from},
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_size=tokenizer.size,
        end_of_text=tokenizer.end_of_text,
        splits=splits,
        empty_documents=found.empty,
        skipped=tuple(found.skipped),
        ignored_endings=run.listing.ignored_endings,
        cleaning=account_of(found, written, pairs, decontaminator) if cleaned else None,
        lengths=write_lengths(run.work.build, splits, tokenizer.end_of_text, run.work.scratch) if packed else None,
        sources=sources_of(run.data, ("input", "license")),
    )
    run.work.finish(manifest)


def _version(data: DataConfig, cleaned: bool, packed: bool) -> int:
    """The earliest version of the format that has what the build needs."""
    if data.sources:
        return SOURCES_VERSION
    return LENGTHS_VERSION if packed else CLEANED_VERSION if cleaned else FORMAT_VERSION


def _check_documents(run: _Build, found: Survey) -> None:
    if found.documents >= 2:
        return
    removed = sum(found.tally.removed.values())
    more = f", {found.empty} empty ones and {len(found.skipped)} unreadable ones"
    more += f"; {removed} were removed by data.clean, data.dedup or data.decontaminate" if removed else ""
    raise DataError(
        f"data.input={run.data.input}" if not run.data.sources else "data.sources",
        f"{found.documents} documents with text{more}",
        "there are at least two documents, one to train on and one to hold out",
        "more files or records (a plain file above 256 KiB counts as several documents)",
    )


def _on_ray(work: Callable[[WorkItem], Any], items: list[WorkItem]) -> Generator[tuple[int, Any], None, None]:
    """Runs tasks, at most one per CPU; an error comes back as a value, since a raising record would fail Ray's job."""
    import ray
    import ray.data

    assert ray.is_initialized(), "the caller connects to Ray before it builds on it"

    def task(batch: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray has one task on each CPU already
        return {"result": [pickle.dumps(_outcome(work, pickle.loads(item))) for item in batch["item"]]}  # noqa: S301 - our own

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    with _quiet(ray.data):
        rows = [{"item": pickle.dumps(item)} for item in items]
        source = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_TASKS))
        for row in source.map_batches(task, batch_size=None, num_cpus=1, concurrency=cpus).iter_rows():
            index, result = pickle.loads(row["result"])  # noqa: S301 - our own task wrote it
            if isinstance(result, Exception):
                raise result
            yield index, result


def _outcome(work: Callable[[WorkItem], Any], item: WorkItem) -> tuple[int, Any]:
    try:
        return item.index, work(item)
    except (DataError, OSError) as error:
        return item.index, error


@contextlib.contextmanager
def _quiet(data: Any) -> Iterator[None]:
    """Ray Data without its own progress bars and reports of each run."""
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


def _silent(step: Progress) -> None:
    del step

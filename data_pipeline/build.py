"""Raw text -> a folder of shards, in two passes over work items, on Ray or in this process; both write the same bytes.

`<data.dir>/<fingerprint>` appears by one rename when it is whole. Builders of the same input do not wait for each
other: each writes a private folder beside it, and all but the first throw theirs away. With Ray on several machines,
`data.input` and `data.dir` must be on storage that all of them see.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.clean import Cleaner
from data_pipeline.contamination import RUNS_NAME, Decontaminator, evaluation_created_from, open_decontaminator
from data_pipeline.content import add_up, content_tree
from data_pipeline.dedup import PRINT_BYTES
from data_pipeline.encode import Encoder, Written
from data_pipeline.examples import Pair, choose_pairs, leak_examples, pair_examples
from data_pipeline.holdout import holdout_cut
from data_pipeline.listing import Listing, list_input
from data_pipeline.manifest import (
    CLEANED_VERSION,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    fsync_folder,
    read_manifest,
    write_manifest,
)
from data_pipeline.minhash import Signer
from data_pipeline.shingles import SHINGLES_VERSION
from data_pipeline.survey import (
    Sampled,
    Survey,
    Surveyor,
    WorkItem,
    mark_repeated,
    merge,
    plan_items,
    take_out_repeated,
    training_texts,
    trim,
)
from data_pipeline.tally import OTHER_SOURCES
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moe_dist.config import Config
from moe_dist.config.schema import DataConfig, NearDuplicateConfig
from moe_dist.errors import DataError

Progress = Callable[[str, int, int], None]
_STALE_SECONDS = 24 * 3600
_MAX_TASKS = 1000  # Ray tasks of one pass; more items than that share tasks


def build(config: Config, use_ray: bool, progress: Progress | None = None) -> Path:
    """Builds the data of a configuration, unless it is there already.

    Args:
        config: `data.*` and `model.vocab_size` are used.
        use_ray: Spread the work over the Ray cluster that the caller has connected to.
        progress: Called with (stage, bytes of input done, bytes in all) for the stages `read text`, `train tokenizer`
            and `write shards`.

    Returns:
        The folder of the build.

    Raises:
        DataError: The input, the tokenizer or the disk does not allow it, or a split fills no row.
    """
    listing = list_input(config.data.input, config.data.suffixes)
    created_from = _created_from(config)
    name = fingerprint(listing, created_from)
    folder = Path(config.data.dir) / name
    if not (folder / MANIFEST_NAME).is_file():
        run = _Build(config, listing, use_ray, progress or _silent)
        try:
            _build_beside(run, folder, created_from)
        except OSError as error:
            raise DataError(
                f"data.dir={config.data.dir}", error, "shards can be written", "free space, or set data.dir"
            ) from None
    check_rows(read_manifest(folder), config.data.sequence_length_tokens)
    return folder


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


def fingerprint(listing: Listing, created_from: dict[str, Any]) -> str:
    """Name of a build: hash of the format, the files' ids, sizes and times, and the configuration that matters."""
    files = [[file.id, file.size_bytes, file.mtime_ns] for file in listing.files]
    tree = {"version": FORMAT_VERSION, "files": files, "config": created_from}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8")).hexdigest()[:20]


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


def _created_from(config: Config) -> dict[str, Any]:
    """The configuration that decides the bytes of a build. Cleaning that is off leaves no trace: names stay."""
    data = config.data
    given = None
    if data.tokenizer.path is not None:
        given = load_tokenizer(data.tokenizer.path, config.model.vocab_size).sha256
    return {
        "data.suffixes": list(data.suffixes),
        "data.text_field": data.text_field,
        "data.unreadable": data.unreadable,
        "data.holdout_fraction": data.holdout_fraction,
        "data.shard_bytes": data.shard_bytes,
        "data.tokenizer.sha256": given,
        "data.tokenizer.train_bytes": data.tokenizer.train_bytes if given is None else None,
        "model.vocab_size": config.model.vocab_size,
        **Cleaner(data.clean).created_from,
        **({"data.dedup.exact": True} if data.dedup.exact else {}),
        **_near_created_from(data.dedup.near),
        **evaluation_created_from(data),
        **({"data.count_languages": True} if data.count_languages and not _cleans(data) else {}),
    }


def _cleans(data: DataConfig) -> bool:
    """Whether documents may be changed or left out, of which the manifest then gives an account."""
    dedup = data.dedup.exact or data.dedup.near.similarity is not None
    return Cleaner(data.clean).is_on or dedup or bool(data.decontaminate.against)


def _near_created_from(near: NearDuplicateConfig) -> dict[str, Any]:
    if near.similarity is None:
        return {}
    return {"data.dedup.near": near.model_dump(), "data.dedup.near.version": list(SHINGLES_VERSION)}


class _Build:
    """What the stages of one build share."""

    def __init__(self, config: Config, listing: Listing, use_ray: bool, progress: Progress) -> None:
        self.config, self.data, self.listing = config, config.data, listing
        self.use_ray, self.progress = use_ray, progress
        self.cleaner = Cleaner(config.data.clean)
        self.signer = None if self.data.dedup.near.similarity is None else Signer(self.data.dedup.near)
        self.decontaminator: Decontaminator | None = None
        self.pairs: list[Pair] = []

    def survey(self, items: list[WorkItem]) -> tuple[Survey, list[WorkItem]]:
        """First pass; finds what is unreadable before any work is spent. Returns the items of the second pass too."""
        wanted = 0 if self.data.tokenizer.path else self.data.tokenizer.train_bytes
        total_bytes = self.listing.size_bytes
        finds = self.data.dedup.exact or self.signer is not None or self.decontaminator is not None
        looks = (self.cleaner, finds, self.signer, self.decontaminator)
        surveyor = Surveyor(self.data.text_field, self._skips, wanted, total_bytes, *looks)
        parts: dict[int, Survey] = {}
        sample: list[Sampled] = []
        for index, part in self.run("read text", surveyor, items):
            sample = trim(sample + part.sample, 2 * wanted)
            part.sample = []
            parts[index] = part
        found = merge(parts[index] for index in sorted(parts))
        found.sample = sample
        if finds:
            numbers = [len(parts[index].prints) // PRINT_BYTES for index in sorted(parts)]
            repeated, near = take_out_repeated(found, self.data.dedup)
            self.pairs = choose_pairs(near) if near is not None else []
            noted = (number for gone, kept, _ in self.pairs for number in (gone, kept))
            items = mark_repeated(items, numbers, repeated, noted)
        return found, [replace(i, files=tuple(f for f in i.files if f.id not in found.damaged)) for i in items]

    def tokenizer(self, found: Survey, cut: int) -> Tokenizer:
        """The given tokenizer, or one trained on the sample's training documents."""
        if self.data.tokenizer.path:
            return load_tokenizer(self.data.tokenizer.path, self.config.model.vocab_size)
        total = self.listing.size_bytes
        self.progress("train tokenizer", 0, total)
        texts = training_texts(found.sample, cut, self.data.tokenizer.train_bytes)
        tokenizer = train_tokenizer(texts, self.config.model.vocab_size)
        self.progress("train tokenizer", total, total)
        return tokenizer

    def encoder(self, folder: Path, cut: int) -> Encoder:
        """The second pass's work on one item."""
        data = self.data
        vocab_size = self.config.model.vocab_size
        settings = (data.text_field, self._skips, cut, data.shard_bytes, vocab_size, self.cleaner)
        return Encoder(folder, *settings, self.reports)

    def account(self, found: Survey, written: list[Written]) -> dict[str, Any]:
        """What was changed and left out, and what is there, as the manifest has it."""
        named, contents = found.tally.named_sources(), add_up(part.content for part in written)
        tree = {**found.tally.tree(), "content": content_tree(contents, named, OTHER_SOURCES)}
        if self.signer is not None:
            notes = {number: (id_, text) for part in written for number, id_, text in part.notes}
            tree["near_duplicates"] = pair_examples(self.pairs, notes)
        if self.decontaminator is not None:
            tree["decontaminated"] = leak_examples(found.leaks)
            tree["evaluation"] = self.decontaminator.figures
        return tree

    def run(self, stage: str, work: Callable[[WorkItem], Any], items: list[WorkItem]) -> Iterator[tuple[int, Any]]:
        """Does the work on every item; yields (index of the item, result) as they are done."""
        total, done = sum(item.size_bytes for item in items), 0
        self.progress(stage, 0, total)
        for index, result in _on_ray(work, items) if self.use_ray else _here(work, items):
            done += items[index].size_bytes
            self.progress(stage, done, total)
            yield index, result

    @property
    def reports(self) -> bool:
        """Whether the manifest has an account of what was left out and what is there."""
        return _cleans(self.data) or self.data.count_languages

    @property
    def _skips(self) -> bool:
        return self.data.unreadable == "skip"


def _build_beside(run: _Build, folder: Path, created_from: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    private = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
    private.mkdir()
    try:
        _write(run, private.absolute(), folder.name, created_from)
        _publish(private, folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _write(run: _Build, folder: Path, name: str, created_from: dict[str, Any]) -> None:
    """Writes a whole build into a private folder, the manifest last."""
    if run.data.decontaminate.against:
        run.decontaminator = open_decontaminator(run.data, folder / RUNS_NAME)
    found, items = run.survey(plan_items(run.listing.files, run.data.shard_bytes))
    _check_documents(run, found)
    cut = holdout_cut(run.data.holdout_fraction, found.lowest_hash)
    tokenizer = run.tokenizer(found, cut)
    tokenizer.save(folder / TOKENIZER_NAME)
    found.sample.clear()
    results = dict(run.run("write shards", run.encoder(folder, cut), items))
    written: list[Written] = [results[index] for index in sorted(results)]
    for leftover in folder.glob(".*"):
        leftover.unlink()
    manifest = Manifest(
        version=CLEANED_VERSION if run.reports else FORMAT_VERSION,
        fingerprint=name,
        created_from={"data.input": run.data.input, **created_from},
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_size=tokenizer.size,
        end_of_text=tokenizer.end_of_text,
        splits={split: tuple(shard for part in written for shard in part.shards[split]) for split in SPLITS},
        empty_documents=found.empty,
        skipped=tuple(found.skipped),
        ignored_endings=run.listing.ignored_endings,
        cleaning=run.account(found, written) if run.reports else None,
    )
    write_manifest(folder, manifest)


def _check_documents(run: _Build, found: Survey) -> None:
    if found.documents >= 2:
        return
    removed = sum(found.tally.removed.values())
    more = f", {found.empty} empty ones and {len(found.skipped)} unreadable ones"
    more += f"; {removed} were removed by data.clean, data.dedup or data.decontaminate" if removed else ""
    raise DataError(
        f"data.input={run.data.input}",
        f"{found.documents} documents with text{more}",
        "there are at least two documents, one to train on and one to hold out",
        "more files or records (a plain file above 256 KiB counts as several documents)",
    )


def _publish(private: Path, folder: Path) -> None:
    """Gives the build its name. Who comes second keeps the first one's; a folder without manifest is moved away."""
    try:
        os.rename(private, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if (folder / MANIFEST_NAME).is_file():
            return
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(private, folder)
    fsync_folder(folder.parent)


def _sweep(parent: Path) -> None:
    """Removes what builders that were killed left behind, once it is a day old."""
    for left in parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _here(work: Callable[[WorkItem], Any], items: list[WorkItem]) -> Iterator[tuple[int, Any]]:
    for item in items:
        yield item.index, work(item)


def _on_ray(work: Callable[[WorkItem], Any], items: list[WorkItem]) -> Iterator[tuple[int, Any]]:
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


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total

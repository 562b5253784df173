"""The examples that docs/data.md works out by hand, against the code: a page that says otherwise fails here."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zstandard

from data_pipeline.build import build, open_tokenizer
from data_pipeline.lengths import write_lengths
from data_pipeline.loader import BatchLoader, TrainingRows
from data_pipeline.manifest import LENGTHS_VERSION, Manifest, Shard, write_manifest
from data_pipeline.mixture import Stage, each_once
from data_pipeline.packing import PADDING, PackedSplit
from data_pipeline.run_order import RunOrder
from data_pipeline.shards import ShardWriter, TokenSplit
from data_pipeline.shingles import shingles_of
from moe_dist.config import parse_config
from moe_dist.model.places import document_positions

LINES = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
PAGE = re.sub(r"\s+", " ", " ".join(LINES))
LENGTH = 65_536


def says(text: str) -> None:
    assert text in PAGE, f"docs/data.md does not say: {text}"


def spelled(numbers: np.ndarray) -> str:
    return " ".join(map(str, numbers.tolist()))


def in_table(name: str) -> str:
    """What an indented line of the page says after its name."""
    (line,) = [line for line in LINES if line.startswith(f"    {name}  ")]
    return " ".join(line.removeprefix(f"    {name}").split())


def write_build(folder: Path, shards: list[list[np.ndarray]], vocab_size: int, end_of_text: int) -> None:
    """A build whose shards hold these documents."""
    rows: list[Shard] = []
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder / f"train-{number}.arrow", vocab_size)
        for document in documents:
            writer.add(document.astype(np.int32), 1)
        rows.append(writer.close())
    splits = {"train": tuple(rows), "heldout": ()}
    lengths = write_lengths(folder, splits, end_of_text, folder)
    made = Manifest(LENGTHS_VERSION, "f", {}, "", vocab_size, end_of_text, splits, 0, (), {}, None, lengths)
    write_manifest(folder, made)


def ten_rows(split: object, quarantine: bool = False) -> TrainingRows:
    rows = {"a": 10}
    order = RunOrder(1, rows, each_once(rows), LENGTH, 2 * 4 * LENGTH)
    return TrainingRows({"a": split}, order, quarantine)  # type: ignore[dict-item]


def indented(first: str) -> str:
    """The block of the page that begins with this line."""
    start = LINES.index(f"    {first}")
    stop = next(place for place in range(start, len(LINES)) if LINES[place] and not LINES[place].startswith("    "))
    return textwrap.dedent("\n".join(LINES[start:stop])).rstrip() + "\n"


def test_program_of_the_page_reads_a_build_and_rows_are_as_worked_out(tmp_path: Path) -> None:
    letters = [np.array(document) for document in ([1, 2, 0], [3, 0], [3, 1, 2, 0])]
    write_build(tmp_path, [letters[:2], letters[2:]], 4, 0)
    program: dict[str, Any] = {}
    exec(indented("import hashlib, json, pyarrow"), program)  # noqa: S102 - the page's own example
    stream = np.concatenate(list(program["read"](tmp_path, "train")))
    assert np.array_equal(stream, np.concatenate(letters)) and stream.dtype == np.uint16
    one, two, three, four = map(spelled, np.concatenate(list(TokenSplit(tmp_path, "train").all_rows(2))))
    says(
        f"are the stream {spelled(stream)}, nine tokens. Rows of two tokens are {one}, then {two}, {three} and {four}:"
    )


def test_files_of_minimind_become_the_text_of_the_page(tmp_path: Path) -> None:
    turns = json.loads(re.findall(r"By hand, `(\[.*?\])` is", PAGE)[0])
    text = indented("<|im_start|>user")
    records = {"text": {"text": "plain " * 50}, "conversations": {"conversations": turns * 3}}
    records["chosen"] = {"chosen": turns * 2, "rejected": turns}
    sources = {}
    for name, record in records.items():
        lines = "\n".join(json.dumps(record) for _ in range(30)).encode()
        path = tmp_path / f"{name}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
        sources[name] = {"input": str(path), "text_field": name}
    data = {"sources": sources, "dir": str(tmp_path / "out"), "sequence_length_tokens": 16, "holdout_fraction": 0.2}
    built = build(parse_config({"data": data, "model": {"vocab_size": 300}}), use_ray=False)
    tokenizer = open_tokenizer(built)
    for name, wanted in (("text", "plain " * 50), ("conversations", text * 3), ("chosen", text * 2)):
        split = TokenSplit(built, "train", source=name)
        documents = tokenizer.decode(split.tokens(0, split.num_tokens).tolist()).split("<|endoftext|>")
        assert set(documents) == {wanted, ""} and len(documents) > 10


def test_order_of_ten_rows_is_as_worked_out() -> None:
    numbers = SimpleNamespace(row=lambda i, length: np.full(length + 1, i), content_sha256="")
    training = ten_rows(numbers)
    order = training.order.locate_range(0, 20)[1]
    says(
        f"the first window has rows 4 to 9, shuffled {spelled(order[:6])}, and the second {{0..3}}, as "
        f"{spelled(order[6:10])}; epoch 1 is {spelled(order[10:16])}, then {spelled(order[16:])}."
    )
    assert sorted(order[:6]) == [4, 5, 6, 7, 8, 9]
    ranks = [BatchLoader(training, 4, rank, 2) for rank in range(2)]
    first, second = (next(rank).rows[:, 0] for rank in ranks)
    whole = BatchLoader(training, 4)
    steps = [next(whole).rows[:, 0] for _ in range(3)]
    says(
        f"step 0 gives rank 0 rows {spelled(first)} and rank 1 rows {spelled(second)}; on one rank {spelled(steps[0])};"
    )
    says(f"which are rows {spelled(steps[2][:2])} and the first two of epoch 1, {spelled(steps[2][2:])}.")


def test_rows_left_empty_for_a_shard_are_as_worked_out(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(1, 100, 10 * LENGTH + 1)
    stream[[4 * LENGTH - 1, 8 * LENGTH - 1, -1]] = 0
    write_build(tmp_path, [[part] for part in np.split(stream, [4 * LENGTH, 8 * LENGTH])], 100, 0)
    (tmp_path / "train-1.arrow").unlink()
    training = ten_rows(TokenSplit(tmp_path, "train", defers=True), quarantine=True)
    batch = training.batch(0, 10)
    assert sorted(row.row for row in batch.left_out) == [3, 4, 5, 6, 7]
    empty = (batch.rows == PADDING).all(axis=1).tolist()
    numbers = training.order.locate_range(0, 4)[1].tolist()
    shown = ["empty" if is_empty else str(number) for number, is_empty in zip(numbers, empty, strict=False)]
    says(f"rows 4 to 7 are empty, and row 3, whose last target is token 262,144; step 0 is {', '.join(shown)}.")


def test_counts_of_a_mixture_are_as_worked_out() -> None:
    def periods(*weights: int) -> list[str]:
        ends = np.array([Stage(weights, None).counts(4096 * number) for number in range(4)])
        return [f"{code:,} and {prose:,}" for code, prose in np.diff(ends, axis=0)]

    assert len(set(periods(3, 1))) == 1
    says(f"weights code 3 and prose 1 give {periods(3, 1)[0]} samples of each period;")
    one, two, three = periods(2, 1)
    says(f"with code 2, prose 1 it is {one} of the first, {two} of the second, {three} of the third.")


def test_best_fit_rows_and_positions_are_as_worked_out(tmp_path: Path) -> None:
    stream = in_table("stream").split()
    names = [".", *dict.fromkeys(name for name in [*stream, "e1", "e2"] if name != ".")]
    documents: list[list[int]] = [[]]
    for name in stream:
        documents[-1].append(names.index(name))
        if name == ".":
            documents.append([])
    shards = [[np.array(document) for document in documents[:-1]]]
    shards.append([np.array([names.index("e1"), names.index("e2"), 0])])
    write_build(tmp_path, shards, len(names), 0)
    split = PackedSplit(TokenSplit(tmp_path, "train"))
    rows = [" ".join("-100" if i < 0 else names[i] for i in row) for row in np.concatenate(list(split.all_rows(6)))]
    assert rows == [in_table(name) for name in ("row 0", "row 1", "row 2", "next shard, 3")]

    (text,) = [line.split()[1:] for line in LINES if line.startswith("    row                a b .")]
    ids = torch.tensor([[0 if name == "." else ord(name) for name in text]])
    separate, joined = in_table("position").split(" joined: ")
    assert " ".join(map(str, document_positions(ids, 0)[0].tolist())) == separate
    assert joined == " ".join(map(str, range(len(text))))


def test_similarity_of_two_sentences_and_chances_of_the_table_are_as_worked_out() -> None:
    texts = re.search(r"`(the cat[^`]*)` has .* and `(The cat[^`]*)` \{", PAGE)
    assert texts is not None
    found = shingles_of(list(texts.groups()), 2)
    one, other = (set(part.tolist()) for part in np.split(found.hashes, np.cumsum(found.counts)[:-1]))
    says(f"Three of seven are common: {len(one & other) / len(one | other):.2f}, not a near-duplicate")
    assert (len(one & other), len(one | other)) == (3, 7)
    for name, bands, rows in (
        ("14 bands of 8 rows (default)", 14, 8),
        ("32 bands of 8", 32, 8),
        ("14 bands of 6", 14, 6),
    ):
        (line,) = [
            line for line in LINES if line.startswith(f"| compared with {name}") or line.startswith(f"| with {name} (")
        ]
        cells = [cell.strip().removesuffix(" %") for cell in line.strip("| ").split("|")[1:]]
        for similarity, cell in zip((0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9), cells, strict=True):
            digits = len(cell.partition(".")[2])
            assert float(cell) == round(100 * (1 - (1 - similarity**rows) ** bands), digits), (name, similarity)

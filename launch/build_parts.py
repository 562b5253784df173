"""What a report says of a build, as tables with titles: the terminal and the page show the same ones.

Names and text may be a stranger's. They go into the tables as they are; whoever shows them makes them harmless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | int | float
Row = Sequence[Cell]

_LAST_STEPS = ("decontaminated", "exact_duplicate", "near_duplicate")  # in the order in which they work


@dataclass(frozen=True)
class Part:
    """One table of a report.

    Attributes:
        title: What it shows.
        note: A sentence before it; empty for none.
        names: Of its columns; none where the note says all.
        rows: Its rows, the most important first.
    """

    title: str
    note: str = ""
    names: tuple[str, ...] = ()
    rows: Sequence[Row] = ()


def parts_of(found: Mapping[str, Any]) -> list[Part]:
    """The parts of a report, in order.

    Args:
        found: What `describe_build` gave.
    """
    return [_splits(found), *_account(found["cleaning"]), *_origin(found)]


def _splits(found: Mapping[str, Any]) -> Part:
    keys = ("shards", "documents", "tokens", "text_bytes", "file_bytes")
    rows = [(name, *(row[key] for key in keys)) for name, row in found["splits"].items()]
    note = (
        f"{found['empty_documents']:,} empty documents and {len(found['skipped']):,} files and records that could not "
        "be read were left out."
    )
    return Part("Splits", note, ("split", "shards", "documents", "tokens", "bytes of text", "bytes on disk"), rows)


def _account(cleaning: Mapping[str, Any] | None) -> Iterator[Part]:
    if cleaning is None:
        note = "This build has no account of sources and languages; data.count_languages=true gives it one."
        yield Part("Sources and languages", note)
        return
    content = cleaning.get("content") or {}
    yield _sources(cleaning, content)
    if content:
        yield from _languages(content)
    yield from _steps(cleaning)
    if "near_duplicates" in cleaning:
        yield _near_duplicates(cleaning)
    if "decontaminated" in cleaning:
        yield from _evaluation(cleaning)


def _sources(cleaning: Mapping[str, Any], content: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Part:
    """By source: what came in, what stays, and its tokens where they were counted."""
    documents, kept = cleaning["documents"], cleaning["kept"]
    tokens = {source: sum(row["tokens"] for row in rows.values()) for source, rows in content.items()}
    total = sum(tokens.values())
    note = f"{sum(kept.values()):,} of {sum(documents.values()):,} documents with text stay."
    ranked = sorted(documents, key=lambda source: (-tokens.get(source, 0), -documents[source], source))
    rows = [
        (s, documents[s], kept[s], share(kept[s], documents[s]), tokens.get(s, 0), share(tokens.get(s, 0), total))
        for s in ranked
    ]
    names = ("source", "documents", "kept", "of these", "tokens", "of all tokens")
    return Part("Sources", note, names if content else names[:4], rows if content else [row[:4] for row in rows])


def _languages(content: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[Part]:
    keys = ("documents", "text_bytes", "tokens")
    both: list[Row] = [
        (source, language, *(row[key] for key in keys))
        for source, languages in content.items()
        for language, row in languages.items()
    ]
    sums: dict[str, Counter[str]] = {}
    for languages in content.values():
        for language, row in languages.items():
            sums.setdefault(language, Counter()).update({key: row[key] for key in keys})
    total = sum(found["tokens"] for found in sums.values())
    names = ("documents", "bytes of text", "tokens", "of all tokens")
    alone: list[Row] = [(language, *(sums[language][key] for key in keys)) for language in sums]
    note = "Guessed for each document: English, Chinese, or other, which is also text too odd to tell."
    yield Part("Languages", note, ("language", *names), _ranked(alone, total))
    yield Part("Sources and languages", "", ("source", "language", *names), _ranked(both, total))


def _ranked(rows: Sequence[Row], total: int) -> list[Row]:
    """The rows with most tokens (the last column) first, each with its share."""
    return [(*row, share(int(row[-1]), total)) for row in sorted(rows, key=lambda row: (-int(row[-1]), row))]


def _steps(cleaning: Mapping[str, Any]) -> Iterator[Part]:
    changed, removed = cleaning["changed"], cleaning["removed"]
    total = sum(cleaning["documents"].values())
    steps = sorted(changed.keys() | removed.keys(), key=lambda step: (_place(step), step))
    rows = []
    for step in steps:
        gone = sum(removed.get(step, {}).values())
        rows.append((step, sum(changed.get(step, {}).values()), gone, share(gone, total)))
    note = "" if rows else "Nothing was changed or left out."
    yield Part("What each step changed and left out", note, ("step", "changed", "removed", "of all documents"), rows)
    both = [(step, source, n, share(n, cleaning["documents"].get(source, 0))) for step, source, n in _flat(removed)]
    both.sort(key=lambda row: (_place(row[0]), row[0], -row[2], row[1]))
    if both:
        names = ("step", "source", "removed", "of the source")
        yield Part("What each step left out of each source", "", names, both)


def _place(step: str) -> int:
    return _LAST_STEPS.index(step) if step in _LAST_STEPS else -1


def _flat(counts: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, str, int]]:
    return ((step, source, n) for step, found in counts.items() for source, n in found.items())


def _near_duplicates(cleaning: Mapping[str, Any]) -> Part:
    total = sum(cleaning["removed"].get("near_duplicate", {}).values())
    pairs = cleaning["near_duplicates"]
    note = (
        f"{len(pairs):,} of {total:,}, at even distances from the least to the most similar. Of each text its "
        "beginning, and what surrounds the first difference where that is further on."
    )
    rows = [
        (f"{row['similarity']:.3f}", f"{row['gone']}\n{row['gone_text']}", f"{row['kept']}\n{row['kept_text']}")
        for row in pairs
    ]
    title = "Near-duplicates, the least similar first"
    return Part(title, note if rows else "None was found.", ("similarity", "left out", "kept"), rows)


def _evaluation(cleaning: Mapping[str, Any]) -> Iterator[Part]:
    figures, leaks = cleaning.get("evaluation"), cleaning["decontaminated"]
    if figures is not None:
        note = (
            f"{figures['documents']:,} documents in {figures['files']:,} files; {figures['too_short']:,} of them are "
            "too short to be recognised."
        )
        rows = sorted(figures.get("found_in", {}).items(), key=lambda row: (-row[1], row[0]))
        names = ("file of evaluation text", "documents left out")
        yield Part("Evaluation text", note if rows else f"{note} No document shares text with it.", names, rows)
    if leaks:
        total = sum(cleaning["removed"].get("decontaminated", {}).values())
        note = f"{len(leaks):,} of {total:,}, chosen by a hash."
        shown = [(row["id"], row["against"], " ".join(row["text"].split())) for row in leaks]
        yield Part("Documents with evaluation text", note, ("left out", "found in", "text in common"), shown)


def _origin(found: Mapping[str, Any]) -> Iterator[Part]:
    tokenizer = found["tokenizer"]
    rows: list[Row] = [("build", found["build_dir"])]
    rows += [(key, str(value)) for key, value in found["created_from"].items()]
    rows.append(("tokenizer", f"{tokenizer['size']:,} tokens, sha256 {tokenizer['sha256']}"))
    yield Part("Where it comes from", "", ("key", "value"), rows)
    if found["skipped"]:
        skipped = [(row["where"], row["reason"]) for row in found["skipped"]]
        yield Part("What could not be read", "", ("file or record", "reason"), skipped)
    if found["samples"]:
        samples = [(sample["split"], sample["position"], sample["text"]) for sample in found["samples"]]
        yield Part("Beginnings of documents", "", ("split", "from token", "text"), samples)


def share(part: int, whole: int) -> str:
    """A part of a whole in percent; empty where there is no whole."""
    return f"{part / whole:.1%}" if whole else ""


def is_number(cell: Cell) -> bool:
    """Whether a cell stands best at the right of its column."""
    return isinstance(cell, int | float) or (cell[:1].isdigit() and cell.endswith("%"))

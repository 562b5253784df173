"""A build as one web page: what it holds, what was left out and why, with examples.

The page stands alone: no script, nothing from the network, and a policy that forbids both. Names and text of a build
may be a stranger's, so every cell is escaped where it is written, and lengths and numbers of rows are bounded.
"""

from __future__ import annotations

import html
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.plain_text import printable
from moe_dist.errors import DataError

MARK = "<!-- moe-dist data report -->"
_MOST_ROWS, _MOST_CHARACTERS = 200, 1_000
_HEAD = """<!doctype html>
{mark}
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
h2 {{ margin-top: 2.5rem }} p {{ max-width: 46rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; vertical-align: top }}
td {{ overflow-wrap: anywhere; white-space: pre-wrap }}
td.number, th.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
@media (prefers-color-scheme: dark) {{ body {{ background: #161616; color: #ddd }} th, td {{ border-color: #444 }} }}
</style></head><body>
<h1>{title}</h1>
"""

Cell = str | int | float
Row = Sequence[Cell]


def write_page(found: Mapping[str, Any], path: Path) -> int:
    """Writes the page; an earlier one is replaced, any other file is not.

    Args:
        found: What `describe_build` gave.
        path: Where to.

    Returns:
        Its size in bytes.

    Raises:
        DataError: There is another file, or the place cannot be written.
    """
    contents = page(found).encode("utf-8")
    try:
        if path.exists() and MARK.encode() not in path.read_bytes()[:200]:
            raise DataError(str(path), "another file", "a report replaces only an earlier report", "another --out")
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(str(path), error.strerror, "the report can be written", "another --out") from None
    return len(contents)


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [_HEAD.format(mark=MARK, title=f"Build {_text(found['fingerprint'])}")]
    parts += _splits(found)
    if found["cleaning"] is not None:
        parts += _removed(found["cleaning"])
        parts += _content(found["cleaning"].get("content") or {})
        parts += _examples(found["cleaning"])
    parts += _origin(found)
    return "\n".join([*parts, "</body></html>\n"])


def _splits(found: Mapping[str, Any]) -> Iterable[str]:
    keys = ("shards", "documents", "tokens", "text_bytes", "file_bytes")
    rows = [(name, *(row[key] for key in keys)) for name, row in found["splits"].items()]
    yield _table(("split", "shards", "documents", "tokens", "bytes of text", "bytes on disk"), rows)
    yield _paragraph(
        f"{found['empty_documents']:,} empty documents and {len(found['skipped']):,} files and records that could not "
        "be read were left out."
    )


def _removed(cleaning: Mapping[str, Any]) -> Iterable[str]:
    documents, kept = cleaning["documents"], cleaning["kept"]
    changed, removed = cleaning["changed"], cleaning["removed"]
    total = sum(documents.values())
    yield "<h2>What was changed and left out</h2>"
    yield _paragraph(f"{sum(kept.values()):,} of {total:,} documents with text stay.")
    steps = []
    for step in sorted(changed.keys() | removed.keys()):
        gone = sum(removed.get(step, {}).values())
        steps.append((step, sum(changed.get(step, {}).values()), gone, _share(gone, total)))
    yield _table(("step", "changed", "removed", "of all documents"), steps)
    ranked = sorted(documents, key=lambda source: (kept[source] - documents[source], source))
    rows = [(s, documents[s], kept[s], _share(kept[s], documents[s])) for s in ranked]
    yield _table(("source", "documents", "kept", "of these"), rows)
    by_both = [(step, source, n) for step, counts in removed.items() for source, n in counts.items() if n]
    by_both.sort(key=lambda row: (row[0], -row[2], row[1]))
    yield _table(("step", "source", "removed"), by_both)


def _content(content: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterable[str]:
    if not content:
        return
    rows = [
        (source, language, row["documents"], row["text_bytes"], row["tokens"])
        for source, languages in content.items()
        for language, row in languages.items()
    ]
    total = sum(row[4] for row in rows)
    yield "<h2>What is there, by source and language</h2>"
    yield _paragraph("Languages are guessed: English, Chinese, or other.")
    languages: dict[str, list[int]] = {}
    for _, language, *figures in rows:
        languages[language] = [a + b for a, b in zip(languages.get(language, [0, 0, 0]), figures, strict=True)]
    names = ("documents", "bytes of text", "tokens", "of all tokens")
    yield _table(("language", *names), [(name, *row, _share(row[2], total)) for name, row in sorted(languages.items())])
    rows.sort(key=lambda row: (-row[4], row))
    yield _table(("source", "language", *names), [(*row, _share(row[4], total)) for row in rows])


def _examples(cleaning: Mapping[str, Any]) -> Iterable[str]:
    if "near_duplicates" in cleaning:
        yield "<h2>Examples of near-duplicates</h2>"
        yield _paragraph("At even distances from the least to the most similar; text around the first difference.")
        pairs = cleaning["near_duplicates"]
        rows: list[Row] = [
            (row["similarity"], f"{row['gone']}\n{row['gone_text']}", f"{row['kept']}\n{row['kept_text']}")
            for row in pairs
        ]
        yield _table(("similarity", "left out", "kept"), rows)
    if "decontaminated" in cleaning:
        yield "<h2>Examples of documents with evaluation text</h2>"
        figures = cleaning.get("evaluation")
        if figures is not None:
            yield _paragraph(
                f"{figures['documents']:,} evaluation documents in {figures['files']:,} files; "
                f"{figures['too_short']:,} are too short to be recognised."
            )
        leaks = [(row["id"], row["against"], row["text"]) for row in cleaning["decontaminated"]]
        yield _table(("left out", "found in", "text in common"), leaks)


def _origin(found: Mapping[str, Any]) -> Iterable[str]:
    tokenizer = found["tokenizer"]
    yield "<h2>Where it comes from</h2>"
    rows: list[Row] = [(key, str(value)) for key, value in found["created_from"].items()]
    rows.append(("tokenizer", f"{tokenizer['size']:,} tokens, sha256 {tokenizer['sha256']}"))
    yield _table(("key", "value"), rows)
    if found["skipped"]:
        yield "<h2>What could not be read</h2>"
        yield _table(("file or record", "reason"), [(row["where"], row["reason"]) for row in found["skipped"]])
    if found["samples"]:
        yield "<h2>Beginnings of documents</h2>"
        samples = [(sample["split"], sample["position"], sample["text"]) for sample in found["samples"]]
        yield _table(("split", "from token", "text"), samples)


def _table(names: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return _paragraph("None.")
    numbers = [isinstance(cell, int | float) for cell in rows[0]]
    lines = ["<table><tr>", *(_cell("th", name, number) for name, number in zip(names, numbers, strict=True)), "</tr>"]
    for row in rows[:_MOST_ROWS]:
        lines += ["<tr>", *(_cell("td", cell, number) for cell, number in zip(row, numbers, strict=True)), "</tr>"]
    more = f"and {len(rows) - _MOST_ROWS:,} more, in the manifest" if len(rows) > _MOST_ROWS else ""
    return "".join(lines) + "</table>" + (_paragraph(more) if more else "")


def _cell(tag: str, value: Cell, is_number: bool) -> str:
    shown = f"{value:,}" if isinstance(value, int | float) else value
    return f"<{tag}{' class=number' if is_number else ''}>{_text(shown)}</{tag}>"


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: object) -> str:
    """Any text, cut to a length, as HTML that shows it."""
    return html.escape(printable(str(text)[:_MOST_CHARACTERS]), quote=True)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""

"""The form of `cleaning` in a manifest: what was changed and left out, what is there, and a few examples.

A build may come from a stranger. What shows it to a person relies on these types alone, and escapes all text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.contamination import Decontaminator
from data_pipeline.content import add_up, content_tree
from data_pipeline.encode import Written
from data_pipeline.examples import Pair, leak_examples, pair_examples
from data_pipeline.survey import Survey
from data_pipeline.tally import OTHER_SOURCES

_MOST_FILES = 1_000  # of evaluation text, whose hits are counted apart
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Figures(_Part):
    documents: Count
    text_bytes: Count
    tokens: Count


class _NearDuplicate(_Part):
    gone: str
    kept: str
    similarity: Annotated[float, Field(ge=0, le=1)]
    gone_text: str
    kept_text: str


class _Leak(_Part):
    id: str
    against: str
    text: str


class _Evaluation(_Part):
    files: Count
    documents: Count
    too_short: Count
    runs: Count
    found_in: dict[str, Count] = {}


class _Account(_Part):
    documents: dict[str, Count]
    kept: dict[str, Count]
    changed: dict[str, dict[str, Count]]
    removed: dict[str, dict[str, Count]]
    content: dict[str, dict[str, _Figures]] = {}
    near_duplicates: list[_NearDuplicate] = []
    decontaminated: list[_Leak] = []
    evaluation: _Evaluation | None = None


def account_of(
    found: Survey, written: Sequence[Written], pairs: Sequence[Pair] | None, decontaminator: Decontaminator | None
) -> dict[str, Any]:
    """The account of a build.

    Args:
        found: The survey of the whole input.
        written: What the second pass wrote.
        pairs: Near-duplicates to show; None where none were looked for.
        decontaminator: What found evaluation text; None where none was looked for.
    """
    contents = add_up(part.content for part in written)
    tree = {**found.tally.tree(), "content": content_tree(contents, found.tally.named_sources(), OTHER_SOURCES)}
    if pairs is not None:
        notes = {number: (id_, text) for part in written for number, id_, text in part.notes}
        tree["near_duplicates"] = pair_examples(pairs, notes)
    if decontaminator is not None:
        tree["decontaminated"] = leak_examples(found.leaks)
        found_in = dict(sorted(found.leaked_by.items(), key=lambda row: (-row[1], row[0]))[:_MOST_FILES])
        tree["evaluation"] = {**decontaminator.figures, "found_in": found_in}
    return tree


def problem_of_account(account: Any) -> str:
    """What is wrong with a manifest's `cleaning`; empty where nothing is."""
    if account is None:
        return ""
    try:
        found = _Account.model_validate(account)
    except ValidationError as error:
        first = error.errors()[0]
        return f"cleaning.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return "" if set(found.kept) == set(found.documents) else "cleaning.kept has other sources than cleaning.documents"

"""The form of `cleaning` in a manifest: what was changed and left out, what is there, and a few examples.

A build may come from a stranger. What shows it to a person relies on these types alone, and escapes all text.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class _Account(_Part):
    documents: dict[str, Count]
    kept: dict[str, Count]
    changed: dict[str, dict[str, Count]]
    removed: dict[str, dict[str, Count]]
    content: dict[str, dict[str, _Figures]] = {}
    near_duplicates: list[_NearDuplicate] = []
    decontaminated: list[_Leak] = []
    evaluation: _Evaluation | None = None


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

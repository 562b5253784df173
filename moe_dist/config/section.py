"""What every section of the config tree is made of: the frozen base class, and the declarations of its fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen section of the tree that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def key(default: Any, meaning: str, unit: str = "", **rules: Any) -> Any:
    """Declares a config key: default (`...` means required), meaning, unit and pydantic's own range rules."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


def section(kind: type[Section], meaning: str) -> Any:
    """Declares a nested section that exists even when the file does not mention it."""
    return Field(default_factory=kind, description=meaning)

"""The nearest legal value to one that a key does not take."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_TYPES = ("int_type", "float_type", "bool_type", "string_type", "int_from_float", "finite_number", "tuple_type")


def nearest_value(kind: type[BaseModel], details: ErrorDetails) -> Any:
    """What to write instead: the bound that was passed, the closest word, the same number as the type has it, or the
    default; None where there is nothing to propose."""
    limits = details.get("ctx", {})
    match details["type"]:
        case "greater_than_equal":
            return limits["ge"]
        case "less_than_equal":
            return limits["le"]
        case "greater_than" | "less_than":
            return _default(kind, details["loc"])
        case "literal_error":
            words = re.findall(r"'([^']*)'", limits["expected"])
            return difflib.get_close_matches(str(details["input"]), words, n=1, cutoff=0.0)[0]
        case type_error if type_error in _TYPES:
            return _same_number(details) if type_error.startswith(("int", "float")) else _default(kind, details["loc"])
    return None


def _same_number(details: ErrorDetails) -> float | int | None:
    try:
        number = float(details["input"])
    except (TypeError, ValueError):
        return None
    return number if details["type"] == "float_type" else round(number)


def _default(kind: type[BaseModel], path: tuple[str | int, ...]) -> Any:
    name, *rest = path
    field = kind.model_fields.get(str(name))
    if field is None or (rest and not isinstance(field.annotation, type)):
        return None
    if rest and issubclass(field.annotation, BaseModel):  # type: ignore[arg-type]
        return _default(field.annotation, tuple(rest))  # type: ignore[arg-type]
    default = field.get_default(call_default_factory=False)
    return list(default) if isinstance(default, tuple) else default

"""Every key of the config tree in words, and a checked config as a plain tree."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moe_dist.config.load import closest_key, section_below
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError

_PLAIN_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))


@dataclass(frozen=True)
class KeyRow:
    """One key in words.

    Attributes:
        path: The key path, such as `model.moe.top_k`.
        type: The type in plain words, such as `whole number, or null`.
        unit: What the number counts or measures; empty where there is nothing to say.
        default: The default value as it stands in YAML read as Python (tuples are lists).
        meaning: What the key does.
        allowed: The allowed range or choices; empty where every value of the type is allowed.
    """

    path: str
    type: str
    unit: str
    default: Any
    meaning: str
    allowed: str


@dataclass(frozen=True)
class SectionRow:
    """One section in words: its path and what it is about."""

    path: str
    meaning: str


def key_rows() -> list[KeyRow]:
    """Every key that holds a value, in the order of the tree."""
    return [_key_row(path, field) for path, field in _fields(Config) if section_below(field)[0] is None]


def section_rows() -> list[SectionRow]:
    """Every section, in the order of the tree."""
    return [SectionRow(path, field.description or "") for path, field in _fields(Config) if section_below(field)[0]]


def rows_under(path: str) -> list[KeyRow]:
    """The row of a key, or the rows of all keys in a section and in the sections below it.

    Raises:
        ConfigError: There is no such key or section.
    """
    rows = [row for row in key_rows() if row.path == path or row.path.startswith(f"{path}.")]
    if not rows:
        raise ConfigError(path, path, "unknown key", closest_key(path))
    return rows


def resolved(config: Config) -> dict[str, Any]:
    """The whole config as plain dicts, lists and scalars, for YAML, JSON and `parse_config`."""
    return config.model_dump(mode="json")


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        yield prefix + name, field
        inner, below = section_below(field)
        if inner is not None:
            yield from _fields(inner, f"{prefix}{name}.{below}")


def _key_row(path: str, field: FieldInfo) -> KeyRow:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = "(required)" if field.is_required() else field.default
    default = list(default) if isinstance(default, tuple) else default
    return KeyRow(
        path=path,
        type=_type_in_words(field.annotation),
        unit=str(extra.get("unit", "")),
        default=default,
        meaning=field.description or "",
        allowed=_allowed_in_words(field),
    )


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of a few words"
    if _is_union(kind):
        options = [_type_in_words(option) for option in get_args(kind) if option is not type(None)]
        return " or ".join(options) + ", or null"
    if get_origin(kind) is tuple:
        return f"list of {_type_in_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"{_type_in_words(get_args(kind)[1])} by name"
    return _PLAIN_TYPES[kind]


def _allowed_in_words(field: FieldInfo) -> str:
    choices = [choice for option in _options(field.annotation) for choice in get_args(option)]
    if choices:
        return ", ".join(str(choice) for choice in choices)
    bounds = [
        f"{words} {getattr(rule, name):_}" for rule in field.metadata for name, words in _BOUNDS if hasattr(rule, name)
    ]
    return ", ".join(bounds)


def _options(kind: Any) -> list[Any]:
    options = get_args(kind) if _is_union(kind) else (kind,)
    return [option for option in options if get_origin(option) is Literal]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)

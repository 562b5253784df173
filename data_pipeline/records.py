"""One record -> its document, or what is wrong with it: a line of JSON, or a value of a text column."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_pipeline.conversations import DIALOGUE_FIELDS, text_of_turns
from data_pipeline.streams import MAX_RECORD_BYTES
from moe_dist.errors import DataError

_SKIP = "data.unreadable=skip"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: Relative path; with `:line` (from 1) for a line of .jsonl, `:row` (from 0) for a row of .parquet or of a
            saved dataset, and `:byte` for a piece of a large plain file.
        text: Its text.
        num_bytes: Length of the text in UTF-8.
    """

    id: str
    text: str
    num_bytes: int


def decode_document(id_: str, data: bytes, where: str, offset: int) -> Document:
    """Decodes strictly. `offset` is where `data` begins in `where`, for the message.

    Raises:
        DataError: The bytes are not UTF-8, or hold a NUL.
    """
    fix = f"save it as UTF-8 text, or {_SKIP}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}: {error.reason}"
        raise DataError(where, found, "text is UTF-8", fix) from None
    if "\0" in text:
        at = offset + data.index(b"\0")
        raise DataError(where, f"byte 0x00 at offset {at}", "text has no NUL (UTF-16 and binary files do)", fix)
    return Document(id_, text, len(data))


def parse_line(id_: str, line: bytes, text_field: str) -> Document | DataError:
    """The document of a line of JSON."""
    try:
        record = json.loads(decode_document(id_, line, id_, 0).text)
        return decode_document(id_, _text_of(id_, record, text_field).encode("utf-8"), id_, 0)
    except DataError as error:
        return error
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x} at character {error.start}"
        return DataError(id_, found, "text has no half of a surrogate pair", f"correct it, or {_SKIP}")
    except (ValueError, RecursionError) as error:
        if line.strip() in (b"[", b"]"):
            return _array(id_, "a bracket of an array")
        return DataError(id_, error, "a line is one JSON object", f"correct the line, or {_SKIP}")


def parse_value(id_: str, value: bytes | None, text_field: str) -> Document | DataError:
    """The document of a value of a text column."""
    if value is None:
        return DataError(id_, f"{text_field} is null", "the text column holds strings", f"correct it, or {_SKIP}")
    if len(value) > MAX_RECORD_BYTES:
        rule = f"a record has at most {MAX_RECORD_BYTES:,} bytes"
        return DataError(id_, f"{len(value):,} bytes", rule, f"cut the record, or {_SKIP}")
    try:
        return decode_document(id_, value, id_, 0)
    except DataError as error:
        return error


def missing_field(where: str, text_field: str, names: Iterable[object]) -> DataError:
    """The error for records without the text field."""
    fields = [str(name) for name in names]
    dialogue = next((name for name in DIALOGUE_FIELDS if name in fields), None)
    if dialogue is not None:
        return not_plain_text(where, dialogue)
    near = difflib.get_close_matches(text_field, fields, n=1, cutoff=0.5) or fields[:1]
    fix = f"data.text_field={near[0]}" if near else _SKIP
    return DataError(where, f"fields: {', '.join(fields) or 'none'}", f"there is a field '{text_field}'", fix)


def not_plain_text(where: str, field: str) -> DataError:
    """The error for records of dialogues, which are no text to pretrain on."""
    return DataError(
        where,
        f"{field}: turns of a dialogue",
        "pretraining reads plain text; dialogues are for instruction tuning, which knows who speaks",
        f"keep this file for instruction tuning; of a .jsonl, data.text_field={field} takes the turns as one text; "
        f"or {_SKIP}",
    )


def is_dialogue(field: str) -> bool:
    """Whether a field of this name that is no string holds the turns of a dialogue."""
    return field in DIALOGUE_FIELDS


def _text_of(id_: str, record: Any, text_field: str) -> str:
    if isinstance(record, list):
        raise _array(id_, "an array")
    if not isinstance(record, dict):
        found, fix = type(record).__name__, f"write one object per line, or {_SKIP}"
        raise DataError(id_, found, "a line is one JSON object", fix)
    if text_field not in record:
        raise missing_field(id_, text_field, record)
    text = record[text_field]
    if not isinstance(text, str):
        if is_dialogue(text_field) and isinstance(text, list):
            return text_of_turns(id_, text_field, text, _SKIP)
        found = f"{text_field} is {type(text).__name__}"
        raise DataError(id_, found, "the text field is a string", f"correct it, or {_SKIP}")
    return text


def _array(id_: str, found: str) -> DataError:
    fix = f"write one object per line (jq -c '.[]' FILE), or {_SKIP}"
    return DataError(id_, found, "a line is one JSON object", fix)

"""The turns of a dialogue as one text to pretrain on, where a person asks for it by `data.text_field`.

Each turn is written in ChatML, as MiniMind's template writes it. The marks are plain text here, to a trained tokenizer
too: which of their tokens count, and who speaks, is for instruction tuning, which reads these files otherwise.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    Hello<|im_end|>
"""

from __future__ import annotations

from typing import Any

from moe_dist.errors import DataError

DIALOGUE_FIELDS = ("conversations", "messages", "chosen", "rejected")  # of MiniMind's and others' files to tune on


def text_of_turns(where: str, field: str, turns: list[Any], skip: str) -> str:
    """The turns as one text.

    Args:
        where: The record.
        field: Its field that holds them.
        turns: Of each a role and its content; other keys, such as those of tools, are not text and stay out.
        skip: What leaves the record out.

    Raises:
        DataError: A turn has no role or no content, or there is no turn.
    """
    if not turns:
        raise DataError(where, f"{field} has no turn", "a dialogue has at least one turn", f"correct it, or {skip}")
    parts = []
    for number, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            found = sorted(turn) if isinstance(turn, dict) else type(turn).__name__
            rule = "a turn has a role and a content, both text"
            raise DataError(where, f"turn {number} of {field} is {found}", rule, f"correct it, or {skip}")
        parts.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return "".join(parts)

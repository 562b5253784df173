"""Text of strangers, made harmless to look at."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without what would steer a terminal or turn the direction of writing."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

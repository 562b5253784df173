"""Tokenizers that are kept as byte strings with ranks -> a tokenizer.json with the same ids for every text.

Two families keep them so: tiktoken's `*.tiktoken` (a line is a token in base64 and its rank; the pattern that cuts text
into words is not in the file, so the encoding is named) and Mistral's `tekken.json`. Both join, again and again, the
two neighbours whose joint has the lowest rank, the leftmost first. A token is therefore always joined from the same two
parts, those that are left when its own bytes are joined alone: every joint inside it comes about in the same order,
whatever stands around it. These pairs, in the order of rank, are the merges of a BPE; a word that is itself a token is
taken whole by both. What is left to agree on is the pattern, which is written here for the regex library that reads
tokenizer.json.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moe_dist.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_MOST_TOKENS = 2**20
_LONGEST_TOKEN = 1024
_NEVER = 2**62  # rank of two parts that are not joined
_TEKKEN_KIND = "tekken"
_TEKKEN_ROW = re.compile(rb'"token_bytes"\s*:\s*"')  # in a tokenizer.json such a token has a number


@dataclass(frozen=True)
class Encoding:
    """What a family of ranks files does not say in the file.

    Attributes:
        pattern: Cuts text into words. Source: `tiktoken_ext/openai_public.py` of tiktoken, without its possessive
            quantifiers, which only save time, and with its end of text `$` as `\\z`, since `$` is an end of line here.
        tokens: Tokens of the whole file, special ones not included.
        special: Special tokens and their ids.
    """

    pattern: str
    tokens: int
    special: Mapping[str, int]


_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST = (r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
ENCODINGS: Mapping[str, Encoding] = {
    "gpt2": Encoding(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s", 50_256, {END_OF_TEXT: 50_256}
    ),
    "cl100k_base": Encoding(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
        100_256,
        {
            END_OF_TEXT: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": Encoding(
        "|".join((*(cased + _ENDINGS for cased in _CASED), r"\p{N}{1,3}", *_REST)),
        199_998,
        {END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018},
    ),
}
# Source: `mistral_common/tokens/tokenizers/tekken.py` and `base.py` for files that do not list their special tokens.
_TEKKEN_PATTERN = "|".join((*_CASED, r"\p{N}", *_REST))
_TEKKEN_SPECIAL = (
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
    + ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]")
    + ("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
)


def kind_of_contents(contents: bytes) -> str:
    """`tokenizer.json`, `tekken`, or `tiktoken`, whose encoding the contents do not tell."""
    start = contents[:4096].lstrip()
    if start[:1] != b"{":
        token, _, rank = contents[:_LONGEST_TOKEN].partition(b"\n")[0].strip().partition(b" ")
        return "tiktoken" if rank.isdigit() and _decode(token) else "tokenizer.json"
    return _TEKKEN_KIND if _TEKKEN_ROW.search(contents, 0, 2**20) else "tokenizer.json"


def convert(contents: bytes, kind: str, where: str) -> bytes:
    """A tokenizer.json of a ranks file.

    Args:
        contents: The file.
        kind: A key of `ENCODINGS`, or `tekken`.
        where: The file, for messages.

    Raises:
        DataError: The file is damaged, or of another family or encoding.
    """
    if kind == _TEKKEN_KIND:
        return _convert_tekken(contents, where)
    ranks = _tiktoken_ranks(contents, where)
    encoding, tokens = ENCODINGS[kind], 1 + max(ranks.values())
    other = next((name for name, e in ENCODINGS.items() if e.tokens == tokens and name != kind), None)
    if other is not None:
        rule = f"the ranks of {kind} are {encoding.tokens:,}"
        raise DataError(where, f"{tokens:,} ranks", rule, f"data.tokenizer.kind={other}")
    whole = tokens == encoding.tokens  # a file of another size is somebody's own: it has no place for the others
    return _tokenizer_json(ranks, dict(encoding.special) if whole else {END_OF_TEXT: tokens}, encoding.pattern, where)


def _convert_tekken(contents: bytes, where: str) -> bytes:
    fix = "fetch tekken.json again, from a version of mistral-common"
    try:
        tree: Any = json.loads(contents)
        config, listed = tree["config"], tree.get("special_tokens")
        size, reserved = config["default_vocab_size"], config["default_num_special_tokens"]
        ranks = {_decode(row["token_bytes"].encode()): row["rank"] for row in tree["vocab"][: max(0, size - reserved)]}
        names = [f"<SPECIAL_{id_}>" for id_ in range(reserved)]
        special = enumerate(_TEKKEN_SPECIAL) if listed is None else ((s["rank"], s["token_str"]) for s in listed)
        for id_, name in special:
            names[id_] = str(name)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(where, repr(error), "a tekken.json lists its tokens with their ranks", fix) from None
    if config.get("pattern") != _TEKKEN_PATTERN:
        rule = "the pattern of a tekken.json is the one that all of them have had so far"
        raise DataError(where, f"pattern {config.get('pattern')!r}", rule, "save it as a tokenizer.json")
    _check_ranks(ranks, size - reserved, where)
    ids = {token: rank + reserved for token, rank in ranks.items()}
    return _tokenizer_json(ids, {name: id_ for id_, name in enumerate(names)}, _TEKKEN_PATTERN, where)


def _tiktoken_ranks(contents: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents.splitlines(), start=1):
        token, _, rank = line.strip().partition(b" ")
        decoded = _decode(token)
        if line.strip() and (not decoded or not rank.isdigit() or len(rank) > 9):
            rule = "a line of a ranks file is a token in base64, a space and its rank"
            raise DataError(f"{where}, line {number}", line[:80], rule, "fetch the file again")
        if decoded:
            ranks[decoded] = int(rank)
    _check_ranks(ranks, len(contents.split()) // 2, where)
    return ranks


def _check_ranks(ranks: Mapping[bytes, object], wanted: int, where: str) -> None:
    """Every byte must have a token, so that any text can be encoded, and every rank its one token."""
    single = sum(len(token) == 1 for token in ranks)
    if single != _BYTES or len(ranks) != wanted or not 0 < wanted <= _MOST_TOKENS or b"" in ranks:
        found = f"{len(ranks):,} tokens of {wanted:,}, {single} of them single bytes"
        rule = f"each of the {_BYTES} bytes is a token, and no token is listed twice or empty"
    elif max(map(len, ranks)) > _LONGEST_TOKEN:
        found, rule = f"a token of {max(map(len, ranks)):,} bytes", f"a token has at most {_LONGEST_TOKEN:,} bytes"
    elif set(ranks.values()) != set(range(wanted)):
        found, rule = "a rank that is missing or there twice", f"the ranks are 0 to {wanted - 1:,}"
    else:
        return
    raise DataError(where, found, rule, "fetch the file again")


def _decode(token: bytes) -> bytes:
    try:
        return base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _tokenizer_json(ids: Mapping[bytes, int], special: Mapping[str, int], pattern: str, where: str) -> bytes:
    """The same bytes for the same ranks, whatever library is installed."""
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ids}
    vocab = {spelled[token]: id_ for token, id_ in ids.items()}
    twice = [name for name in special if name in vocab]
    if twice:
        rule = "a special token is not also a plain one"
        raise DataError(where, ", ".join(twice[:8]), rule, "take another version of this tokenizer")
    pairs = (_last_pair(token, ids) for token in sorted(ids, key=ids.__getitem__) if len(token) > 1)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letter_coding = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    in_order = sorted(special.items(), key=lambda item: item[1])
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": name, **plain} for name, id_ in in_order],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letter_coding]},
        "post_processor": None,
        "decoder": letter_coding,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(sorted((vocab | dict(special)).items(), key=lambda item: item[1])),
            "merges": [[spelled[left], spelled[right]] for left, right in filter(None, pairs)],
        },
    }
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that a token's own bytes are joined to last; None where joining gets stuck before."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        order = [ranks.get(left + right, _NEVER) for left, right in pairwise(parts)]
        lowest = min(order)
        if lowest == _NEVER:
            return None
        place = order.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The visible letter that stands for each byte in a byte-level tokenizer.json. Source: GPT-2's `encoder.py`."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    shown = frozenset(visible)
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(_BYTES)]

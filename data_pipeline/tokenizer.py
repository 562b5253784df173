"""Text <-> ids: trains a byte-level BPE, or loads any byte-level tokenizer.json, or what can be made into one.

Training is deterministic: the library breaks ties between pairs by their ids, and the alphabet is given sorted. The
text of a special token that occurs inside a document is encoded as the plain text it is, never as the token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Library

from data_pipeline.rank_files import ENCODINGS, END_OF_TEXT, convert, kind_of_contents
from moe_dist.errors import DataError

_END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
    "[SEP]",
)
# GPT-2's pattern with at most three digits to a word
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MAX_FILE_BYTES = 64 * 2**20
_PIECE_CHARACTERS = 256 * 2**10  # longer texts are encoded in pieces that end with a line, to bound memory
_GROUP_CHARACTERS = 4 * 2**20


class Tokenizer:
    """A tokenizer and the bytes of its file.

    Attributes:
        file_bytes: Contents of its tokenizer.json.
        sha256: Hash of `file_bytes`.
        size: One more than the highest id.
        end_of_text: Id of the token that ends a document.
    """

    def __init__(self, file_bytes: bytes, where: str) -> None:
        self.file_bytes = file_bytes
        self.sha256 = hashlib.sha256(file_bytes).hexdigest()
        self._library = _parse(file_bytes, where)
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end_of_text = _find_end(self._library, where)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return [int(id_) for id_ in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, as `encode` gives them; uses the library's threads and bounded memory."""
        return [ids[:-1] for ids in self.encode_documents(texts)]

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The same with end-of-text after each."""
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
        parts: list[list[list[int]]] = [[] for _ in texts]
        for group in _groups(pieces):
            encoded = self._library.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encoded, strict=True):
                parts[number].append(encoding.ids)
        for part in parts:
            part[-1].append(self.end_of_text)
        return [np.concatenate([np.fromiter(ids, np.int32, len(ids)) for ids in part]) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their name; bytes that are not UTF-8 become U+FFFD."""
        return str(self._library.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text that each id stands for: [size]; 0 for special tokens and unused ids."""
        lengths = np.zeros(self.size, dtype=np.int64)
        for token, id_ in self._library.get_vocab(with_added_tokens=False).items():
            lengths[id_] = len(token)  # byte-level: one character of the token is one byte
        for id_, added in self._library.get_added_tokens_decoder().items():
            lengths[id_] = 0 if added.special else len(added.content.encode("utf-8"))
        return lengths

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json."""
        path.write_bytes(self.file_bytes)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE in which every byte has a token, so that any text comes back exactly.

    Args:
        texts: Documents; the same in any order give the same tokenizer.
        vocab_size: Tokens, end-of-text (id 0) included. A text with too few repeated words gives fewer.

    Raises:
        DataError: There is no text.
    """
    library = _Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _pieces(text))
    library.train_from_iterator(pieces, trainer)
    return Tokenizer(library.to_str(pretty=True).encode("utf-8"), "the trained tokenizer")


def load_tokenizer(path: str | Path, vocab_size: int, kind: str = "auto") -> Tokenizer:
    """Loads a byte-level tokenizer.json, or makes one of a tekken.json or a tiktoken ranks file.

    Args:
        path: The file.
        vocab_size: Rows of the embedding, which its ids must fit.
        kind: `data.tokenizer.kind`.

    Raises:
        DataError: It cannot be read, is of another kind, not byte-level, has no end-of-text token or too many tokens.
    """
    where = f"data.tokenizer.path={path}"
    contents = read_tokenizer_file(path)
    found = kind_of_contents(contents)
    if found == "tiktoken" and kind == "auto":
        near = next((name for name in ENCODINGS if name in Path(path).name), "cl100k_base")
        rule = f"a ranks file does not say how it cuts text: its encoding is named, {', '.join(ENCODINGS)}"
        raise DataError(where, "a tiktoken ranks file", rule, f"data.tokenizer.kind={near}")
    if kind not in ("auto", found) and not (found == "tiktoken" and kind in ENCODINGS):
        rule = f"the file is what data.tokenizer.kind={kind} says"
        raise DataError(where, f"contents of a {found} file", rule, "data.tokenizer.kind=auto")
    if found != "tokenizer.json":
        contents = convert(contents, found if kind == "auto" else kind, where)
    tokenizer = Tokenizer(contents, where)
    if tokenizer.size > vocab_size:
        raise DataError(
            where,
            f"{tokenizer.size} tokens",
            f"the tokenizer fits model.vocab_size ({vocab_size})",
            f"model.vocab_size={tokenizer.size}, or a smaller tokenizer",
        )
    return tokenizer


def read_tokenizer_file(path: str | Path) -> bytes:
    """The contents of a tokenizer's file, whatever its kind.

    Raises:
        DataError: It cannot be read, or is far too large for one.
    """
    where = f"data.tokenizer.path={path}"
    try:
        with open(path, "rb") as file:
            contents = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(where, error.strerror, "the tokenizer can be read", "name a tokenizer.json") from None
    if len(contents) > _MAX_FILE_BYTES:
        found, rule = f"more than {_MAX_FILE_BYTES:,} bytes", "a tokenizer is smaller"
        raise DataError(where, found, rule, "name a tokenizer.json")
    return contents


def _parse(file_bytes: bytes, where: str) -> _Library:
    try:
        spec = json.loads(file_bytes)
        library = _Library.from_str(file_bytes.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise DataError(
            where, error, "a tokenizer is a tokenizer.json", "save it with the tokenizers library"
        ) from None
    if not _is_byte_level(spec):
        found = f"model {spec['model'].get('type')}, decoder {(spec.get('decoder') or {}).get('type')}"
        raise DataError(where, found, "the tokenizer is byte-level", "take a byte-level BPE, or let one be trained")
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library


def _is_byte_level(spec: dict[str, Any]) -> bool:
    decoder = spec.get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
    return "ByteLevel" in kinds


def _find_end(library: _Library, where: str) -> int:
    for name in _END_NAMES:
        id_ = library.token_to_id(name)
        if id_ is not None:
            return int(id_)
    raise DataError(
        where, "none of the known names", f"it has an end-of-text token: {', '.join(_END_NAMES)}", "add one of them"
    )


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, each but the last ending with a line where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _groups(pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Pieces in groups of a few megabytes, since the library needs some hundred bytes for each token at work."""
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group

"""Which documents are kept for evaluation: a pure function of the document's id.

A document is held out when its 64-bit hash is below a cut. The cut is `data.holdout_fraction` of the range; where that
would hold out nothing (a handful of documents), it is raised just above the lowest hash there is, so that exactly the
document with the lowest hash is held out.
"""

from __future__ import annotations

from hashlib import blake2b

HASH_RANGE = 2**64


def split_hash(document_id: str) -> int:
    """Hash in [0, 2**64) that decides the split; the same on every machine."""
    return _hash(document_id, b"holdout")


def sample_hash(document_id: str) -> int:
    """Hash in [0, 2**64), independent of the split, whose order picks the tokenizer's training text."""
    return _hash(document_id, b"tokenizer")


def holdout_cut(fraction: float, lowest_hash: int | None) -> int:
    """The cut below which a `split_hash` is held out, given the lowest hash of all documents (None: no document)."""
    cut = int(fraction * HASH_RANGE)
    return cut if lowest_hash is None else max(cut, lowest_hash + 1)


def _hash(document_id: str, purpose: bytes) -> int:
    digest = blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "little")

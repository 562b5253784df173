"""Near-duplicates: planted pairs of known similarity, and what a cluster is."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.minhash import Signer, signatures_of, similarity
from data_pipeline.near import MOST_COMPARED, NearDuplicates, find_near_duplicates
from data_pipeline.shingles import shingles_of, word_spans
from moe_dist.config.data_schema import NearDuplicateConfig

HASHES = [5947399889540054833, 9408864232456229997, 6075731356285933050, 7616232713173581627]
SIGNATURE = [36, 109, 174, 108, 245, 169, 242, 127]
NEAR = NearDuplicateConfig(similarity=0.7)
CHINESE = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少白日依山盡黃河入海流欲窮千里目更上一層樓"
WORDS = st.text(st.sampled_from("ab1_ .,\n\t字かéÅ'ก"), max_size=30)


def find(texts: list[str], settings: NearDuplicateConfig = NEAR) -> NearDuplicates:
    return find_near_duplicates(Signer(settings)(texts), np.arange(len(texts)), settings)


def shingle_set(text: str, length: int) -> set[tuple[str, ...]]:
    """The slow oracle, for text in plain ASCII words or Han characters."""
    words = [word for word in (text.split() if text.isascii() else list(text)) if word.strip()]
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))} if words else set()


def jaccard(one: str, other: str, length: int = 5) -> float:
    left, right = shingle_set(one, length), shingle_set(other, length)
    return len(left & right) / len(left | right)


def edited(words: list[str], edits: int, source: random.Random) -> str:
    changed = list(words)
    for place in source.sample(range(0, len(words), 5), edits):
        changed[place] = f"new{source.randrange(10**9)}"
    return " ".join(changed)


def planted(edits: int, source: random.Random) -> tuple[str, str]:
    """Two texts of 500 words, of which every edit changes five shingles."""
    words = [f"w{source.randrange(10**9)}" for _ in range(500)]
    return " ".join(words), edited(words, edits, source)


def test_pairs_of_similarity_09_are_found_and_those_of_05_are_not() -> None:
    source = random.Random(1)
    alike, unlike = ([planted(edits, source) for _ in range(300)] for edits in (5, 33))
    assert all(0.89 < jaccard(*pair) < 0.92 for pair in alike)
    assert all(0.49 < jaccard(*pair) < 0.53 for pair in unlike)
    texts = [text for pair in (*alike, *unlike) for text in pair]
    found = find(texts)
    gone = set(found.gone.tolist())
    assert len(gone & set(range(1, 600, 2))) >= 299  # 1 - (1 - 0.9^8)^14 = 0.9996
    assert gone <= set(range(1, 600, 2))
    assert (found.kept == found.gone - 1).all()


@pytest.mark.parametrize("edits", [5, 17, 22, 33])
def test_pairs_share_a_band_as_often_as_the_curve_says(edits: int) -> None:
    source = random.Random(2)
    pairs = [planted(edits, source) for _ in range(400)]
    exact = np.mean([jaccard(*pair) for pair in pairs])
    expected = 1 - (1 - exact**8) ** 14
    signatures = Signer(NEAR)([text for pair in pairs for text in pair]).reshape(400, 2, 14, 8)
    shared = (signatures[:, 0] == signatures[:, 1]).all(axis=2).any(axis=1).mean()
    assert shared == pytest.approx(expected, abs=0.08)  # three standard deviations of 400 pairs


@pytest.mark.parametrize("edits", [0, 5, 17, 33, 80])
def test_estimate_has_no_bias_and_the_spread_of_112_independent_draws(edits: int) -> None:
    source = random.Random(3)
    pairs = [planted(edits, source) for _ in range(300)]
    exact = np.array([jaccard(*pair) for pair in pairs])
    signatures = Signer(NEAR)([text for pair in pairs for text in pair])
    errors = [similarity(a, b[None])[0] for a, b in zip(signatures[::2], signatures[1::2], strict=True)] - exact
    spread = float(np.sqrt((exact * (1 - exact)).mean() / 112))
    assert abs(errors.mean()) <= 4 * spread / np.sqrt(300)
    assert errors.std() <= 1.2 * spread


def test_of_a_chain_what_goes_is_similar_to_what_stays_and_the_far_end_stays() -> None:
    source = random.Random(4)
    words = [f"w{source.randrange(10**9)}" for _ in range(500)]
    chain = [" ".join(words)]
    for step in range(4):
        words = words[:]
        for place in range(10 * step, 500, 50):
            words[place] = f"new{source.randrange(10**9)}"
        chain.append(" ".join(words))
    assert all(jaccard(a, b) > 0.8 for a, b in pairwise(chain))
    assert jaccard(chain[0], chain[2]) < 0.7 < jaccard(chain[2], chain[3])
    found = find(chain)
    assert found.gone.tolist() == [1, 3]
    assert found.kept.tolist() == [0, 2]


def test_cluster_of_copies_with_small_changes_keeps_its_first_member_only() -> None:
    source = random.Random(5)
    words = [f"w{source.randrange(10**9)}" for _ in range(500)]
    texts = [f"other text number {i} " * 20 for i in range(3)] + [edited(words, 3, source) for _ in range(30)]
    found = find(texts)
    assert found.gone.tolist() == list(range(4, 33))
    assert set(found.kept.tolist()) == {3}


@given(st.lists(st.integers(0, 20), min_size=2, max_size=25), st.randoms())
def test_who_goes_is_similar_to_an_earlier_one_that_stays_and_stayers_sharing_a_band_are_not(
    edits: list[int], source: random.Random
) -> None:
    words = [f"w{i}" for i in range(120)]
    texts = [edited(words, number, source) for number in edits]
    signatures = Signer(NEAR)(texts)
    found = find(texts)
    gone = set(found.gone.tolist())
    stay = [number for number in range(len(texts)) if number not in gone]
    bands = signatures.reshape(len(texts), 14, 8)
    for number in range(len(texts)):
        earlier = [k for k in stay if k < number and (bands[k] == bands[number]).all(axis=1).any()]
        near = [k for k in earlier if similarity(signatures[number], signatures[[k]])[0] >= 0.7]
        assert bool(near) == (number in gone)
    for number, kept, value in zip(found.gone, found.kept, found.similarity, strict=True):
        assert kept in stay
        assert value == similarity(signatures[number], signatures[[kept]])[0]


def test_a_band_that_many_stayers_share_compares_with_a_bounded_number_of_them() -> None:
    number = 3 * MOST_COMPARED
    signatures = np.random.default_rng(0).integers(1, 256, (number, 112), dtype=np.uint8)
    signatures[:, :8] = 7
    signatures[-2] = signatures[MOST_COMPARED - 1]
    signatures[-1, 8:] = signatures[MOST_COMPARED, 8:]
    signatures[-1, 8:-1:8] += 1  # beyond the bound only the first band is common to both
    found = find_near_duplicates(signatures, np.arange(number), NEAR)
    assert found.gone.tolist() == [number - 2]
    assert found.kept.tolist() == [MOST_COMPARED - 1]


def test_case_punctuation_and_white_space_do_not_tell_documents_apart() -> None:
    texts = ["The cat, the dog & the mouse sat down.", "the CAT the dog\tthe mouse\n\nsat (down)", "the cat sat down"]
    signatures = Signer(NEAR)(texts)
    assert (signatures[0] == signatures[1]).all()
    assert find(texts).gone.tolist() == [1]


def test_documents_shorter_than_a_shingle_are_one_shingle_and_empty_ones_take_no_part() -> None:
    texts = ["Table of contents", "table of contents.", "table of", "", "!?", "...", "table of contents and more"]
    signatures = Signer(NEAR)(texts)
    assert (signatures[3:6] == 0).all()
    taken = np.flatnonzero(signatures.any(axis=1))
    assert find_near_duplicates(signatures, taken, NEAR).gone.tolist() == [1]


def test_chinese_is_compared_by_characters() -> None:
    changed = CHINESE[:20] + "月" + CHINESE[21:]
    assert shingles_of([CHINESE], 5).words.tolist() == [40]
    assert jaccard(CHINESE, changed) == 31 / 41
    settings = NearDuplicateConfig(similarity=0.6, rows=4, bands=28)
    spaced = "，".join(CHINESE[i : i + 5] for i in range(0, 40, 5)) + "。"
    other = CHINESE[::-1]
    found = find([CHINESE, other, changed, spaced], settings)
    assert found.gone.tolist() == [2, 3]
    assert found.similarity[1] == 1.0
    assert found.similarity[0] == pytest.approx(31 / 41, abs=0.15)


@given(st.lists(WORDS, max_size=12), st.integers(1, 7))
def test_shingles_of_a_batch_are_those_of_each_text_alone(texts: list[str], length: int) -> None:
    together = shingles_of(texts, length)
    alone = [shingles_of([text], length) for text in texts]
    assert together.hashes.tolist() == [value for part in alone for value in part.hashes.tolist()]
    assert together.counts.tolist() == [len(part.hashes) for part in alone]
    assert together.words.tolist() == [len(word_spans(text)) for text in texts]
    signatures = signatures_of(together, 20)
    assert signatures.tolist() == [signatures_of(part, 20)[0].tolist() for part in alone]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 4))
def test_equal_shingles_have_equal_hashes_and_others_do_not(words: list[str], length: int) -> None:
    hashes = shingles_of([" ".join(words)], length).hashes.tolist()
    assert len(set(hashes)) == len(shingle_set(" ".join(words), length))


def test_words_are_the_same_on_both_sides_of_a_block_of_hashing() -> None:
    words = ["word", "longer" * 30, "x", "字"] * 3000
    hashes = shingles_of([" ".join(words)], 1).hashes
    assert len(hashes) == 12_000
    assert set(hashes.tolist()) == set(shingles_of([" ".join(words[:4])], 1).hashes.tolist())
    long = shingles_of(["a" * 200_000, "a" * 200_000 + "b", "a"], 1).hashes.tolist()
    assert long[0] == long[1] != long[2]  # the first 65,536 characters of a word count


def test_hashes_and_signatures_are_these_values() -> None:
    """Builds on other machines and with later versions must find the same: a change of these is another version."""
    hashes = shingles_of(["The quick brown fox, 字", "é"], 3).hashes
    assert hashes.tolist() == HASHES
    assert Signer(NEAR)(["one two three four five six"])[0, :8].tolist() == SIGNATURE

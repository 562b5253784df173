"""Every quality rule on both sides of its threshold."""

from __future__ import annotations

import pytest

from data_pipeline import quality
from data_pipeline.page import Page, split_words
from data_pipeline.quality import LINE_RULES, PAGE_RULES
from moe_dist.config.data_schema import QUALITY_RULES

PROSE = (
    "The river comes down from the hills and has carried sand to the sea for a very long time. In spring it floods the "
    "low fields, which the farmers have learnt to expect, and by summer a child can walk through it with dry knees. "
    "Nobody knows who built the old bridge. It is said that a bishop paid for it! Would you believe that?"
)
CHINESE = (
    "春天的时候，河水从山上流下来，淹没了低处的田地。农民们早就习惯了这样的事情，他们在高处盖房子，把粮食放在楼上。"
    "到了夏天，孩子可以走过河去，水只到膝盖。没有人知道是谁造了那座古老的桥！有人说是一位僧人出的钱，这是真的吗？"
    "村里的老人不这样想。他们说，桥和河一样古老。"
)


def numbered(count: int, length: int = 4) -> str:
    """Different words of one length."""
    letters = "abcdefghij"
    return " ".join("".join(letters[int(d)] for d in f"{i:0{length}d}") for i in range(count))


def scattered(phrase: str, times: int, count: int) -> str:
    """`numbered` words with a phrase after each of the first ones."""
    words = numbered(count).split()
    return " ".join(f"{word} {phrase}" if place < times else word for place, word in enumerate(words))


# For each line rule: lines and what becomes of them.
LINES = {
    "c4_citations": [
        ("As he said[12] and[citation needed] so on[edit].", "As he said and so on."),
        ("a[i] = x[]", "a[i] = x[]"),
    ],
    "c4_javascript": [("Please enable JavaScript now.", None), ("Java script", "Java script")],
    "c4_policy_lines": [
        ("Our Privacy Policy applies.", None),
        ("This site uses cookies.", None),
        ("A policy.", "A policy."),
    ],
    "c4_terminal_punctuation": [
        ("It ends.\n", "It ends.\n"),
        ("Does it? ", "Does it? "),
        ('He said "yes"', 'He said "yes"'),
        ("他说：“好。”", "他说：“好。”"),
        ("这是一句话。", "这是一句话。"),
        ("Home | About", None),
        ("标题", None),
        ("\n", None),
    ],
    "c4_line_words": [("one two three", "one two three"), ("one two", None), ("三个字", "三个字"), ("两字", None)],
}
# For each page rule: texts that stay and texts that go, near the threshold.
PAGES: dict[str, tuple[list[str], list[str]]] = {
    "c4_lorem_ipsum": (["lorem", CHINESE], ["Lorem Ipsum dolor"]),
    "c4_curly_bracket": (["a } b"], ["int f() { }"]),
    "c4_sentences": (
        ["A b. " * 5, "好。" * 5, CHINESE, 'He "ran." ' * 5],
        ["A b. " * 4, "好。" * 4, "1.2.3.4.5.6 e.g"],
    ),
    "gopher_word_count": (["w " * 50, "w " * 100_000, "字" * 50], ["w " * 49, "w " * 100_001, "字" * 49, ""]),
    "gopher_mean_word_length": (
        ["abc abc", "a" * 10, "ab abcd", CHINESE, "abc 字 字 字 abc", "длинноеслово" * 3],
        ["ab abc", "a" * 11, "a b c"],
    ),
    "gopher_symbols": (
        ["# " + "w " * 9, "w... " * 1 + "w " * 9, "字" * 10 + "……", "... " * 1 + "# " * 1 + "w " * 8],
        ["# " + "w " * 8, "w... " + "w… " + "w " * 9, "字" * 9 + "……"],
    ),
    "gopher_bullet_lines": (["- a\n" * 9 + "b", "", "• a\nb\n"], ["- a\n" * 10, "• a\n" * 19 + "b"]),
    "gopher_ellipsis_lines": (
        ["a...\n" * 3 + "b\n" * 7, "没有……\n" + "有。\n" * 3],
        ["a...\n" * 4 + "b\n" * 7, "有……\n" * 4],
    ),
    "gopher_alphabetic_words": (["w " * 8 + "1 " * 2, "字" * 8 + " 1 2", CHINESE], ["w " * 7 + "1 " * 2, "1 2 3 4"]),
    "gopher_stop_words": (
        ["The cat, AND dog", "to be", CHINESE, "这是", "это обычный текст"],
        ["the the the", "cat dog", "le chat et le chien", "的的的", "春夏秋冬"],
    ),
    "gopher_duplicate_lines": (["a\n" * 4 + "b\nc\nd\ne\nf\ng", PROSE], ["a\n" * 5 + "b\nc\nd\ne\nf"]),
    "gopher_duplicate_line_characters": (
        ["a" * 20 + "\n" + "a" * 20 + "\n" + "b" * 60, PROSE],
        ["a" * 21 + "\n" + "a" * 21 + "\n" + "b" * 58],
    ),
    "gopher_duplicate_paragraphs": (
        ["a\n\n" * 4 + "b\n\nc\n\nd\n \ne\n\nf\n\ng", PROSE],
        ["a\n\n" * 5 + "b\n\nc\n\nd\n\ne\n\nf"],
    ),
    "gopher_duplicate_paragraph_characters": (
        ["a\n" * 20 + "\n" + "a\n" * 20 + "\n" + "b" * 200, PROSE],
        ["a" * 21 + "\n\n" + "a" * 21 + "\n\n" + "b" * 58],
    ),
    "gopher_top_ngrams": (
        [scattered("xxxx yyyy", 4, 32), scattered("xxxx yyyy zzzz", 6, 82), numbered(3), PROSE, CHINESE],
        [scattered("xxxx yyyy", 4, 31), scattered("xxxx yyyy zzzz", 6, 81), "a a a a"],
    ),
    "gopher_duplicate_ngrams": (
        [*(f"{numbered(n)} {numbered(k)}" for n, k in ((29, 5), (37, 6), (90, 10))), PROSE, CHINESE, ""],
        [*(f"{numbered(n)} {numbered(k)}" for n, k in ((28, 5), (36, 6), (89, 10))), "好" * 60],
    ),
}


def test_rules_are_those_of_the_configuration() -> None:
    assert tuple(rule.__name__ for rule in (*LINE_RULES, *PAGE_RULES)) == QUALITY_RULES
    assert {*LINES, *PAGES} == set(QUALITY_RULES)


@pytest.mark.parametrize("rule", LINE_RULES, ids=lambda rule: rule.__name__)
def test_line_rule_keeps_edits_or_removes(rule: quality.LineRule) -> None:
    for line, expected in LINES[rule.__name__]:
        assert rule(line) == expected, line


@pytest.mark.parametrize("rule", PAGE_RULES, ids=lambda rule: rule.__name__)
def test_page_rule_on_both_sides_of_its_threshold(rule: quality.PageRule) -> None:
    stay, go = PAGES[rule.__name__]
    assert [text[:60] for text in stay if not rule(Page(text))] == []
    assert [text[:60] for text in go if rule(Page(text))] == []


@pytest.mark.parametrize("text", [PROSE, CHINESE], ids=["english", "chinese"])
def test_ordinary_prose_breaks_no_rule(text: str) -> None:
    assert [rule.__name__ for rule in PAGE_RULES if not rule(Page(text))] == []
    assert [rule.__name__ for rule in LINE_RULES if rule(text) != text] == []


@pytest.mark.parametrize("text", ["", " \n ", "。", "!!!"])
def test_text_without_words_is_judged_too_short_and_not_divided_by(text: str) -> None:
    broken = {rule.__name__ for rule in PAGE_RULES if not rule(Page(text))}
    assert {"c4_sentences", "gopher_word_count"} <= broken
    assert not broken & {"c4_lorem_ipsum", "c4_curly_bracket", "gopher_duplicate_lines", "gopher_top_ngrams"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain words, here", ["plain", "words,", "here"]),
        ("我有 3 本GPT-4的书。", ["我", "有", "3", "本", "GPT", "4", "的", "书"]),
        ("カメラとfilm", ["カ", "メ", "ラ", "と", "film"]),
        ("größe été", ["größe", "été"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "script"),
    [(PROSE, "latin"), (CHINESE, "han"), ("12 34", "latin"), ("これは日本語の文です", "other"), ("русский", "other")]
    + [("naïve café", "latin"), ("한국어 문장", "other"), ("用PyTorch做", "latin")],
)
def test_script_of_a_text(text: str, script: str) -> None:
    assert Page(text).script == script

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clean import Cleaned, Cleaner
from data_pipeline.documents import Document
from data_pipeline.language import language_of
from data_pipeline.page import Page
from data_pipeline.personal import mask_emails, mask_ip_addresses
from moe_dist.config.data_schema import QUALITY_RULES, CleanConfig
from tests.data_pipeline.test_quality import CHINESE, PROSE


def clean(text: str, **settings: object) -> Cleaned:
    return Cleaner(CleanConfig(**settings))(Document("d", text, len(text.encode())))


def kept_text(text: str, **settings: object) -> str:
    document = clean(text, **settings).document
    assert document is not None
    assert document.num_bytes == len(document.text.encode())
    return document.text


@pytest.mark.parametrize(
    ("text", "language"),
    [(PROSE, "en"), (CHINESE, "zh"), ("", "other"), ("Chapter one", "other")]
    + [("Der Hund ist in dem Haus und was nicht ist, kann noch werden, sagte die alte Frau zu ihm.", "other")]
    + [("De hond is in het huis en de kat zit op de mat, of dat was het plan van de oude vrouw.", "other")]
    + [("Le chien est dans la maison et le chat dort sur le lit, mais on ne sait pas pour combien de temps.", "other")]
    + [("これは日本語の文章です。漢字もあります。", "other"), ("這是一個用繁體字寫的句子。", "zh")]
    + [("mount 命令的选项 --bind 把目录 olddir 挂载到 newdir：mount --bind olddir newdir 之后两处内容相同。", "zh")]
    + [
        (
            "The word 中文 means Chinese, and it is written with two characters, for the middle and for text.",
            "en",
        )
    ]
    + [("한국어 문장에 漢字가 몇 개 있습니다. 이것은 중국어가 아닙니다.", "other")],
)
def test_language_of_a_text(text: str, language: str) -> None:
    assert language_of(Page(text)) == language


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to Jo.Doe+x@mail.example.co.uk.", "write to <EMAIL_ADDRESS>."),
        ("<a@b.org>, c_d@e-f.com", "<<EMAIL_ADDRESS>>, <EMAIL_ADDRESS>"),
        ("邮箱是abc@qq.com吗", "邮箱是<EMAIL_ADDRESS>吗"),
        ("@decorator\nx @ y, user@localhost, a@b.c1", "@decorator\nx @ y, user@localhost, a@b.c1"),
    ],
)
def test_email_addresses_are_masked(text: str, masked: str) -> None:
    assert mask_emails(text) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (
            "at 8.8.8.8, http://10.0.0.1:80/ and 255.255.255.255.",
            "at <IP_ADDRESS>, http://<IP_ADDRESS>:80/ and <IP_ADDRESS>.",
        ),
        ("256.1.1.1 1.2.3 1.2.3.4.5 01.2.3.4 v1.2.3.4", "256.1.1.1 1.2.3 1.2.3.4.5 01.2.3.4 v1.2.3.4"),
        ("version 1.2.3.4", "version <IP_ADDRESS>"),
        ("127.0.0.1 0.0.0.0 ::1 ::", "127.0.0.1 0.0.0.0 ::1 ::"),
        ("2001:db8::8a2e:370:7334, [fe80::1]:80", "<IP_ADDRESS>, [<IP_ADDRESS>]:80"),
        ("2001:0db8:0000:0000:0000:ff00:0042:8329 fe80::", "<IP_ADDRESS> <IP_ADDRESS>"),
        ("a[1::2] abc::def std::face 12:30:45 2001:1:2", "a[1::2] abc::def std::face 12:30:45 2001:1:2"),
        ("2001:1:2:3:4:5:6:7:8 2001::1::2", "2001:1:2:3:4:5:6:7:8 2001::1::2"),
    ],
)
def test_valid_ip_addresses_are_masked(text: str, masked: str) -> None:
    assert mask_ip_addresses(text) == masked


def test_normal_form_is_the_one_asked_for() -> None:
    text = "e\u0301 ﬁ"
    assert kept_text(text, normalize="NFC") == "é ﬁ"
    assert kept_text(text, normalize="NFKC") == "é fi"
    assert clean(text, normalize="NFC").changed_by == ("NFC",)


def test_nothing_switched_on_gives_the_document_itself() -> None:
    document = Document("d", "{ lorem ipsum", 13)
    cleaner = Cleaner()
    assert cleaner(document).document is document
    assert not cleaner.is_on
    assert cleaner.created_from == {}


def test_removal_is_counted_under_the_first_rule_whatever_the_order_asked_for() -> None:
    rules = ("gopher_word_count", "c4_curly_bracket")
    assert clean("{ short", rules=rules).removed_by == "c4_curly_bracket"
    assert clean("{ short", rules=rules[::-1]).removed_by == "c4_curly_bracket"
    assert clean("{ short", rules=rules[:1]).removed_by == "gopher_word_count"
    one, other = (Cleaner(CleanConfig(rules=given)).created_from for given in (rules, (*rules[::-1], rules[0])))
    assert one == other


def test_lines_are_taken_out_and_the_others_keep_their_ends() -> None:
    text = "Home | About\r\nThis line stays[3].\r\nEnable javascript please.\nAnd so does this one."
    rules = ("c4_terminal_punctuation", "c4_javascript", "c4_citations")
    cleaned = clean(text, rules=rules)
    assert cleaned.document is not None
    assert cleaned.document.text == "This line stays.\r\nAnd so does this one."
    assert cleaned.changed_by == ("c4_citations", "c4_javascript", "c4_terminal_punctuation")


def test_document_without_a_line_left_is_removed() -> None:
    assert clean("Home\nAbout\n", rules=("c4_terminal_punctuation",)).removed_by == "no_text_left"


def test_languages_not_asked_for_are_removed() -> None:
    assert clean(CHINESE, languages=("en",)).removed_by == "language"
    assert kept_text(CHINESE, languages=("en", "zh")) == CHINESE


@given(st.text(max_size=200))
def test_cleaning_is_a_pure_function_that_survives_pickling(text: str) -> None:
    cleaner = Cleaner(CleanConfig(normalize="NFKC", mask=("email", "ip"), rules=QUALITY_RULES, languages=("en", "zh")))
    document = Document("d", text, 0)
    first = cleaner(document)
    assert pickle.loads(pickle.dumps(cleaner))(document) == first  # noqa: S301 - our own


@given(st.text(alphabet="a1.:@ é字\u0301\n", max_size=60))
def test_masks_and_normal_forms_change_nothing_the_second_time(text: str) -> None:
    settings = CleanConfig(normalize="NFC", mask=("email", "ip"))
    once = Cleaner(settings)(Document("d", text, 0)).document
    if once is not None:
        again = Cleaner(settings)(once)
        assert again.document == once
        assert again.changed_by == ()

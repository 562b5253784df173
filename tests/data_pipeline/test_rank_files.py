"""tiktoken's and Mistral's tokenizers give the ids of the libraries they come from."""

from __future__ import annotations

import base64
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import mistral_common
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from data_pipeline.build import build, open_tokenizer
from data_pipeline.manifest import read_manifest
from data_pipeline.rank_files import ENCODINGS, END_OF_TEXT, convert, kind_of_contents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from moe_dist.config import parse_config
from moe_dist.config.data_schema import TokenizerConfig
from moe_dist.errors import ConfigError, DataError
from tests.data_pipeline.test_build import configure

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
LIBRARY = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
    for name in ("textwrap.py", "json/decoder.py", "tabnanny.py", "html/entities.py", "this.py")
]
HARD = [
    *(" ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\x1c", "'s", "'S", "'ſ", "'RE", "'LL'"),
    *(
        "don't",
        "1234567",
        "٣٤٥",
        "½",
        "a",
        "aaaaaaa",
        "====",
        "///",
        "猫",
        "你好世界",
        "🙂",
        "\U0001f468\u200d\U0001f469",
        "e\u0301",
        "ß",
        "İ",
        "ǅ",
    ),
    *("ʰ", "ॐ", "\u094d", "def f(x):\n    return x", "<|endoftext|>", "<s>", "</s>", "[INST]", "__init__", "_", "."),
]
anything = st.one_of(
    st.lists(st.sampled_from(HARD), max_size=30).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.text(st.sampled_from("ab \n\r\t"), max_size=60),
)


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    """The tokens of a real vocabulary in the order of their rank; the first n of them are a vocabulary too."""
    return [base64.b64decode(row["token_bytes"]) for row in json.loads(TEKKEN.read_bytes())["vocab"]]


@pytest.fixture(scope="module")
def tekken() -> tuple[Tokenizer, Tekkenizer]:
    return load_tokenizer(TEKKEN, 131_072), Tekkenizer.from_file(TEKKEN)


def _ranks_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _encoding(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    """tiktoken's own encoding, its pattern and special tokens included, with other ranks."""
    public = tiktoken_ext.openai_public
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        made: dict[str, Any] = getattr(public, name)()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=made["pat_str"], mergeable_ranks=ranks, special_tokens={})


def _check_same(mine: Tokenizer, theirs: Callable[[str], list[int]], text: str) -> None:
    ids = mine.encode(text)
    assert ids == theirs(text), repr(text)
    assert mine.decode(ids) == text
    assert mine.token_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_tekken_has_the_ids_and_the_end_of_the_library(tekken: tuple[Tokenizer, Tekkenizer]) -> None:
    mine, theirs = tekken
    assert (mine.size, mine.end_of_text) == (theirs.n_words, theirs.eos_id) == (131_072, 2)
    for text in (*LIBRARY, "".join(HARD), "</s>[INST]<SPECIAL_20>"):
        _check_same(mine, lambda text: theirs.encode(text, bos=False, eos=False), text)


@settings(deadline=None, max_examples=300)
@given(text=anything)
def test_tekken_of_any_text_has_the_ids_of_the_library(tekken: tuple[Tokenizer, Tekkenizer], text: str) -> None:
    mine, theirs = tekken
    assert mine.encode(text) == theirs.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_tiktoken_of_any_text_has_the_ids_of_the_library(kind: str, ranks: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "some.tiktoken").write_bytes(_ranks_file(ranks[:6000]))
    mine, theirs = load_tokenizer(tmp_path / "some.tiktoken", 6001, kind), _encoding(kind, ranks[:6000])
    assert (mine.size, mine.end_of_text) == (6001, 6000)
    for text in (*LIBRARY, "".join(HARD)):
        _check_same(mine, theirs.encode_ordinary, text)

    @settings(deadline=None, max_examples=200)
    @given(text=anything)
    def check(text: str) -> None:
        assert mine.encode(text) == theirs.encode_ordinary(text)

    check()


def test_tiktoken_of_the_whole_size_has_the_end_of_its_family_and_another_size_that_of_another(
    ranks: list[bytes], tmp_path: Path
) -> None:
    contents = _ranks_file(ranks[:50_256])
    (tmp_path / "r50k_base.tiktoken").write_bytes(contents)
    assert load_tokenizer(tmp_path / "r50k_base.tiktoken", 50_257, "gpt2").end_of_text == 50_256
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "r50k_base.tiktoken", 50_257, "cl100k_base")
    assert caught.value.fix == "data.tokenizer.kind=gpt2"
    with pytest.raises(DataError, match=r"50257 tokens(.|\n)*\(50256\)"):
        load_tokenizer(tmp_path / "r50k_base.tiktoken", 50_256, "gpt2")


def test_converting_twice_gives_the_same_bytes(ranks: list[bytes]) -> None:
    contents = _ranks_file(ranks[:3000])
    assert convert(contents, "o200k_base", "x") == convert(contents[::-1][::-1], "o200k_base", "x")
    backwards = b"\n".join(reversed(contents.splitlines()))
    assert convert(backwards, "o200k_base", "x") == convert(contents, "o200k_base", "x")


def test_kinds_of_the_config_are_those_that_are_read(tmp_path: Path, ranks: list[bytes]) -> None:
    kinds = get_args(TokenizerConfig.model_fields["kind"].annotation)
    assert set(kinds) == {"auto", "tokenizer.json", "tekken", *ENCODINGS}
    for contents, kind in (
        (TEKKEN.read_bytes(), "tekken"),
        (_ranks_file(ranks[:300]), "tiktoken"),
        (convert(_ranks_file(ranks[:300]), "gpt2", "x"), "tokenizer.json"),
        (b'{"model": {"vocab": {"token_bytes": 7}}}', "tokenizer.json"),
        (b"", "tokenizer.json"),
        (b"\x80\x04K\x01.", "tokenizer.json"),
    ):
        assert kind_of_contents(contents) == kind
    (tmp_path / "o200k_base.tiktoken").write_bytes(_ranks_file(ranks[:300]))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "o200k_base.tiktoken", 400)
    assert caught.value.fix == "data.tokenizer.kind=o200k_base"
    for path, kind in ((tmp_path / "o200k_base.tiktoken", "tekken"), (TEKKEN, "gpt2"), (TEKKEN, "tokenizer.json")):
        with pytest.raises(DataError, match=r"data\.tokenizer\.kind=auto"):
            load_tokenizer(path, 200_000, kind)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.kind"):
        parse_config({"data": {"tokenizer": {"kind": "gpt2"}}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-1] + [lines[-1][:-4] + b"x"], "line 300"),
        (lambda lines: lines[:40] + [b"no line"] + lines[40:], "line 41"),
        (lambda lines: lines[1:], "255 of them single bytes"),
        (lambda lines: [*lines, lines[0]], "300 tokens of 301"),
        (lambda lines: lines[:-1], None),
        (lambda lines: lines[:-2] + lines[-1:], "the ranks are 0 to"),
        (lambda lines: [*lines, base64.b64encode(b"x" * 5000) + b" 300"], "5,000 bytes"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0] + b" " + b"9" * 30], "line 300"),
    ],
)
def test_ranks_file_that_is_damaged_is_a_named_error(
    ranks: list[bytes], change: Callable[[list[bytes]], list[bytes]], words: str | None
) -> None:
    contents = b"\n".join(change(_ranks_file(ranks[:300]).splitlines()))
    if words is None:
        Tokenizer(convert(contents, "gpt2", "x"), "x")
        return
    with pytest.raises(DataError, match=words):
        convert(contents, "gpt2", "the file")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("vocab"),
        lambda tree: tree["config"].update(pattern="(a+)+$"),
        lambda tree: tree["config"].update(default_vocab_size=10**9),
        lambda tree: tree["config"].update(default_num_special_tokens=-5),
        lambda tree: tree["vocab"][3].update(rank=4),
        lambda tree: tree["vocab"][3].update(token_bytes=3),
        lambda tree: tree.update(special_tokens=[{"rank": 10**6, "token_str": "<s>"}]),
        lambda tree: tree.update(special_tokens=[{"rank": 3, "token_str": "a"}]),
    ],
)
def test_tekken_that_is_damaged_is_a_named_error(change: Callable[[dict[str, Any]], object]) -> None:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    pattern = json.loads(TEKKEN.read_bytes())["config"]["pattern"]
    config = {"pattern": pattern, "default_vocab_size": 276, "default_num_special_tokens": 20}
    tree = {"config": config, "vocab": vocab}
    assert Tokenizer(convert(json.dumps(tree).encode(), "tekken", "x"), "x").end_of_text == 2
    change(tree)
    with pytest.raises(DataError):
        convert(json.dumps(tree).encode(), "tekken", "x")


def test_build_with_ranks_keeps_the_converted_tokenizer_and_refuses_another(
    texts: Path, ranks: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(_ranks_file(ranks[:290]))
    names = set()
    for kind in ("gpt2", "cl100k_base"):
        config = configure(texts, tmp_path / "out", tokenizer={"path": str(path), "kind": kind})
        folder = build(config, use_ray=False)
        assert build(config, use_ray=False) == folder
        assert open_tokenizer(folder).file_bytes == convert(path.read_bytes(), kind, "x")
        assert read_manifest(folder).end_of_text == 290
        names.add(folder.name)
    assert len(names) == 2
    (folder / "tokenizer.json").write_bytes(convert(path.read_bytes(), "gpt2", "x"))
    with pytest.raises(DataError, match="tokenizer is as the manifest says"):
        open_tokenizer(folder)


def test_names_of_special_tokens_in_text_are_text(tekken: tuple[Tokenizer, Tekkenizer]) -> None:
    mine, _ = tekken
    for name in (END_OF_TEXT, "</s>", "<s>", "[INST]", "<pad>", "<SPECIAL_999>"):
        assert min(mine.encode(name)) >= 1000


def test_token_that_no_joining_reaches_is_taken_as_a_whole_word_alone() -> None:
    tokens = [bytes([byte]) for byte in range(256)]
    for more, merges in (([b"xyz"], []), ([b"ab", b"abc"], [["a", "b"], ["ab", "c"]])):
        made = convert(_ranks_file(tokens + more), "gpt2", "x")
        assert json.loads(made)["model"]["merges"] == merges
        mine, theirs = Tokenizer(made, "x"), _encoding("gpt2", tokens + more)
        for text in ("xyz", "wxyz xyz", "abc", "aabcc"):
            assert mine.encode(text) == theirs.encode_ordinary(text)

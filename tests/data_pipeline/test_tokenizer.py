from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer
from moe_dist.errors import DataError

TEXTS = [f"def f{i}(x):\n    return x + {i * 37}  # größe 猫 {chr(0x400 + i)}\n" * 5 for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_training_gives_the_size_asked_for_and_end_of_text_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == 400
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode([0]) == END_OF_TEXT


def test_training_on_little_text_gives_a_smaller_tokenizer_that_still_knows_every_byte() -> None:
    small = train_tokenizer(["ab"], 400)
    assert small.size == 257
    assert small.decode(small.encode("größe 猫")) == "größe 猫"


_TRAIN = """
import sys
from data_pipeline.tokenizer import train_tokenizer
texts = [f"def f{i}(x):\\n    return x + {i * 37} # {chr(0x400 + i)}\\n" * 5 for i in range(40)]
print(train_tokenizer(texts[::int(sys.argv[1])], 400).sha256)
"""


def test_training_in_other_processes_threads_and_orders_gives_the_same_file() -> None:
    found = set()
    for order, threads in (("1", "1"), ("1", "3"), ("-1", "2")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _TRAIN, order]
        found.add(subprocess.run(command, env=env, capture_output=True, check=True, text=True, timeout=60).stdout)
    assert len(found) == 1


@settings(deadline=None)
@given(st.lists(st.text(), max_size=4))
def test_encoding_any_text_comes_back_and_its_token_bytes_sum_to_its_length(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_encoding_the_name_of_a_special_token_never_gives_the_token(tokenizer: Tokenizer) -> None:
    text = f"a{END_OF_TEXT}b"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text


def test_encoding_long_text_in_pieces_comes_back(tokenizer: Tokenizer) -> None:
    for text in ("word 12345\n" * 60_000, "猫" * 600_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_token_bytes_has_one_entry_per_id_and_zero_for_special(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (400,)
    assert np.flatnonzero(lengths == 0).tolist() == [tokenizer.end_of_text]


def test_numbers_have_at_most_three_digits_in_a_token(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.decode([id_]).strip() for id_ in range(tokenizer.size)]
    assert max(len(token) for token in tokens if token.isdecimal()) <= 3


def test_loading_what_was_saved_encodes_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json", 400)
    assert (loaded.sha256, loaded.size, loaded.end_of_text) == (tokenizer.sha256, 400, 0)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_loading_more_tokens_than_rows_names_both_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"400 tokens(.|\n)*\(399\)(.|\n)*model.vocab_size=400"):
        load_tokenizer(tmp_path / "tokenizer.json", 399)


def _foreign(special: str) -> Library:
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["[PAD]", special], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return library


def test_loading_a_foreign_tokenizer_finds_its_end_and_ignores_its_truncation(tmp_path: Path) -> None:
    library = _foreign("</s>")
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json", 300)
    assert loaded.end_of_text == 1
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]
    assert loaded.token_bytes()[loaded.encode(TEXTS[0])].sum() == len(TEXTS[0].encode())


def test_loading_without_end_of_text_is_an_error(tmp_path: Path) -> None:
    _foreign("[STOP]").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="end-of-text"):
        load_tokenizer(tmp_path / "t.json", 300)


def test_loading_a_tokenizer_that_is_not_byte_level_is_an_error(tmp_path: Path) -> None:
    Library(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="byte-level"):
        load_tokenizer(tmp_path / "t.json", 300)


@pytest.mark.parametrize("contents", [b"", b"{}", b"[]", b"\xff", json.dumps({"model": 3}).encode()])
def test_loading_what_is_no_tokenizer_is_an_error(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "t.json").write_bytes(contents)
    with pytest.raises(DataError, match=r"is a tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json", 300)


def test_loading_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "t.json", 300)

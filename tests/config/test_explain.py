"""Every key in words, and the resolved tree."""

from __future__ import annotations

import json
import re

import pytest

from moe_dist.config import Config, load_config, parse_config
from moe_dist.config.explain import KeyRow, key_rows, resolved, rows_under, section_rows
from moe_dist.config.load import key_paths, write_yaml
from moe_dist.errors import ConfigError

# Whole numbers that count nothing with a unit of its own.
NO_UNIT = frozenset({"seed", "launch.max_failures"})


def row_of(path: str) -> KeyRow:
    (row,) = rows_under(path)
    return row


def test_explain_covers_every_key_and_section() -> None:
    assert sorted(key_paths()) == sorted([row.path for row in key_rows()] + [row.path for row in section_rows()])


@pytest.mark.parametrize("row", key_rows(), ids=lambda row: row.path)
def test_explain_every_key_has_a_meaning_and_a_type_in_words(row: KeyRow) -> None:
    assert re.fullmatch(r"[A-Z`].*[.!]", row.meaning), row.meaning
    assert re.fullmatch(r"[a-z ,]+", row.type), row.type
    assert (row.type == "one of a few words") <= bool(row.allowed)


def test_explain_every_section_has_a_meaning() -> None:
    assert all(row.meaning.endswith(".") for row in section_rows())


def test_explain_whole_numbers_have_a_unit_and_a_least_value() -> None:
    rows = [row for row in key_rows() if row.type.startswith("whole number")]
    assert {row.path for row in rows if not row.unit} == NO_UNIT
    assert all("at least" in row.allowed for row in rows)


@pytest.mark.parametrize("unit", ["tokens", "seconds", "bytes", "fraction", "steps", "sequences"])
def test_explain_unit_in_a_name_is_the_unit(unit: str) -> None:
    rows = [row for row in key_rows() if row.path.endswith(f"_{unit}") and row.type != "true or false"]
    assert all(row.unit == unit for row in rows), rows


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.moe.top_k", ("whole number", "experts", 2, "at least 1")),
        ("parallel.expert", ("whole number, or null", "ranks", None, "at least 1")),
        ("data.holdout_fraction", ("number", "fraction", 0.03, "more than 0, less than 0.5")),
        ("data.unreadable", ("one of a few words", "", "error", "error, skip")),
        ("model.tie_embeddings", ("true or false", "", True, "")),
        ("data.tokenizer.path", ("text, or null", "path", None, "")),
        ("generate.prompts", ("list of text", "", ["def ", "class ", "import "], "")),
    ],
)
def test_explain_key_says_type_unit_default_and_range(path: str, expected: tuple) -> None:
    row = row_of(path)
    assert (row.type, row.unit, row.default, row.allowed) == expected


def test_explain_section_gives_its_keys_and_those_below() -> None:
    paths = [row.path for row in rows_under("model")]
    assert "model.width" in paths and "model.moe.top_k" in paths
    assert all(path.startswith("model.") for path in paths)


def test_explain_unknown_key_names_the_closest() -> None:
    with pytest.raises(ConfigError) as caught:
        rows_under("model.moe.topk")
    assert caught.value.fix == "did you mean model.moe.top_k?"


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"seed": 5, "parallel": {"expert": 2}, "optimizer": {"lr": 3e-4}},
        {"data": {"suffixes": [], "tokenizer": {"path": "a: b.json"}}, "generate": {"prompts": ["yes", "1e-3", ""]}},
        {
            "data": {
                "sources": {"a": {"input": "x"}},
                "mixture": [{"tokens": 9, "weights": {"a": 1}}, {"epochs": {"a": 2}}],
            }
        },
        {"model": {"norm_eps": 1e-12, "rope_theta": 1e6, "moe": {"capacity_factor": 1.25}}},
    ],
)
def test_resolved_parses_back_to_the_same_config(tree: dict, tmp_path) -> None:
    config = parse_config(tree)
    assert parse_config(resolved(config)) == config
    assert parse_config(json.loads(json.dumps(resolved(config)))) == config
    path = tmp_path / "resolved.yaml"
    path.write_text(write_yaml(resolved(config)), encoding="utf-8")
    assert load_config(path) == config


def test_resolved_is_plain_and_whole() -> None:
    def leaves(tree: dict, prefix: str = "") -> list[str]:
        inner = [(f"{prefix}{name}", value) for name, value in tree.items()]
        return [p for path, value in inner for p in (leaves(value, f"{path}.") if isinstance(value, dict) else [path])]

    named = ("data.sources.", "data.mixture.")  # nothing of them is there until a person names it
    found = [path for path in leaves(resolved(Config())) if path != "data.mixture"]
    assert found == [row.path for row in key_rows() if not row.path.startswith(named)]

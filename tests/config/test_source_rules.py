"""Named sources and mixtures: what may be written, and what a person is told who writes something else."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.config import parse_config
from moe_dist.config.explain import rows_under
from moe_dist.config.load import find_problems
from moe_dist.errors import ConfigError

SOURCES = {"code": {"input": "a"}, "prose": {"input": "b", "text_field": "body", "license": "MIT"}}


def problem_of(data: dict[str, Any]) -> ConfigError:
    (problem,) = find_problems({"data": data})
    return problem


def test_sources_and_stages_are_read_as_written() -> None:
    stages = [
        {"tokens": 1000, "weights": {"code": 1, "prose": 0.5}},
        {"epochs": {"prose": 2.5}},
        {"weights": {"code": 1}},
    ]
    data = parse_config({"data": {"sources": SOURCES, "mixture": stages}}).data
    assert list(data.sources) == ["code", "prose"] and data.sources["prose"].license == "MIT"
    assert [stage.tokens for stage in data.mixture] == [1000, None, None]
    assert data.mixture[1].epochs == {"prose": 2.5}


@pytest.mark.parametrize(
    ("stage", "where", "fix"),
    [
        ({}, "data.mixture.0", "weights with a length"),
        ({"weights": {"code": 1}, "epochs": {"code": 1}}, "data.mixture.0", "weights with a length"),
        ({"epochs": {"code": 1}, "tokens": 5}, "data.mixture.0.tokens", "tokens=null"),
        ({"weights": {"cod": 1}}, "data.mixture.0.weights.cod", "data.mixture.0.weights.code"),
        ({"weights": {"code": -1, "prose": 1}}, "data.mixture.0.weights.code", "code=0"),
        ({"epochs": {"code": 0}}, "data.mixture.0.epochs", "code=1"),
    ],
)
def test_stage_that_says_nothing_usable_is_refused_with_a_fix(stage: dict[str, Any], where: str, fix: str) -> None:
    problem = problem_of({"sources": SOURCES, "mixture": [stage]})
    assert problem.where == where and fix in problem.fix


def test_stage_without_end_may_only_be_the_last() -> None:
    problem = problem_of({"sources": SOURCES, "mixture": [{"weights": {"code": 1}}, {"weights": {"code": 1}}]})
    assert problem.where == "data.mixture.0.tokens"


def test_mixture_without_sources_names_what_is_missing() -> None:
    assert problem_of({"mixture": [{"weights": {"code": 1}}]}).fix == "name it: data.sources.code.input"


def test_input_beside_sources_is_refused() -> None:
    assert problem_of({"sources": SOURCES, "input": "texts"}).where == "data.input"


@pytest.mark.parametrize("name", ["a/b", "../x", "Code", "", "a.b", "-a"])
def test_source_name_that_could_be_a_path_is_refused(name: str) -> None:
    assert problem_of({"sources": {name: {"input": "a"}}}).where == f"data.sources.{name}"


def test_unknown_key_of_a_source_names_the_closest() -> None:
    problem = problem_of({"sources": {"code": {"input": "a", "licence": "MIT"}}})
    assert (problem.where, problem.fix) == ("data.sources.code.licence", "did you mean data.sources.NAME.license?")


def test_explain_shows_the_keys_of_a_named_section() -> None:
    assert [row.path for row in rows_under("data.sources")] == [
        f"data.sources.NAME.{name}" for name in ("input", "text_field", "license")
    ]
    assert rows_under("data.sources.NAME.input")[0].default == "(required)"

"""Reading files, bases and overrides into a checked, frozen tree."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_dist.config import Config, load_config, parse_config
from moe_dist.config.load import closest_key, find_problems, key_paths, read_tree, write_yaml
from moe_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path: Path):
    """Writes a YAML file into a fresh folder and returns its path."""

    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal_of(path: Path | str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


def test_load_file_fills_defaults(write) -> None:
    config = load_config(write("seed: 7\nmodel:\n  moe:\n    top_k: 1\n    normalize_gates: false\n"))
    assert (config.seed, config.model.moe.top_k, config.model.moe.normalize_gates) == (7, 1, False)
    assert config.model.moe.num_experts == Config().model.moe.num_experts


def test_load_whole_number_for_a_number_is_taken(write) -> None:
    assert load_config(write("launch: {timeout_seconds: 30}")).launch.timeout_seconds == 30.0


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "+1e-3", "0.001"])
def test_load_exponent_without_point_is_a_number(write, text: str) -> None:
    assert load_config(write(f"optimizer:\n  lr: {text}\n")).optimizer.lr == 0.001
    assert load_config(write("seed: 1"), [f"optimizer.lr={text}"]).optimizer.lr == 0.001


@pytest.mark.parametrize("text", ["1e-3x", "e-3", "'1e-3'"])
def test_load_text_that_only_looks_like_a_number_is_refused(write, text: str) -> None:
    error = refusal_of(write(f"optimizer:\n  lr: {text}\n"))
    assert (error.where, error.rule) == ("optimizer.lr", "must be a valid number")


@settings(deadline=None)  # each example writes a file
@given(st.floats(min_value=1e-300, max_value=1e300))
def test_override_any_number_as_python_prints_it_is_read_back(number: float) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("seed: 0")
        assert read_tree(path, [f"optimizer.lr={number!r}"])["optimizer"] == {"lr": number}


@settings(deadline=None)  # each example writes a file
@given(st.dictionaries(st.text(min_size=1), st.text() | st.floats(allow_nan=False) | st.integers() | st.booleans()))
@example({"prompt": "1e-3", "lr": 1e-3, "number": "0.5", "off": "no", "time": "1:30"})
def test_write_yaml_any_plain_values_are_read_back(tree: dict) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(write_yaml({"x": tree}), encoding="utf-8", newline="")
        overrides = [f"y={write_yaml(list(tree.values()), one_line=True)}"]
        assert read_tree(path, overrides) == {"x": tree, "y": list(tree.values())}


def test_base_own_keys_replace_and_sections_merge(write) -> None:
    write("seed: 1\ntrain: {steps: 10, global_batch_sequences: 32}\ndata: {suffixes: [.a, .b]}\n", "base.yaml")
    config = load_config(write("base: base.yaml\ntrain: {steps: 20}\ndata: {suffixes: [.c]}\n"))
    assert config.seed == 1
    assert (config.train.steps, config.train.global_batch_sequences) == (20, 32)
    assert config.data.suffixes == (".c",)


def test_base_in_another_folder_is_found_from_the_file(write, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write("seed: 3", "base.yaml")
    assert load_config(write("base: ../base.yaml", "inner/run.yaml")).seed == 3


def test_base_of_a_base_is_refused(write) -> None:
    write("seed: 1", "first.yaml")
    write("base: first.yaml", "second.yaml")
    error = refusal_of(write("base: second.yaml"))
    assert error.where.endswith("second.yaml: base")
    assert error.value == "first.yaml"
    assert "one level" in error.rule


def test_base_missing_names_the_close_file(write) -> None:
    write("seed: 1", "small.yaml")
    error = refusal_of(write("base: smal.yaml"))
    assert error.where.endswith("smal.yaml")
    assert error.fix.endswith("small.yaml?")


def test_override_replaces_file_and_reads_yaml(write) -> None:
    path = write("train: {steps: 10}")
    overrides = ["train.steps=3", "parallel.expert=null", "data.suffixes=[.txt]", "data.tokenizer.path=a=b.json"]
    config = load_config(path, overrides)
    assert (config.train.steps, config.parallel.expert, config.data.suffixes) == (3, None, (".txt",))
    assert config.data.tokenizer.path == "a=b.json"


def test_override_last_one_wins(write) -> None:
    assert load_config(write("seed: 0"), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["train.steps", "=3", " =3"])
def test_override_without_key_or_value_is_refused(write, override: str) -> None:
    assert refusal_of(write("seed: 0"), override).rule == "an override has the form key.path=value"


def test_override_below_a_value_is_refused(write) -> None:
    error = refusal_of(write("seed: 0"), "seed.deep=3")
    assert (error.where, error.rule, error.fix) == (
        "seed.deep",
        "seed is a value, not a section",
        "set seed=... itself",
    )


def test_override_that_is_not_yaml_is_refused(write) -> None:
    error = refusal_of(write("seed: 0"), "run.dir=[a")
    assert (error.where, error.value, error.fix) == ("run.dir", "[a", "run.dir='\"[a\"'")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.moe.topk=2", "did you mean model.moe.top_k?"),
        ("train.step=2", "did you mean train.steps?"),
        ("num_experts=4", "did you mean model.moe.num_experts?"),
        ("modle.width=4", "did you mean model?"),
        ("optimizer.zebra=1", "keys here: optimizer.lr, optimizer.min_lr_fraction"),
        ("zebra=1", "keys here: seed, run, data"),
    ],
)
def test_unknown_key_names_the_closest(write, override: str, fix: str) -> None:
    error = refusal_of(write("seed: 0"), override)
    assert error.rule == "unknown key"
    assert error.fix.startswith(fix)


def test_closest_key_is_not_led_by_a_long_common_prefix() -> None:
    assert "did you mean" not in closest_key("model.moe.xyzzy")


def test_duplicate_key_is_refused_with_its_line(write) -> None:
    error = refusal_of(write("train:\n  steps: 1\n  steps: 2\n"))
    assert error.where.endswith("run.yaml: line 3")
    assert error.value == "steps"
    assert "only once" in error.rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("train: [1", "valid YAML"),
        ("- a\n- b\n", "a config file is a mapping of keys"),
        ("", "a config file is a mapping"),
    ],
)
def test_file_that_is_no_mapping_is_refused(write, text: str, rule: str) -> None:
    assert refusal_of(write(text)).rule.startswith(rule)


def test_file_missing_names_the_close_one(write, tmp_path: Path) -> None:
    write("seed: 0", "demo.yaml")
    error = refusal_of(tmp_path / "dmeo.yaml")
    assert error.fix == f"did you mean {tmp_path / 'demo.yaml'}?"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.steps=0", "must be greater than or equal to 1"),
        ("train.steps=1.0", "must be a valid integer"),
        ("train.steps=true", "must be a valid integer"),
        ("train.steps='3'", "must be a valid integer"),
        ("optimizer.lr=.nan", "must be a finite number"),
        ("optimizer.lr=.inf", "must be a finite number"),
        ("model.tie_embeddings=1", "must be a valid boolean"),
        ("train.precision=fp16", "must be 'fp32', 'bf16' or 'fp64'"),
        ("run.dir=3", "must be a valid string"),
        ("model=3", "is a section: its keys stand below it"),
    ],
)
def test_wrong_type_or_range_is_refused_without_conversion(write, override: str, rule: str) -> None:
    error = refusal_of(write("seed: 0"), override)
    assert (error.where, error.rule) == (override.partition("=")[0], rule)


def test_none_in_words_gets_null_as_its_fix(write) -> None:
    assert refusal_of(write("seed: 0"), "train.clip_norm=None").fix == "train.clip_norm=null if you mean none"


def test_wrong_item_of_a_list_points_to_the_key_to_explain(write) -> None:
    error = refusal_of(write("data: {suffixes: [.txt, 3]}"))
    assert error.where == "data.suffixes.1"
    assert "config explain data.suffixes`" in error.fix


def test_find_problems_lists_every_key_and_then_every_rule(write) -> None:
    path = write("train: {steps: 0, stride: 1}\nmodel: {num_heads: 6, num_kv_heads: 4, moe: {top_k: 9}}\n")
    assert [problem.where for problem in find_problems(read_tree(path))] == ["train.steps", "train.stride"]
    mended = read_tree(write("model: {num_heads: 6, num_kv_heads: 4, moe: {top_k: 9}}"))
    assert [problem.where for problem in find_problems(mended)] == ["model.num_kv_heads", "model.moe.top_k"]
    assert find_problems({}) == []


def test_config_is_frozen_and_its_sections_too() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.model.moe.top_k = 1  # type: ignore[misc]
    assert config == Config()


def test_parse_config_does_not_change_the_tree() -> None:
    tree = {"model": {"moe": {"top_k": 3}}, "data": {"suffixes": [".txt"]}}
    parse_config(tree)
    assert tree == {"model": {"moe": {"top_k": 3}}, "data": {"suffixes": [".txt"]}}


def test_key_paths_lists_sections_and_keys_in_order() -> None:
    paths = list(key_paths())
    assert len(paths) == len(set(paths))
    assert paths.index("model") < paths.index("model.width") < paths.index("model.moe.top_k") < paths.index("train")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_load_config_of_every_file_that_is_shipped(path: Path) -> None:
    load_config(path)

"""Every rule across keys, broken once."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from moe_dist.config import Config, attention_rules, cleaning_rules, parse_config, rules, run_rules
from moe_dist.config.load import read_tree, write_yaml
from moe_dist.config.rules import broken_rules, check_rules
from moe_dist.errors import ConfigError


def expert_choice(**changed: object) -> dict:
    """A legal tree with the expert-choice router, then changed."""
    moe = {"router": "expert_choice", "normalize_gates": False, "balance_loss": 0.0}
    moe |= {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, **changed}
    return {"model": {"moe": moe}, "generate": {"prompts": []}}


def hashed(**changed: object) -> dict:
    """A legal tree with the hash router, then changed."""
    return {"model": {"moe": {"router": "hash", "balance_loss": 0.0, "z_loss": 0.0, **changed}}}


# The broken keys, then what the error must say: key, value, a part of the rule, and the whole fix.
BROKEN = [
    (
        {"launch": {"workers": {"min": 3, "max": 2}}},
        ("launch.workers.min", 3, "must not exceed launch.workers.max (2)", "launch.workers.min=2"),
    ),
    (
        {"data": {"tokenizer": {"kind": "gpt2"}}},
        ("data.tokenizer.kind", "gpt2", "a tokenizer is trained", "data.tokenizer.kind=auto, or name a path"),
    ),
    (
        {"data": {"clean": {"rules": ["gopher_stop_words", "gopher_symbol"]}}},
        ("data.clean.rules", "gopher_symbol", "c4_javascript", "data.clean.rules=[gopher_symbols]"),
    ),
    (
        {"data": {"dedup": {"near": {"rows": 4}}}},
        (
            "data.dedup.near.rows",
            4,
            "looks for none",
            "data.dedup.near.rows=8, or data.dedup.near.similarity=0.7",
        ),
    ),
    (
        {"data": {"dedup": {"near": {"similarity": 0.5}}}},
        ("data.dedup.near.similarity", 0.5, "only 5.3% of pairs", "data.dedup.near.rows=4"),
    ),
    (
        {"data": {"decontaminate": {"text_field": "question"}}},
        (
            "data.decontaminate.text_field",
            "question",
            "looks for none",
            "data.decontaminate.text_field=null, or files in data.decontaminate.against",
        ),
    ),
    (
        {"model": {"moe": {"backend": "grouped", "expert_width": 13}}},
        ("model.moe.expert_width", 13, "whole 16 bytes", "model.moe.expert_width=16, or model.moe.backend=auto"),
    ),
    (
        {"model": {"moe": {"shared_expert_gate": True, "shared_expert_width": 0}}},
        ("model.moe.shared_expert_gate", True, "no shared expert", "model.moe.shared_expert_gate=false"),
    ),
    (
        {"model": {"moe": {"backend": "batched"}}},
        (
            "model.moe.backend",
            "batched",
            "equally many rows",
            "model.moe.backend=auto, or model.moe.pad_to_capacity=true",
        ),
    ),
    (
        {"model": {"moe": {"pad_to_capacity": True, "capacity_factor": 1.0}}},
        (
            "model.moe.capacity_factor_eval",
            None,
            "there is none",
            "model.moe.capacity_factor_eval=1.25, or model.moe.pad_to_capacity=false",
        ),
    ),
    (
        {
            "model": {"moe": {"pad_to_capacity": True, "capacity_factor": 1.0, "capacity_factor_eval": 1.0}},
            "parallel": {"dispatch": "deduplicated"},
        },
        (
            "parallel.dispatch",
            "deduplicated",
            "belong to no token",
            "parallel.dispatch=all_to_all, or model.moe.pad_to_capacity=false",
        ),
    ),
    (
        {
            "model": {"moe": {"pad_to_capacity": True, "capacity_factor": 1.0, "capacity_factor_eval": 1.0}},
            "parallel": {"overlap_chunks": 2},
        },
        (
            "parallel.overlap_chunks",
            2,
            "no part of the tokens",
            "parallel.overlap_chunks=1, or model.moe.pad_to_capacity=false",
        ),
    ),
    (
        {"model": {"num_heads": 6, "num_kv_heads": 4}},
        ("model.num_kv_heads", 4, "must divide model.num_heads (6)", "model.num_kv_heads=3"),
    ),
    (
        {"model": {"head_width": 63}},
        ("model.head_width", 63, "must be even", "model.head_width=64"),
    ),
    (
        {"model": {"attention": {"full_every_layers": 2}}},
        (
            "model.attention.full_every_layers",
            2,
            "none has one",
            "model.attention.full_every_layers=0, or model.attention.window_tokens=128",
        ),
    ),
    (
        {"model": {"attention": {"full_every_layers": 1, "window_tokens": 4}}},
        (
            "model.attention.full_every_layers",
            1,
            "no block has the window",
            "model.attention.full_every_layers=2, or model.attention.window_tokens=null",
        ),
    ),
    (
        {"model": {"num_heads": 4, "num_kv_heads": 2, "attention": {"kind": "latent"}}},
        ("model.num_kv_heads", 2, "for each of model.num_heads (4)", "model.num_kv_heads=4"),
    ),
    (
        {"model": {"num_kv_heads": 4, "attention": {"kind": "latent", "qk_norm": "head"}}},
        ("model.attention.qk_norm", "head", "norms what", "model.attention.qk_norm=none"),
    ),
    (
        {"model": {"num_kv_heads": 4, "attention": {"kind": "latent", "qkv_bias": True}}},
        ("model.attention.qkv_bias", True, "have no bias", "model.attention.qkv_bias=false"),
    ),
    (
        {"model": {"rope_scaling": {"kind": "ntk", "mscale": 1.0}}},
        ("model.rope_scaling.mscale", 1.0, "is not read with", "model.rope_scaling.mscale=null"),
    ),
    (
        {"model": {"head_width": 2, "rope_scaling": {"kind": "ntk", "factor": 2.0}}},
        ("model.rope_scaling.kind", "ntk", "a head turns 2 channels", "model.rope_scaling.kind=linear"),
    ),
    (
        {"model": {"rope_scaling": {"kind": "yarn", "beta_slow": 40.0}}},
        ("model.rope_scaling.beta_slow", 40.0, "must be less", "model.rope_scaling.beta_slow=16.0"),
    ),
    (
        {"model": {"rope_scaling": {"kind": "yarn", "mscale": 1.0}}},
        ("model.rope_scaling.mscale", 1.0, "latent attention only", "model.rope_scaling.mscale=null"),
    ),
    (
        {
            "model": {
                "num_kv_heads": 4,
                "attention": {"kind": "latent"},
                "rope_scaling": {"kind": "yarn", "mscale_all_dim": 0.7},
            }
        },
        ("model.rope_scaling.mscale", None, "both or none", "model.rope_scaling.mscale=0.7"),
    ),
    (
        {"model": {"num_layers": 2, "num_dense_layers": 3}},
        ("model.num_dense_layers", 3, "must not exceed model.num_layers (2)", "model.num_dense_layers=2"),
    ),
    (
        {"model": {"moe": {"num_experts": 4, "top_k": 5}}},
        ("model.moe.top_k", 5, "model.moe.num_experts=4", "model.moe.top_k=4 or less"),
    ),
    (
        {"model": {"moe": {"constant_gate": True}}},
        ("model.moe.constant_gate", True, "top_k=1 and normalize_gates", "model.moe.constant_gate=false"),
    ),
    (
        {"model": {"moe": {"top_k": 1}}},
        ("model.moe.normalize_gates", True, "always 1", "model.moe.normalize_gates=false"),
    ),
    (
        {"model": {"moe": {"router": "switch", "top_k": 2, "normalize_gates": False}}},
        ("model.moe.top_k", 2, "one expert", "model.moe.top_k=1, or model.moe.router=softmax_topk"),
    ),
    (
        {"model": {"moe": {"router": "gshard", "top_k": 3}}},
        ("model.moe.top_k", 3, "two experts", "model.moe.top_k=2, or model.moe.router=softmax_topk"),
    ),
    (
        {"model": {"moe": {"router": "gshard", "normalize_gates": False}}},
        ("model.moe.normalize_gates", False, "sum to one", "model.moe.normalize_gates=true"),
    ),
    (
        expert_choice(normalize_gates=True),
        ("model.moe.normalize_gates", True, "raw probability", "model.moe.normalize_gates=false"),
    ),
    (
        expert_choice(capacity_factor=None),
        ("model.moe.capacity_factor", None, "without one it takes all", "model.moe.capacity_factor=1.0"),
    ),
    (
        expert_choice(drop_policy="position_token_major"),
        ("model.moe.drop_policy", "position_token_major", "most probable", "model.moe.drop_policy=probability"),
    ),
    (
        expert_choice(renormalize_after_drop=True),
        ("model.moe.renormalize_after_drop", True, "no sum to restore", "model.moe.renormalize_after_drop=false"),
    ),
    (
        expert_choice(balance_loss=0.5),
        ("model.moe.balance_loss", 0.5, "no gradient", "model.moe.balance_loss=0.0"),
    ),
    (
        expert_choice() | {"generate": {"prompts": ["def "]}},
        ("generate.prompts", ["def "], "no text can be generated", "generate.prompts=[]"),
    ),
    (
        hashed(z_loss=0.001),
        ("model.moe.z_loss", 0.001, "nothing to move", "model.moe.z_loss=0.0"),
    ),
    (
        hashed(normalize_gates=False),
        ("model.moe.normalize_gates", False, "no probabilities", "model.moe.normalize_gates=true"),
    ),
    (
        hashed(router_bias=True),
        ("model.moe.router_bias", True, "no linear map", "model.moe.router_bias=false"),
    ),
    (
        hashed(capacity_factor=1.0),
        ("model.moe.drop_policy", "probability", "to drop by", "model.moe.drop_policy=position_token_major"),
    ),
    (
        {"model": {"moe": {"router": "gshard", "num_groups": 2}}},
        ("model.moe.num_groups", 2, "model.moe.router is gshard", "model.moe.num_groups=1"),
    ),
    (
        {"model": {"moe": {"router": "noisy_topk", "selection_bias": True}}},
        ("model.moe.selection_bias", True, "model.moe.router is noisy_topk", "model.moe.selection_bias=false"),
    ),
    (
        {"model": {"moe": {"num_experts": 12, "num_groups": 5}}},
        ("model.moe.num_groups", 5, "must divide model.moe.num_experts (12)", "model.moe.num_groups=4"),
    ),
    (
        {"model": {"moe": {"num_groups": 2, "groups_per_token": 3}}},
        ("model.moe.groups_per_token", 3, "must not exceed model.moe.num_groups (2)", "model.moe.groups_per_token=2"),
    ),
    (
        {"model": {"moe": {"num_groups": 4, "groups_per_token": 1, "top_k": 3}}},
        ("model.moe.groups_per_token", 1, "at least model.moe.top_k (3)", "model.moe.groups_per_token=2"),
    ),
    (
        {"model": {"moe": {"global_balance": "running"}}},
        (
            "model.moe.global_balance",
            "running",
            "model.moe.balance_scope is sequence",
            "model.moe.global_balance=exact, or model.moe.balance_scope=global",
        ),
    ),
    (
        {"model": {"moe": {"group_balance_loss": 0.1}}},
        (
            "model.moe.group_balance_loss",
            0.1,
            "always even",
            "model.moe.group_balance_loss=0.0, or model.moe.num_groups=2 or more",
        ),
    ),
    (
        {"parallel": {"data": "zero1", "data_shard": 2}},
        (
            "parallel.data_shard",
            2,
            "parallel.data is zero1",
            "parallel.data_shard=null, or parallel.data=fsdp",
        ),
    ),
    (
        {"parallel": {"ranks_per_node": 2}},
        (
            "parallel.ranks_per_node",
            2,
            "parallel.dispatch is all_to_all",
            "parallel.ranks_per_node=null, or parallel.dispatch=two_level",
        ),
    ),
    (
        {"parallel": {"dispatch": "deepep", "overlap_chunks": 2}, "train": {"precision": "bf16"}},
        (
            "parallel.overlap_chunks",
            2,
            "not overlapped",
            "parallel.overlap_chunks=1, or parallel.dispatch=deduplicated",
        ),
    ),
    (
        {"parallel": {"dispatch": "deepep"}},
        (
            "parallel.dispatch",
            "deepep",
            "train.precision is fp32",
            "train.precision=bf16, or parallel.dispatch=deduplicated",
        ),
    ),
    (
        {"model": {"moe": {"backend": "grouped"}}, "train": {"precision": "fp64"}},
        ("model.moe.backend", "grouped", "has no fp64", "model.moe.backend=loop"),
    ),
    (
        {"run": {"dir": "r"}, "train": {"routing_ledger": "record", "routing_replay": "r/routing"}},
        ("train.routing_ledger", "record", "overwrite the ledger", "train.routing_ledger=none, or another run.dir"),
    ),
    (
        {"parallel": {"tensor": 2}, "train": {"routing_ledger": "record"}},
        ("parallel.tensor", 2, "whole rows of a rank", "parallel.tensor=1"),
    ),
]


@pytest.mark.parametrize(
    "tree", [expert_choice(capacity_factor_eval=None), hashed(balance_loss=0.1), hashed(input_jitter=0.1)]
)
def test_rule_for_several_keys_names_the_one_that_broke_it(tree: dict) -> None:
    (error,) = broken_rules(Config.model_validate(tree))
    key = error.where.rpartition(".")[2]
    assert error.value == tree["model"]["moe"][key] and error.fix.startswith(f"{error.where}=")


@pytest.mark.parametrize(("tree", "expected"), BROKEN, ids=[expected[0] for _, expected in BROKEN])
def test_rule_broken_names_key_value_rule_and_fix(tree: dict, expected: tuple) -> None:
    config = Config.model_validate(tree)
    (error,) = broken_rules(config)
    where, value, rule, fix = expected
    assert (error.where, error.value, error.fix) == (where, value, fix)
    assert rule in error.rule
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert caught.value.args == error.args
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("tree", "expected"), BROKEN, ids=[expected[0] for _, expected in BROKEN])
def test_rule_broken_its_own_fix_passes(tree: dict, expected: tuple, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(write_yaml(tree))
    override = expected[3].partition(",")[0].removesuffix(" or less")
    assert list(broken_rules(parse_config(read_tree(path, [override])))) == []


def test_rules_every_one_is_broken_here() -> None:
    sources = map(inspect.getsource, (rules, run_rules, attention_rules, cleaning_rules))
    assert len(BROKEN) == sum(source.count("yield ConfigError(") for source in sources)


def test_rules_defaults_keep_them_all() -> None:
    check_rules(Config())
    assert list(broken_rules(Config())) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"moe": {"top_k": 1, "normalize_gates": False}}},
        {"model": {"moe": {"num_experts": 4, "top_k": 4}}},
        {"model": {"moe": {"router": "switch", "top_k": 1, "normalize_gates": False}}},
        {"model": {"moe": {"router": "gshard", "input_jitter": 0.01, "router_bias": True}}},
        {"model": {"moe": {"router": "sigmoid_topk", "num_groups": 4, "groups_per_token": 2, "top_k": 4}}},
        {"model": {"moe": {"selection_bias": True, "balance_loss": 0.0}}},
        {"model": {"moe": {"num_groups": 8, "groups_per_token": 8}}},
        expert_choice(),
        hashed(top_k=1),
        hashed(capacity_factor=1.0, drop_policy="position_choice_major"),
        {"model": {"num_layers": 2, "num_dense_layers": 2}},
        {"model": {"moe": {"balance_scope": "global"}}, "train": {"micro_batch_sequences": 1}},
        {"model": {"moe": {"balance_scope": "global", "global_balance": "running"}}},
        {"model": {"moe": {"group_balance_loss": 0.1, "num_groups": 2, "groups_per_token": 2}}},
        {"run": {"dir": "r"}, "train": {"routing_ledger": "record", "routing_replay": "r/old"}},
    ],
)
def test_rules_values_at_the_border_pass(tree: dict) -> None:
    assert list(broken_rules(parse_config(tree))) == []


def test_rules_several_broken_are_all_yielded_in_order() -> None:
    config = Config.model_validate({"model": {"head_width": 63, "moe": {"num_experts": 4, "top_k": 5}}})
    assert [error.where for error in broken_rules(config)] == ["model.head_width", "model.moe.top_k"]
    with pytest.raises(ConfigError, match=r"model\.head_width"):
        check_rules(config)

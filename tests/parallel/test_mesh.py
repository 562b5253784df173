"""Layouts: which are legal, who owns which expert."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import ParallelConfig
from moe_dist.errors import LayoutError
from moe_dist.parallel.layout import Layout, layout_of, legal_layouts, ranks_of_node
from tests.support.models import small_config


def config_of(experts=8, model=None, **parallel):
    return small_config(
        {"num_experts": experts, "top_k": 1, "normalize_gates": False}, model=model or {}, parallel=parallel
    )


@given(ranks=st.integers(1, 64), experts=st.integers(2, 64))
def test_layout_chosen_by_itself_is_legal_and_covers_every_expert_once(ranks, experts):
    layout = layout_of(config_of(experts), ranks)
    assert ranks % layout.expert == 0 and layout.expert <= experts
    owned = [expert for place in range(layout.expert) for expert in layout.experts_of(place)]
    assert owned == list(range(experts))
    sizes = [len(layout.experts_of(place)) for place in range(layout.expert)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("ranks", "experts", "expected"), [(1, 8, 1), (2, 8, 2), (3, 8, 3), (4, 8, 4), (16, 8, 8), (7, 4, 1)]
)
def test_layout_takes_the_largest_divisor_not_above_the_experts(ranks, experts, expected):
    assert layout_of(config_of(experts), ranks).expert == expected


@pytest.mark.parametrize(
    ("asked", "nearest"), [(3, "parallel.expert=2"), (16, "parallel.expert=8"), (5, "parallel.expert=4")]
)
def test_layout_illegal_degree_names_the_nearest_legal_one(asked, nearest):
    with pytest.raises(LayoutError) as caught:
        layout_of(config_of(expert=asked), 16 if asked != 3 else 8)
    assert caught.value.where == "parallel.expert" and caught.value.value == asked
    assert nearest in caught.value.fix
    assert caught.value.exit_code == 2


def test_nodes_and_rails_stay_inside_expert_groups():
    nodes, rails = Layout(8, 4, 8, ranks_per_node=2).node_groups()
    assert nodes == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rails == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(("asked", "nearest"), [(3, 2), (8, 4), (5, 4)])
def test_layout_nodes_that_cut_an_expert_group_unequally_name_the_nearest_that_do_not(asked, nearest):
    with pytest.raises(LayoutError) as caught:
        layout_of(config_of(expert=4), 8, ranks_per_node=asked)
    assert caught.value.where == "parallel.ranks_per_node" and caught.value.value == asked
    assert caught.value.fix == f"parallel.ranks_per_node={nearest}"


@pytest.mark.parametrize(
    ("asked", "key", "rule", "fix"),
    [
        ({"tensor": 4}, "tensor", "must divide model.num_kv_heads (2)", "parallel.tensor=2"),
        ({"tensor": 3}, "tensor", "must divide the 8 ranks", "parallel.tensor=2"),
        ({"expert_tensor": 8}, "expert_tensor", "must divide model.moe.expert_width (12)", "parallel.expert_tensor=4"),
        ({"expert": 8, "expert_tensor": 2}, "expert", "over parallel.expert_tensor (2)", "parallel.expert_tensor=1"),
    ],
)
def test_layout_that_cannot_work_names_rule_and_nearest_legal_one(asked, key, rule, fix):
    with pytest.raises(LayoutError) as caught:
        layout_of(config_of(model={"num_kv_heads": 2}, **asked), 8)
    assert caught.value.where == f"parallel.{key}" and rule in caught.value.rule
    first = caught.value.fix.partition(" (or ")[0]
    assert first.startswith(fix)
    changed = {name.removeprefix("parallel."): int(n) for name, n in (part.split("=") for part in first.split())}
    assert layout_of(config_of(model={"num_kv_heads": 2}, **(asked | changed)), 8)


@given(ranks=st.integers(1, 24))
def test_every_legal_layout_covers_its_ranks_in_both_views(ranks):
    found = legal_layouts(config_of(model={"num_kv_heads": 2}), ranks)
    assert Layout(ranks, 1, 8) in found
    for layout in found:
        groups = layout.groups()
        for kind, size in (("tensor", layout.tensor), ("data", layout.data), ("expert", layout.expert)):
            assert {len(group) for group in groups[kind]} == {size}
        for groups_of_kind in groups.values():
            assert sorted(rank for group in groups_of_kind for rank in group) == list(range(ranks))
        for group in groups["expert"]:
            assert [layout.expert_place(rank) for rank in group] == list(range(layout.expert))
        for group in groups["expert_data"]:
            assert len({layout.expert_place(rank) for rank in group}) == 1 and len(group) == layout.expert_data


def test_ranks_of_a_node_come_from_the_config_then_the_launcher():
    two_level = ParallelConfig(dispatch="two_level")
    assert ranks_of_node(ParallelConfig(), {"LOCAL_WORLD_SIZE": "8"}) is None
    assert ranks_of_node(two_level, {"LOCAL_WORLD_SIZE": "8"}) == 8
    assert ranks_of_node(ParallelConfig(dispatch="two_level", ranks_per_node=2), {"LOCAL_WORLD_SIZE": "8"}) == 2
    for environment, shown in (({}, "not set"), ({"LOCAL_WORLD_SIZE": "many"}, "many")):
        with pytest.raises(LayoutError) as caught:
            ranks_of_node(two_level, environment)
        assert caught.value.where == "parallel.ranks_per_node" and caught.value.rule.endswith(shown)

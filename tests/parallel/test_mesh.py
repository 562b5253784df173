"""Layouts: which are legal, who owns which expert."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import ParallelConfig
from moe_dist.errors import LayoutError
from moe_dist.parallel.mesh import Layout, choose_layout, node_groups, ranks_of_node


@given(ranks=st.integers(1, 64), experts=st.integers(2, 64))
def test_layout_chosen_by_itself_is_legal_and_covers_every_expert_once(ranks, experts):
    layout = choose_layout(None, ranks, experts)
    assert ranks % layout.expert == 0 and layout.expert <= experts
    owned = [expert for place in range(layout.expert) for expert in layout.experts_of(place)]
    assert owned == list(range(experts))
    sizes = [len(layout.experts_of(place)) for place in range(layout.expert)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("ranks", "experts", "expected"), [(1, 8, 1), (2, 8, 2), (3, 8, 3), (4, 8, 4), (16, 8, 8), (7, 4, 1)]
)
def test_layout_takes_the_largest_divisor_not_above_the_experts(ranks, experts, expected):
    assert choose_layout(None, ranks, experts).expert == expected


@pytest.mark.parametrize(
    ("asked", "nearest"), [(3, "parallel.expert=2"), (16, "parallel.expert=8"), (5, "parallel.expert=4")]
)
def test_layout_illegal_degree_names_the_nearest_legal_one(asked, nearest):
    with pytest.raises(LayoutError) as caught:
        choose_layout(asked, 16 if asked != 3 else 8, 8)
    assert caught.value.where == "parallel.expert" and caught.value.value == asked
    assert nearest in caught.value.fix
    assert caught.value.exit_code == 2


def test_nodes_and_rails_stay_inside_expert_groups():
    nodes, rails = node_groups(Layout(8, 4, 8, ranks_per_node=2))
    assert nodes == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rails == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(("asked", "nearest"), [(3, 2), (8, 4), (5, 4)])
def test_layout_nodes_that_cut_an_expert_group_unequally_name_the_nearest_that_do_not(asked, nearest):
    with pytest.raises(LayoutError) as caught:
        choose_layout(4, 8, 8, ranks_per_node=asked)
    assert caught.value.where == "parallel.ranks_per_node" and caught.value.value == asked
    assert caught.value.fix == f"parallel.ranks_per_node={nearest}"


def test_ranks_of_a_node_come_from_the_config_then_the_launcher():
    two_level = ParallelConfig(dispatch="two_level")
    assert ranks_of_node(ParallelConfig(), {"LOCAL_WORLD_SIZE": "8"}) is None
    assert ranks_of_node(two_level, {"LOCAL_WORLD_SIZE": "8"}) == 8
    assert ranks_of_node(ParallelConfig(dispatch="two_level", ranks_per_node=2), {"LOCAL_WORLD_SIZE": "8"}) == 2
    for environment, shown in (({}, "not set"), ({"LOCAL_WORLD_SIZE": "many"}, "many")):
        with pytest.raises(LayoutError) as caught:
            ranks_of_node(two_level, environment)
        assert caught.value.where == "parallel.ranks_per_node" and caught.value.rule.endswith(shown)

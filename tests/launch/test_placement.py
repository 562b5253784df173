"""Which node holds which rank, and which layout a number of ranks gets."""

from __future__ import annotations

import pytest

from launch.placement import Needs, Node, place, places
from launch.refit import refitted
from moe_dist.config import parse_config
from moe_dist.errors import LayoutError

NODES = [Node("a", {"CPU": 2.0}), Node("b", {"CPU": 4.0, "GPU": 1.0}), Node("head", {}), Node("c", {"CPU": 2.0})]
NEEDS = Needs(1.0, 0.0)


@pytest.mark.parametrize(
    ("placement", "ranks", "expected"),
    [
        ("pack", 5, "b b b b a"),
        ("pack", 2, "b b"),
        ("spread", 4, "b b a c"),
        ("spread", 8, "b b b b a a c c"),
        ("strict_spread", 2, "b a"),
        ("strict_spread", 3, "b a c"),
    ],
)
def test_ranks_of_a_node_are_neighbours(placement: str, ranks: int, expected: str) -> None:
    assert place(NODES, NEEDS, placement, ranks) == expected.split()


def test_room_counts_what_a_rank_takes() -> None:
    assert places(NODES, NEEDS, "pack") == 8 and places(NODES, NEEDS, "strict_spread") == 3
    assert places(NODES, Needs(1.0, 1.0), "pack") == 1 and places(NODES, Needs(3.0, 0.0), "spread") == 1


def test_degrees_that_do_not_fit_give_way_to_the_nearest() -> None:
    tree = {"launch": {"workers": {"min": 1, "max": 4}}, "parallel": {"tensor": 2, "expert": 4}}
    config, said = parse_config(tree), list[str]()
    assert refitted(config, 4, said.append) is config and not said
    three = refitted(config, 3, said.append).parallel
    assert (three.tensor, three.expert, three.expert_tensor) == (1, 3, 1) and "3 ranks" in said[0]
    two = refitted(config, 2).parallel
    assert (two.tensor, two.expert) == (2, 2)
    fixed = parse_config({"launch": {"workers": 4}, "parallel": {"tensor": 2}})
    with pytest.raises(LayoutError):
        refitted(fixed, 3)


def test_workers_is_a_number_or_a_range() -> None:
    workers = parse_config({"launch": {"workers": 3}}).launch.workers
    assert (workers.min, workers.max) == (3, 3)
    workers = parse_config({"launch": {"workers": {"min": 1, "max": 3}}}).launch.workers
    assert (workers.min, workers.max) == (1, 3)

"""Recompute changes no bit: routing, telemetry, gradients and weights are those without it, for every dispatcher on
several ranks, with jitter, drops, empty micro-batches and ranks; and nothing is asked or computed twice beyond it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.model.attention import Attention
from moe_dist.model.feed_forward import FeedForward
from moe_dist.moe.experts import Experts
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.language_modelling import language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.parallel import expert, recompute
from moe_dist.parallel.collectives import Voyage
from moe_dist.train.step import StepFigures, autocast, train_step
from tests.support import fake_deep_ep
from tests.support.gang import run_gang
from tests.support.models import LENGTH, random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.planted import failure_with
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE
from tests.support.wire import Wire

KINDS = ("none", "selective", "full")
JITTER = {"input_jitter": 0.1, "balance_loss": 0.3}
# name: (moe options, model options)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact global balance, groups, bias, drops": (
        {**JITTER, **ROUTERS["sigmoid, groups, bias"], "capacity_factor": 1.0, "balance_scope": "global"},
        {},
    ),
    "global balance of the micro-step": ({**JITTER, "balance_scope": "global", "global_balance": "micro_step"}, {}),
    "running global balance, gated shared expert": (
        {**JITTER, "balance_scope": "global", "global_balance": "running", "shared_expert_gate": True},
        {},
    ),
    "gshard, a dense block, untied": (
        {**JITTER, **ROUTERS["gshard"]},
        {"num_dense_layers": 1, "num_layers": 3, "tie_embeddings": False},
    ),
    # One expert has all rows, and where rows are weighed ahead nothing that the way home keeps is read in its backward:
    # ranks with and without rows would begin to compute again at different points.
    "all rows to one expert, weighed ahead": (
        {**ROUTERS["hash"], "weigh": "input", "shared_expert_width": 0, "backend": "reference"},
        {},
    ),
}
EQUAL_TO_ONE_PROCESS = ("exact global balance, groups, bias, drops", "gshard, a dense block, untied")
DISPATCHERS: dict[str, dict[str, Any]] = {
    **{name: {"dispatch": name} for name in ("all_to_all", "all_gather", "deduplicated")},
    "two_level": {"dispatch": "two_level", "ranks_per_node": 2},
    "all_to_all in two parts": {"dispatch": "all_to_all", "overlap_chunks": 2},
    "deduplicated in two parts": {"dispatch": "deduplicated", "overlap_chunks": 2},
}
# ranks: what is not crossed with everything: `parallel` and the precision
DEEPEP = {"deepep": ({"dispatch": "deepep"}, "bf16")}
FURTHER: dict[int, dict[str, tuple[dict[str, Any], str]]] = {
    2: {**DEEPEP, "tensor 2": ({"tensor": 2, "expert": 2}, "fp64")},
    4: {
        **DEEPEP,
        "tensor 2, expert 4, in parts": ({"tensor": 2, "expert": 4, "overlap_chunks": 2}, "fp64"),
        "tensor 2, expert 2, expert-tensor 2": ({"tensor": 2, "expert": 2, "expert_tensor": 2}, "fp64"),
    },
}
TWO = ("all_to_all", "deduplicated in two parts")  # will do where a variant is about something else than rows
ROWS = {2: 3, 4: 5}  # unequal ranks, and in micro-batches of one an empty one
FEW = 3  # of four ranks one has no row at all
WITH_ALL = ("global balance of the micro-step", "all rows to one expert, weighed ahead")


def config_of(variant: str, dispatch: str, kind: str, rows: int) -> Config:
    moe, model = VARIANTS[variant]
    train = {"global_batch_sequences": rows, "micro_batch_sequences": 1, "recompute": kind, "steps": 4}
    return small_config(moe, model=model, train=train, parallel=DISPATCHERS[dispatch])


def rows_of(variant: str, count: int) -> Tensor:
    return torch.full((count, LENGTH + 1), 7) if "one expert" in variant else random_rows(count)


def cut(rows: Tensor, ranks: int) -> list[Tensor]:
    return [rows[len(rows) * r // ranks : len(rows) * (r + 1) // ranks] for r in range(ranks)]


@contextmanager
def counted_calls() -> Iterator[dict[str, int]]:
    """Forwards of the parts of a block, and sums of counts that layers ask of all ranks."""
    calls = dict.fromkeys(("attention", "feed_forward", "experts", "asked"), 0)

    def counting(name: str, run: Any, *given: Any) -> Any:
        calls[name] += 1
        return run(*given)

    parts = {"attention": Attention, "feed_forward": FeedForward, "experts": Experts}
    with mock.patch.object(expert, "sum_ranks", partial(counting, "asked", expert.sum_ranks)):
        patched = []
        for name, part in parts.items():
            run = part.forward
            changed = lambda *given, name=name, run=run: counting(name, run, *given)  # noqa: E731
            patched.append(mock.patch.object(part, "forward", changed))
            patched[-1].start()
        try:
            yield calls
        finally:
            for patch in patched:
                patch.stop()


def two_steps(ranks: int, config: Config, rows: Tensor) -> dict[str, Any]:
    """What two steps made: figures, gradients of the last, weights and biases; what crossed and what was computed."""
    with Wire().tapped() as wire, counted_calls() as calls:
        trainee = parallel_trainee(config, config.parallel.expert or ranks)
        mine = cut(rows, trainee.mesh.layout.data)[trainee.mesh.data_place]
        figures = [train_step(trainee, mine, step) for step in range(2)]
    grads = {name: parameter.grad for name, parameter in trainee.model.named_parameters()}
    state = trainee.model.state_dict()
    return {"figures": figures, "grads": grads, "state": state, "sent": wire.taken(), "calls": calls}


Case = tuple[str, str, int]  # variant, dispatcher, rows


def cases_of(ranks: int) -> list[Case]:
    crossed = [(variant, dispatch) for variant in WITH_ALL for dispatch in DISPATCHERS]
    others = [(variant, dispatch) for variant in VARIANTS if variant not in WITH_ALL for dispatch in TWO]
    few = [(*case, FEW) for case in crossed] if ranks == 4 else []
    return [(*case, ROWS[ranks]) for case in crossed + others] + few


def all_steps(rank: int, ranks: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for variant, dispatch, count in cases_of(ranks):
        rows = rows_of(variant, count)
        for kind in KINDS:
            config = config_of(variant, dispatch, kind, count)
            found[variant, dispatch, count, kind] = two_steps(ranks, config, rows)
            if variant in EQUAL_TO_ONE_PROCESS and kind == "full":
                found["proof", variant, dispatch, count, kind] = candidate_step(rank, config, ranks, cut(rows, ranks))
    with mock.patch.dict(sys.modules, {"deep_ep": fake_deep_ep}):
        for name, (parallel, precision) in FURTHER[ranks].items():
            for kind in KINDS:
                train = {"global_batch_sequences": 5, "micro_batch_sequences": 1, "recompute": kind}
                moe, model = VARIANTS["running global balance, gated shared expert"]
                model = {**model, "num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1, "num_layers": 3}
                config = small_config(moe, train={**train, "precision": precision}, model=model, parallel=parallel)
                found[name, kind] = two_steps(ranks, config, random_rows(5))
    return found


@cache
def steps_on(ranks: int) -> list[dict[Any, Any]]:
    return run_gang(all_steps, ranks, ranks)


def told(figures: StepFigures) -> dict[str, Any]:
    """Every figure, in a form that compares."""
    values = dataclasses.asdict(figures)
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [told(figures) for figures in found["figures"]] == [told(figures) for figures in expected["figures"]]
    for tensors in ("grads", "state"):
        assert found[tensors].keys() == expected[tensors].keys()
        for name, tensor in expected[tensors].items():
            assert torch.equal(found[tensors][name], tensor), name


@pytest.mark.parametrize("ranks", ROWS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_recompute_changes_no_bit_on_any_rank_with_any_dispatcher(ranks, kind):
    for rank, found in enumerate(steps_on(ranks)):
        for case in cases_of(ranks):
            try:
                assert_same_steps(found[*case, kind], found[*case, "none"])
            except AssertionError as failure:
                raise AssertionError(f"rank {rank}, {case}: {failure}") from failure
        for name in FURTHER[ranks]:
            assert_same_steps(found[name, kind], found[name, "none"])


@cache
def expected_of(variant: str, count: int) -> Any:
    moe, model = VARIANTS[variant]
    config = small_config(moe, model=model, train={"global_batch_sequences": count})
    return oracle_step(config, rows_of(variant, count))


@pytest.mark.parametrize("ranks", ROWS)
@pytest.mark.parametrize("variant", EQUAL_TO_ONE_PROCESS)
def test_recompute_on_several_ranks_makes_the_step_of_one_process(ranks, variant):
    for case in (case for case in cases_of(ranks) if case[0] == variant):
        proofs = [found["proof", *case, "full"] for found in steps_on(ranks)]
        difference = first_difference(proofs, expected_of(variant, case[2]), RELATIVE[torch.float64])
        assert difference is None, f"{case}: {difference}"


@pytest.mark.parametrize("ranks", ROWS)
def test_recompute_asks_no_rank_about_balance_again_and_sends_again_only_where_full(ranks):
    for case in cases_of(ranks):
        none, selective, full = ([found[*case, kind] for found in steps_on(ranks)] for kind in KINDS)
        asked = [{rank["calls"]["asked"] for rank in ranks_of_kind} for ranks_of_kind in (none, selective, full)]
        assert asked[0] == asked[1] == asked[2] and len(asked[0]) == 1, case
        assert (asked[0] == {0}) == ("micro-step" not in case[0] and "running" not in case[0]), case
        sent = [sum(rank["sent"] for rank in ranks_of_kind) for ranks_of_kind in (none, selective, full)]
        assert sent[0] == sent[1], case
        assert sent[2] - sent[0] == sum(figures.bytes_sent for figures in none[0]["figures"]), case


def test_recompute_selective_runs_no_expert_again_and_everything_else_inside_blocks():
    for case in cases_of(2):
        none, selective, full = (steps_on(2)[0][*case, kind]["calls"] for kind in KINDS)
        trained = 2 * 2 * VARIANTS[case[0]][1].get("num_layers", 2)  # steps, micro-batches, blocks
        assert selective["experts"] == none["experts"] < full["experts"]
        assert selective["attention"] == full["attention"] == none["attention"] + trained
        feed_forwards = 0 if "one expert" in case[0] else trained
        assert selective["feed_forward"] == full["feed_forward"] == none["feed_forward"] + feed_forwards


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.usefixtures("alone", "one_thread")
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_recompute_under_autocast_changes_no_bit(precision):
    found = {}
    for kind in KINDS:
        train = {"precision": precision, "recompute": kind, "micro_batch_sequences": 2, "global_batch_sequences": 5}
        found[kind] = two_steps(1, small_config(JITTER, train=train), random_rows(5))
    for kind in KINDS[1:]:
        assert_same_steps(found[kind], found["none"])


def kept_bytes(kind: str) -> int:
    """Bytes that a forward keeps for its backward, every storage once."""
    config = small_config(JITTER, train={"recompute": kind}, model={"num_layers": 4, "num_dense_layers": 2})
    model = parallel_trainee(config, 1).model
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(config, torch.device("cpu")):
        language_modelling_sums(model, MicroBatch.of(random_rows(6)), Draw(0, 0, 0))
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for where, size in sizes.items() if where not in own)


@pytest.mark.usefixtures("alone", "one_thread")
def test_recompute_keeps_less_the_more_it_computes_again():
    none, selective, full = (kept_bytes(kind) for kind in KINDS)
    assert full < selective < none


def events_of_backward() -> list[str]:
    """Attentions computed again and exchanges begun in a backward pass, where the way home keeps nothing to be read."""
    variant = "all rows to one expert, weighed ahead"
    config = config_of(variant, "deduplicated", "full", 2)
    trainee = parallel_trainee(config, 1)
    for _, layer in trainee.model.moe_layers():  # one rank would exchange nothing
        layer.dispatcher = expert.build_dispatcher(trainee.mesh, config.parallel, config.model)
    sums = language_modelling_sums(trainee.model, MicroBatch.of(rows_of(variant, 2)))
    events: list[str] = []

    def noting(event: str, run: Any) -> Any:
        return lambda *given: events.append(event) or run(*given)

    with (
        mock.patch.object(Attention, "forward", noting("again", Attention.forward)),
        mock.patch.object(Voyage, "start", noting("exchange", Voyage.start)),
    ):
        sums.cross_entropy.backward()
    return events


@pytest.mark.usefixtures("alone", "one_thread")
def test_recompute_is_the_first_that_the_backward_of_a_block_does():
    events = events_of_backward()
    again = [place for place, event in enumerate(events) if event == "again"]
    exchanges = len(events) // 2 - 1
    assert exchanges > 0 and again == [0, 1 + exchanges], "each of the two blocks first runs again"


def decides_without_demand(run: Any, context: Any, block: int) -> Any:
    return original_decide(lambda x, told: run(x, dataclasses.replace(told, taken_demand=None)), context, block)


original_decide = recompute.decide_once


@pytest.mark.usefixtures("alone", "one_thread")
def test_recompute_takes_the_demand_that_the_first_run_took():
    calls = {}
    for kind in KINDS:
        config = config_of("global balance of the micro-step", "all_to_all", kind, 2)
        calls[kind] = two_steps(1, config, random_rows(2))["calls"]["asked"]
    assert calls["none"] == calls["selective"] == calls["full"] > 0


class _NeverFirst:
    """In place of the last node of a block: nothing."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return x


PLANTED = {
    "recomputed block asks the ranks about balance again": (
        *(recompute, "decide_once", decides_without_demand),
        test_recompute_takes_the_demand_that_the_first_run_took,
    ),
    "block computed again where its backward first reads": (
        *(recompute, "_FirstInBackward", _NeverFirst),
        test_recompute_is_the_first_that_the_backward_of_a_block_does,
    ),
}


@pytest.mark.usefixtures("alone", "one_thread")
@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistake_is_caught(mistake):
    assert failure_with(PLANTED[mistake]) is not None

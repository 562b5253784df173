"""What is put in place of the right code of a rank, by the mistakes of `mistakes.py`. Each returns a patch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config, parse_config
from moe_dist.model import init
from moe_dist.model.transformer import Transformer
from moe_dist.moe import balance, expert_loop, layer, router_kinds
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.ledger import decide_once
from moe_dist.moe.selection import moved_bias
from moe_dist.objectives.language_modelling import LossSums
from moe_dist.parallel import dispatch_all_to_all, expert_tensor, recompute, tensor
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.collectives import arrived_rows, start_rows, sum_ranks
from moe_dist.parallel.dispatch_by_token import TokenDispatcher
from moe_dist.parallel.gradients import Gradients
from moe_dist.train import step as step_module
from moe_dist.verify import proof as proof_module
from moe_dist.verify import step as proof_step
from tests.support.planted import idle_experts_unfilled, named_by_place

Patch = AbstractContextManager[Any]


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """A config with other values, by dotted key."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        *path, name = key.split(".")
        branch = tree
        for part in path:
            branch = branch[part]
        branch[name] = value
    return parse_config(tree)


def ranks_configured(changes: dict[str, Any]) -> Patch:
    """The ranks run with another config than the oracle."""
    original = proof_module.parallel_trainee
    changed = lambda config, mesh: original(with_changes(config, changes), mesh)  # noqa: E731
    return mock.patch.object(proof_module, "parallel_trainee", changed)


def first_weights_by_rank() -> Patch:
    original = proof_step.initialise
    seeded = lambda model, seed, *given: original(model, seed + dist.get_rank(), *given)  # noqa: E731
    return mock.patch.object(proof_step, "initialise", seeded)


def experts_named_by_place() -> Patch:
    return mock.patch.object(init, "pieces_by_parameter", named_by_place)


def positions_by_rank() -> Patch:
    """Random numbers are named by a token's place on its rank."""
    positions = property(lambda self: torch.arange(self.token_T.numel()))
    return mock.patch.object(RoutingContext, "position_T", positions)


def scores_in_fp32() -> Patch:
    original = router_kinds.softmax_topk
    narrow = lambda logits_TE, *given: original(logits_TE.float().double(), *given)  # noqa: E731
    return mock.patch.object(router_kinds, "softmax_topk", narrow)


def gates_detached() -> Patch:
    original = MoELayer._weights
    return mock.patch.object(MoELayer, "_weights", lambda *given: original(*given).detach())


def demand_after_drops() -> Patch:
    original = layer.make_plan

    def make_plan(*given: Any) -> Any:
        made = original(*given)
        return replace(made, demand_E=made.served_E)

    return mock.patch.object(layer, "make_plan", make_plan)


def counted_in_every_forward() -> Patch:
    """A layer adds to its counter whenever it runs, and recompute runs it again."""
    original = MoELayer.forward

    def forward(self: MoELayer, *given: Any) -> Any:
        out, record = original(self, *given)
        counted = self.__dict__.setdefault("counted_E", torch.zeros_like(record.plan.demand_E))
        counted += record.plan.demand_E
        return out, replace(record, plan=replace(record.plan, demand_E=counted))

    return mock.patch.object(MoELayer, "forward", forward)


def _drawn_anew(context: RoutingContext, calls: Any) -> RoutingContext:
    assert context.draw is not None, "a step draws"
    return replace(context, draw=replace(context.draw, step=context.draw.step + next(calls)))


def recompute_draws_again() -> Patch:
    """The second run follows the choices, under other random numbers."""

    def once(run: Any, context: Any, block: int) -> Any:
        calls = itertools.count()
        return decide_once(lambda x, told: run(x, _drawn_anew(told, calls)), context, block)

    return mock.patch.object(recompute, "decide_once", once)


def recompute_routes_again() -> Patch:
    def again(run: Any, context: Any, block: int) -> Any:
        calls = itertools.count()
        return lambda x: run(x, _drawn_anew(context, calls))

    return mock.patch.object(recompute, "decide_once", again)


def idle_experts_not_filled() -> Patch:
    loop = expert_loop._ExpertLoop
    return mock.patch.object(loop, "backward", staticmethod(idle_experts_unfilled(loop.backward)))


def balance_times(factor: float) -> Patch:
    """Balance and z terms in what is differentiated, not in what is reported."""
    original = LossSums.total

    def total(self: LossSums, config: Any) -> Tensor:
        return self.cross_entropy + factor * (original(self, config) - self.cross_entropy)

    return mock.patch.object(LossSums, "total", total)


def balance_of_every_tensor_rank() -> Patch:
    """Each rank of a tensor group (of two) has the whole term."""
    original = balance.balance_sum
    return mock.patch.object(balance, "balance_sum", lambda *given: 2 * original(*given))


def mean_over_micro_batches() -> Patch:
    original = LossSums.total
    return mock.patch.object(LossSums, "total", lambda self, config: original(self, config) / 2)


def mean_of_means() -> Patch:
    """The loss is the mean over a rank's own tokens, and then over ranks."""
    original = LossSums.total

    def total(self: LossSums, config: Any) -> Tensor:
        own = torch.tensor(float(len(self.records[0].decision.expert_TK)))
        assert dist.group.WORLD is not None, "ranks run"
        return original(self, config) * (sum_ranks(own.clone(), dist.group.WORLD) / dist.get_world_size() / own)

    return mock.patch.object(LossSums, "total", total)


def rows_of_the_shortest() -> Patch:
    """Every rank takes as many rows as the one that has fewest (which is one), so that none waits."""
    original = step_module.micro_batches
    return mock.patch.object(step_module, "micro_batches", lambda rows, *given: original(rows[:1], *given))


def load_of_this_rank() -> Patch:
    original = step_module._Tally._over_all_ranks

    def over_all_ranks(self: Any) -> dict[str, Tensor]:
        return original(self) | {name: self.sums[name] for name in ("demand", "served")}

    return mock.patch.object(step_module._Tally, "_over_all_ranks", over_all_ranks)


def biases_by_block() -> Patch:
    """The demands of the layers with experts are handed to all blocks, dense ones too."""

    @torch.no_grad()
    def move(model: Any, demand: Tensor) -> None:
        for block, demand_E in zip(model.blocks, demand, strict=False):
            if isinstance(block.feed_forward, MoELayer):
                bias_E = block.feed_forward.router.selection_bias
                bias_E.copy_(moved_bias(bias_E, demand_E, block.feed_forward.config.bias_update_rate))

    return mock.patch.object(step_module, "move_selection_biases", move)


def partial_sums() -> Patch:
    """A rank keeps its own part of what the ranks of a tensor group should add up."""

    def own_part(y_TD: Tensor, group: Any) -> Tensor:
        ranks = dist.get_world_size(group)
        each = [y_TD.shape[0] // ranks] * ranks
        return arrived_rows(start_rows(y_TD, each, each, group)).unflatten(0, (ranks, -1))[dist.get_rank(group)]

    return mock.patch.object(tensor, "sum_and_scatter", own_part)


def partial_rows() -> Patch:
    """A rank keeps its own part of what the cuts of an expert should add up."""

    def own_part(y_MD: Tensor, gathered: Any, group: Any) -> Tensor:
        ranks, place = len(gathered.sizes), dist.get_rank(group)
        by_rank_MD, here = y_MD.index_select(0, torch.argsort(gathered.order_M)), gathered.sizes[place]
        parts = arrived_rows(start_rows(by_rank_MD, gathered.sizes, [here] * ranks, group))
        return parts.unflatten(0, (ranks, here))[place]

    return mock.patch.object(expert_tensor, "sum_and_return", own_part)


def rows_in_order_of_arrival() -> Patch:
    unsorted = lambda counts_WL: torch.arange(int(counts_WL.sum()))  # noqa: E731
    return mock.patch.object(dispatch_all_to_all, "arrange_by_expert", unsorted)


def gates_of_rows(change: Callable[[Tensor], Tensor]) -> Patch:
    original = TokenDispatcher.gates_of_rows
    return mock.patch.object(TokenDispatcher, "gates_of_rows", lambda *given: change(original(*given)))


def output_weight_detached() -> Patch:
    detached = property(lambda self: self.embedding.weight.detach())
    return mock.patch.object(Transformer, "output_weight", detached)


def largest_of_this_rank() -> Patch:
    return mock.patch.object(tensor.SharedVocabulary, "largest", lambda self, value_C: value_C)


def after_reduce(change: Callable[[Gradients], None]) -> Patch:
    original = Gradients.reduce

    def reduce(self: Gradients) -> None:
        original(self)
        change(self)

    return mock.patch.object(Gradients, "reduce", reduce)


def scaled(kind: str, factor: Callable[[Gradients], float]) -> Patch:
    def change(gradients: Gradients) -> None:
        for parameter in getattr(gradients, kind):
            parameter.grad.mul_(factor(gradients))

    return after_reduce(change)


def shared_scaled_by_tensor_degree() -> Patch:
    original, reduced = Gradients.__init__, Gradients.reduce

    def keep(self: Any, model: Any, *given: Any) -> None:
        original(self, model, *given)
        self.shared = [p for name, p in model.named_parameters() if ".shared." in name]

    def reduce(self: Any) -> None:
        reduced(self)
        for parameter in self.shared:
            parameter.grad.mul_(self.mesh.layout.tensor)

    return mock.patch.multiple(Gradients, __init__=keep, reduce=reduce)


def summed_over(kind: str, concerns: Callable[[str], bool]) -> Patch:
    """The gradients of some parameters, by name, are summed over another group of the mesh."""
    original = gradients_module.reduction_group

    def reduction_group(model: Any, name: str, mesh: Any) -> Any:
        return getattr(mesh, kind) if concerns(name) else original(model, name, mesh)

    return mock.patch.object(gradients_module, "reduction_group", reduction_group)


def left_on_their_rank(part: str) -> Patch:
    return summed_over("expert_tensor", lambda name: part in name)  # a group of one in the layouts of such mistakes


def summed_at_every_micro_batch() -> Patch:
    """What was summed in one micro-batch is summed again with the next."""
    return mock.patch.object(Gradients, "expect_last", lambda self: self.buckets.finish())


def divided_by_all_tokens() -> Patch:
    """The loss is divided by all positions of the global batch, those without a target too."""
    original = step_module._place_in_batch

    def place_in_batch(rows: Tensor, *given: Any) -> Any:
        place, _ = original(rows, *given)
        return place, place.sequences * (rows.shape[1] - 1)

    return mock.patch.object(step_module, "_place_in_batch", place_in_batch)


def padding_in_balance_demand() -> Patch:
    """The demand that balance terms take has the choices of padding too."""
    original = balance.demand_by_sequence
    everything = lambda expert_TK, counted_BS, *given: original(expert_TK, None, *given)  # noqa: E731
    return mock.patch.object(balance, "demand_by_sequence", everything)


def padding_dispatched() -> Patch:
    """Padding takes rows of experts, and room where they have a capacity."""
    original = layer.make_plan
    everything = lambda expert_TK, probability_TK, counted_BS, *given: original(expert_TK, probability_TK, None, *given)  # noqa: E731
    return mock.patch.object(layer, "make_plan", everything)


def padding_in_z_loss() -> Patch:
    original = balance.z_sum
    return mock.patch.object(balance, "z_sum", lambda logits_TE, counted_BS: original(logits_TE, None))


def _square_here(parameters: Sequence[Any]) -> Tensor:
    return gradients_module._square(list(parameters), torch.device("cpu"))


def _all(gradients: Gradients) -> list[Any]:
    return gradients.dense + gradients.cut + gradients.experts


def norm_over_all_ranks() -> Patch:
    def norm(self: Gradients) -> Tensor:
        return sum_ranks(_square_here(self.dense + self.experts), self.mesh.world).sqrt()

    return mock.patch.object(Gradients, "norm", norm)


def norm_of_this_rank() -> Patch:
    return mock.patch.object(Gradients, "norm", lambda self: _square_here(_all(self)).sqrt())


def clipped_by_this_rank() -> Patch:
    """The norm that is reported is right; each rank scales by that of what it holds."""

    def clip(self: Gradients, limit: float) -> Tensor:
        norm = self.norm()
        self.scale(limit / _square_here(_all(self)).sqrt())
        return norm

    return mock.patch.object(Gradients, "clip", clip)


def clipped_before_the_sums() -> Patch:
    original = Gradients.reduce

    def reduce(self: Gradients) -> None:
        held = [parameter for parameter in _all(self) if parameter.grad is not None]
        norm = _square_here(held).sqrt()
        for parameter in held:
            parameter.grad.div_(norm)
        original(self)

    return mock.patch.object(Gradients, "reduce", reduce)


def routers_not_updated() -> Patch:
    original = torch.optim.SGD.step

    def step(self: Any) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.shape == (8, 16) and parameter.grad is not None:  # [experts, width]
                parameter.grad.zero_()
        original(self)

    return mock.patch.object(torch.optim.SGD, "step", step)

"""Stacked experts and the back ends that multiply them.

Shape letters: R rows, D width of the rows (the model's, or the latent one), F expert width, H columns of the first
product (2F where the activation is gated, else F), L experts here, E experts, C rows of every expert.

Every expert e computes `down_e(activation(first_e x))` on its own rows. Back ends:

| name | how | where |
|---|---|---|
| `loop` | expert by expert, a backward written by hand (expert_loop.py) | a CPU, fp64, odd widths |
| `grouped` | `torch.nn.functional.grouped_mm`, one kernel on recent GPUs | CUDA |
| `batched` | one batched product; every expert has equally many rows (`pad_to_capacity`) | static shapes |
| `reference` | a loop that leaves the backward to autograd | to compare with |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config import MoEConfig
from moe_dist.moe.activation import activation_of
from moe_dist.moe.expert_loop import Job, loop_rows, loop_tokens
from moe_dist.moe.plan import RoutingPlan

Multiply = Callable[[Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Some of a layer's experts, stacked.

    Attributes:
        expert_ids: Global ids of the experts held here, in order.
        gate_up: [L, 2F, D] for `swiglu`; the first F rows are the gate, the others the up projection. Else None.
        up: [L, F, D] where the activation is not gated. Else None.
        down: [L, F, D].
        gate_up_bias: [L, 2F], of the first product, with `expert_bias`; `up_bias` [L, F] likewise. Else None.
        down_bias: [L, D]. Else None.
    """

    def __init__(self, width: int, config: MoEConfig, expert_ids: range | None = None) -> None:
        super().__init__()
        self.expert_ids = range(config.num_experts) if expert_ids is None else expert_ids
        self.config = config
        self.activation = activation_of(config.activation)
        held, inner, width = len(self.expert_ids), config.expert_width, config.latent_width or width
        gated = self.activation.parts == 2
        self.gate_up = nn.Parameter(torch.empty(held, 2 * inner, width)) if gated else None
        self.up = None if gated else nn.Parameter(torch.empty(held, inner, width))
        self.down = nn.Parameter(torch.empty(held, inner, width))
        biased = config.expert_bias
        self.gate_up_bias = nn.Parameter(torch.empty(held, 2 * inner)) if biased and gated else None
        self.up_bias = nn.Parameter(torch.empty(held, inner)) if biased and not gated else None
        self.down_bias = nn.Parameter(torch.empty(held, width)) if biased else None

    @property
    def first(self) -> Tensor:
        """Weights of the first product, [L, H, D]."""
        weight = self.up if self.gate_up is None else self.gate_up
        assert weight is not None, "an expert has one first product"
        return weight

    @property
    def backend(self) -> str:
        """The back end that multiplies these weights where they are."""
        return self._choose(self.first, self.down)

    def _choose(self, first: Tensor, down: Tensor) -> str:
        chosen = choose_backend(self.config.backend, first, down)
        # The backward that the loop has written out knows no biases.
        return "reference" if chosen == "loop" and self.config.expert_bias else chosen

    def biases(self, kind: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Those of both products, [L, H] and [L, D]; None where there are none."""
        first = self.up_bias if self.gate_up_bias is None else self.gate_up_bias
        return None if first is None or self.down_bias is None else (first.to(kind), self.down_bias.to(kind))

    def forward(self, rows_RD: Tensor, counts_L: list[int]) -> Tensor:
        """Applies expert l to its `counts_L[l]` rows; the rows are sorted by expert. Returns [R, D]."""
        told = sum(counts_L)
        assert len(rows_RD) == told, f"{len(rows_RD)} rows for counts of {told}: what is left over would be garbage"
        kind = rows_RD.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.down.dtype
        rows_RD, first, down = (t.to(narrow) for t in (rows_RD, self.first, self.down))
        with torch.autocast(kind, enabled=False):
            backend = self._choose(first, down)
            if backend == "loop":
                return loop_rows(rows_RD, first, down, self._job(counts_L))
            if rows_RD.shape[0] == 0:
                # No row reaches a kernel, yet every rank's weights get a (zero) gradient.
                unused = first.sum() + down.sum() + sum(bias.sum() for bias in self.biases(narrow) or ())
                return rows_RD + 0 * unused
            product = _product(backend, counts_L, rows_RD.device)
            return self._by_autograd(rows_RD, (first, down), self._with_biases(product, counts_L, narrow))

    def takes_tokens(self, x_TD: Tensor) -> bool:
        """Whether `of_tokens` may be used: the loop back end, in one type of at least fp32."""
        exact = x_TD.dtype == self.down.dtype and x_TD.dtype in (torch.float32, torch.float64)
        return exact and not torch.is_autocast_enabled(x_TD.device.type) and self.backend == "loop"

    def of_tokens(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> Tensor:
        """Gather, experts and combine in one, where all experts are here; [T, D]."""
        gate_TK = gate_TK.to(x_TD.dtype)
        return loop_tokens(x_TD, gate_TK, self.first, self.down, self._job(plan.rows_E.tolist(), plan))

    def _job(self, counts_L: list[int], plan: RoutingPlan | None = None) -> Job:
        return Job(counts_L, self.activation, self.config.recompute_experts, plan)

    def _with_biases(self, product: Multiply, counts_L: list[int], kind: torch.dtype) -> tuple[Multiply, Multiply]:
        """Both products, each with its bias."""
        biases = self.biases(kind)
        if biases is None:
            return product, product
        count_L = torch.tensor(counts_L, device=biases[0].device)

        def with_bias(bias_LH: Tensor) -> Multiply:
            return lambda rows, weight: product(rows, weight) + bias_LH.repeat_interleave(count_L, dim=0)

        return with_bias(biases[0]), with_bias(biases[1])

    def _by_autograd(
        self, rows_RD: Tensor, weights: tuple[Tensor, Tensor], products: tuple[Multiply, Multiply]
    ) -> Tensor:
        first, down = weights[0].transpose(1, 2), weights[1]
        into, out_of = products

        def second(hidden_RH: Tensor) -> Tensor:
            return out_of(self.activation.forward(*hidden_RH.chunk(self.activation.parts, dim=-1))[0], down)

        match self.config.recompute_experts:
            case "nothing":
                return _contiguous(second(into(rows_RD, first)))
            case "activation":
                return _contiguous(_again(second, into(rows_RD, first)))
        return _contiguous(_again(lambda rows: second(into(rows, first)), rows_RD))


def choose_backend(asked: str, first: Tensor, down: Tensor) -> str:
    """The back end for some weights: `grouped` where it is one kernel (CUDA, no fp64, whole 16 bytes), else `loop`.

    On a CPU `loop` was faster than `grouped` at every size that the benchmark `moe_layer` has (docs/log.md).
    """
    if asked != "auto":
        return asked
    whole_rows = all(width * down.element_size() % 16 == 0 for width in (*first.shape[1:], down.shape[1]))
    return "grouped" if down.device.type == "cuda" and down.dtype != torch.float64 and whole_rows else "loop"


def _product(backend: str, counts_L: list[int], device: torch.device) -> Multiply:
    """`rows of expert l @ weight[l]` for every expert, as a back end does it."""
    if backend == "grouped":
        ends_L = torch.tensor(counts_L, device=device).cumsum(0).to(torch.int32)
        return lambda rows, weight: F.grouped_mm(rows, weight, offs=ends_L)
    if backend == "batched":
        assert len(set(counts_L)) == 1, f"the batched back end needs equal counts (pad_to_capacity), not {counts_L}"
        return lambda rows, weight: torch.bmm(rows.unflatten(0, (len(counts_L), -1)), weight).flatten(0, 1)
    return lambda rows, weight: torch.cat([part @ w for part, w in zip(rows.split(counts_L), weight, strict=True)])


def _again(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Keeps only `value` for the backward. No random number is drawn inside."""
    out = checkpoint(function, value, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor), "an expert returns rows"
    return out


def _contiguous(y_RD: Tensor) -> Tensor:
    return _Contiguous.apply(y_RD)


class _Contiguous(torch.autograd.Function):
    """Hands `grouped_mm` a dense gradient: it refuses an expanded (stride-0) one."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor) -> Tensor:
        return y_RD.detach()  # the same memory, and to autograd no view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()

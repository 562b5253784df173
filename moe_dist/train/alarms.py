"""Alarms: what does not stop a run, but should be looked at. They follow from a step's figures alone, on the rank that
records them, and cost no collective.

- **Loss spike**: the loss lies above the median of the steps before it by more than `watch.spike_deviations` times
  their spread, which is the median absolute deviation (times 1.4826, the standard deviation of a normal distribution),
  and at least 1 % of the median. A median and its deviation do not follow a few wild values; a loss that falls is no
  alarm. It is told once, until the loss is back below that limit.
- **Expert load**: over the last `watch.load_window_steps` steps together, an expert had less than a hundredth of an
  even share, or a layer's MaxVio was above 0.75 of what it can be, when all tokens choose the same experts. It is told
  when it begins, or concerns other experts, and when it is over (MaxVio below 0.6 of what it can be).
- **Straggler**: `straggler.py`.

Shape letters: L layers of experts, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.moe.balance import max_violation
from moe_dist.train.straggler import Straggler

_LEAST_STEPS = 20  # before which there is no telling what is usual
_TO_DEVIATION = 1.4826  # of the median absolute deviation of a normal distribution
_LEAST_SPREAD = 0.01  # of the median
_DEAD_SHARE = 0.01  # of an even share
_COLLAPSED, _RECOVERED = 0.75, 0.6  # of the greatest MaxVio there can be

Alarm = Mapping[str, Any]


@dataclass
class LossSpike:
    """Judges one loss after the other.

    Args:
        window: Steps that say what is usual; 0 judges nothing.
        deviations: How many deviations above the median are an alarm.
    """

    window: int
    deviations: float
    _recent: deque[float] = field(default_factory=deque)
    _high: bool = False

    def see(self, step: int, loss: float) -> Iterator[Alarm]:
        """Takes the loss of a step (from 1); losses that are not finite are another matter (`nonfinite.py`)."""
        if not self.window or not math.isfinite(loss):
            return
        if len(self._recent) >= min(_LEAST_STEPS, self.window):
            low, high = self._band()
            began, self._high = loss > high and not self._high, loss > high
            if began:
                text = f"step {step}: loss {loss:.4f} jumped out of {low:.4f} to {high:.4f}, usual in the steps before"
                yield {"kind": "loss_spike", "step": step, "loss": loss, "expected": [low, high], "text": text}
        self._recent.append(loss)
        if len(self._recent) > self.window:
            self._recent.popleft()

    def _band(self) -> tuple[float, float]:
        middle = statistics.median(self._recent)
        spread = _TO_DEVIATION * statistics.median(abs(loss - middle) for loss in self._recent)
        reach = self.deviations * max(spread, _LEAST_SPREAD * abs(middle))
        return middle - reach, middle + reach


@dataclass
class ExpertLoad:
    """Judges the demand of a window of steps.

    Args:
        window: Steps that are taken together; 0 judges nothing.
        top_k: Experts of a token.
        layers: Numbers of the layers that have experts.
    """

    window: int
    top_k: int
    layers: Sequence[int]
    _recent: deque[Tensor] = field(default_factory=deque)
    _known: dict[int, tuple[tuple[int, ...], bool]] = field(default_factory=dict)

    def see(self, step: int, demand_LE: Tensor) -> Iterator[Alarm]:
        """Takes the demand of a step (from 1), before drops."""
        if not self.window:
            return
        self._recent.append(demand_LE)
        if len(self._recent) > self.window:
            self._recent.popleft()
        if len(self._recent) < self.window:
            return
        for layer, load_E in zip(self.layers, torch.stack(list(self._recent)).sum(0), strict=True):
            yield from self._judge(step, layer, load_E)

    def _judge(self, step: int, layer: int, load_E: Tensor) -> Iterator[Alarm]:
        even, vio = float(load_E.double().mean()), max_violation(load_E)
        if not even:
            return
        dead = (load_E < _DEAD_SHARE * even).nonzero().flatten().tolist()
        before = self._known.get(layer, ((), False))
        limit = _RECOVERED if before[1] else _COLLAPSED  # not told again and again where it lies between
        overfull = vio > limit * (len(load_E) / self.top_k - 1)
        most = load_E.argsort(descending=True)[: self.top_k].sort().values.tolist() if overfull else []
        now = self._known[layer] = (tuple(dead), overfull)
        if now == before:
            return
        told = {"step": step, "layer": layer, "dead": dead, "overfull": most, "max_vio": vio, "steps": self.window}
        if not dead and not overfull:
            text = f"step {step}: load of the experts of layer {layer} is in order again (MaxVio {vio:.2f})"
            yield {"kind": "expert_load_recovered", **told, "text": text}
            return
        parts = [f"experts {dead} get no tokens"] * bool(dead) + [f"experts {most} get most of them"] * bool(most)
        text = f"step {step}: layer {layer}, last {self.window} steps: {'; '.join(parts)} (MaxVio {vio:.2f})"
        yield {"kind": "expert_load", **told, "text": text}


class Alarms:
    """Every alarm that follows from the figures of the steps."""

    def __init__(self, config: Config) -> None:
        watch, model = config.watch, config.model
        self.spike = LossSpike(watch.spike_window_steps, watch.spike_deviations)
        window = 0 if model.moe.router == "hash" else watch.load_window_steps  # nothing can move a hash
        layers = model.moe_blocks
        self.load = ExpertLoad(window, model.moe.top_k, layers)
        self.straggler = Straggler(watch.straggler_ratio)

    def remember(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the losses of the steps before a run goes on; nothing is told of them again."""
        for row in rows[-self.spike.window - _LEAST_STEPS :]:
            if row["loss"] is not None:
                list(self.spike.see(row["step"], row["loss"]))

    def see(self, step: int, loss: float, demand_LE: Tensor, own_seconds: Sequence[float] = ()) -> Iterator[Alarm]:
        """What a step (from 1) gives cause for."""
        yield from self.straggler.see(step, own_seconds)
        yield from self.spike.see(step, loss)
        yield from self.load.see(step, demand_LE)

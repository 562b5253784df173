"""Comparing a step with the oracle's, stage by stage, in the order in which a difference would arise.

Every rank compares what it holds (`compare_step`); the reports of a layout's ranks are then joined (`join_reports`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moe_dist.moe import ledger
from moe_dist.moe.ledger import Choices
from moe_dist.verify.step import StepProof
from moe_dist.verify.tolerances import relative_error

STAGES = ("first weights", "routing", "loss", "gradients", "gradient norm", "weights")
TERMS = ("cross_entropy", "balance", "group_balance", "z", "loss")
GROUPS = (
    "embedding",
    "attention",
    "norms",
    "dense feed-forward",
    "router",
    "experts",
    "shared expert",
    "latent projections",
    "output",
)
_SMALLEST_SCALAR = 1e-3  # below this the difference of a loss term is measured against it, not against the term
_COUNTS_IN_RATIO = 1e-3  # elements below this share of the largest say nothing about a common factor


def group_of(name: str) -> str:
    """The group of a parameter or buffer, by its global name."""
    parts = name.partition("#")[0].split(".")
    marks = {"router": "router", "experts": "experts", "shared": "shared expert", "shared_gate": "shared expert"}
    marks |= {"latent_in": "latent projections", "latent_out": "latent projections", "attention": "attention"}
    marked = next((marks[part] for part in parts if part in marks), None)
    if marked or parts[0] in ("embedding", "output"):
        return marked or parts[0]
    return "norms" if parts[-2].endswith("norm") else "dense feed-forward"


@dataclass(frozen=True)
class Difference:
    """One thing that differs: its stage, its group or term, its name, how far it is off, and in words."""

    stage: str
    group: str
    name: str
    error: float
    text: str


@dataclass
class Report:
    """What one rank, or all of them together, found.

    Attributes:
        errors: Largest relative error by stage; of routing, the share of tokens or rows that differ.
        differences: All that is beyond the tolerance, in order.
        factors: Least and most of (found / expected) over the elements of a gradient group or of a term.
        held: Global names that were compared.
    """

    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    differences: list[Difference] = field(default_factory=list)
    factors: dict[str, tuple[float, float]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def note(self, difference: Difference, tolerance: float) -> None:
        """Takes an error down, and keeps it if it is beyond the tolerance."""
        stage, error = difference.stage, difference.error
        self.errors[stage] = max(self.errors[stage], math.inf if math.isnan(error) else error)
        if not error <= tolerance:
            self.differences.append(difference)

    def widen(self, key: str, least: float, most: float) -> None:
        """Takes down between what the ratio of found to expected lies."""
        before = self.factors.get(key, (least, most))
        self.factors[key] = (min(before[0], least), max(before[1], most))


def compare_step(found: StepProof, expected: StepProof, tolerance: float) -> Report:
    """Compares what this rank holds with the oracle's."""
    report = Report()
    _tensors(report, (found.first_weights, expected.first_weights), "first weights", tolerance)
    for difference in _choices_of_layers(found, expected):
        report.note(difference, 0.0)
    _counts(report, found, expected)
    _scalars(report, found, expected, (TERMS, "loss"), tolerance)
    compare_gradients(report, found.gradients, expected, tolerance)
    _scalars(report, found, expected, (("grad_norm",), "gradient norm"), tolerance)
    _tensors(report, (found.weights, expected.weights), "weights", tolerance)
    report.held = set(found.weights)
    return report


def join_reports(reports: Sequence[Report], expected: StepProof) -> Report:
    """The reports of all ranks of a layout as one; a tensor that no rank holds is a difference too."""
    whole = Report()
    for rank, report in enumerate(reports):
        for difference in report.differences:
            named = Difference(**{**vars(difference), "text": f"rank {rank}: {difference.text}"})
            whole.differences.append(named)
        whole.errors = {stage: max(worst, report.errors[stage]) for stage, worst in whole.errors.items()}
        for key, (least, most) in report.factors.items():
            whole.widen(key, least, most)
        whole.held |= report.held
    for name in sorted(set(expected.weights) - whole.held):
        text = f"weight of {name} held by no rank"
        whole.note(Difference("weights", group_of(name), name, math.inf, text), 0.0)
    whole.differences.sort(key=_order)
    return whole


def first_difference(found: Sequence[StepProof], expected: StepProof, tolerance: float) -> str | None:
    """The first thing that differs among the ranks of a layout, in words; None where all agree."""
    whole = join_reports([compare_step(proof, expected, tolerance) for proof in found], expected)
    return whole.differences[0].text if whole.differences else None


def _order(difference: Difference) -> tuple[int, int]:
    """Stage, then layer, term or group; the sort is stable, so that ranks and the order of the model remain."""
    stage, group = STAGES.index(difference.stage), difference.group
    if difference.stage == "routing":
        return stage, int(difference.name) if difference.name.isdecimal() else len(difference.name) + 10**6
    return stage, (*GROUPS, *TERMS, "grad_norm").index(group)


def compare_gradients(report: Report, found: dict[str, Tensor], expected: StepProof, tolerance: float) -> None:
    """Compares the gradients alone."""
    _tensors(report, (found, expected.gradients), "gradients", tolerance)


def _choices_of_layers(found: StepProof, expected: StepProof) -> Iterator[Difference]:
    for layer, (parts, [whole]) in enumerate(zip(found.choices, expected.choices, strict=True)):
        for mine in parts:
            yield _choices(layer, mine, whole)


def _counts(report: Report, found: StepProof, expected: StepProof) -> None:
    for kind, got, wanted in zip(("demand", "served rows"), found.counts, expected.counts, strict=True):
        error = float((got - wanted).abs().sum()) / max(1, int(wanted.sum()))
        report.note(Difference("routing", kind, kind, error, f"routing counts: {kind} of the experts"), 0.0)
        _widen_by_ratio(report, kind, got.double(), wanted.double())


def _choices(layer: int, mine: Choices, whole: Choices) -> Difference:
    tokens = mine.end - mine.first
    difference = ledger.compare(mine, whole.part(mine.first, tokens))
    others = difference.experts + difference.drops
    text = f"routing of {others} of {tokens} tokens in MoE layer {layer}"
    if difference.first is not None:
        text += f", first token {mine.first + difference.first}"
        text += f" ({difference.experts} ask for other experts, {difference.drops} have other choices dropped)"
    kind = "choices" if difference.experts else "drops"
    return Difference("routing", kind, str(layer), others / max(1, tokens), text)


def _scalars(
    report: Report, found: StepProof, expected: StepProof, which: tuple[tuple[str, ...], str], tolerance: float
) -> None:
    names, stage = which
    for name in names:
        got, wanted = found.scalars[name], expected.scalars[name]
        error = abs(got - wanted) / max(_SMALLEST_SCALAR, abs(wanted))
        report.note(Difference(stage, name, name, error, f"{name} {got!r} instead of {wanted!r}"), tolerance)
        if wanted:
            report.widen(name, got / wanted, got / wanted)


def _tensors(report: Report, sides: tuple[dict[str, Tensor], dict[str, Tensor]], stage: str, tolerance: float) -> None:
    found, expected = sides
    kind = stage.removesuffix("s")
    for name, tensor in found.items():
        group = group_of(name)
        error = relative_error(tensor, expected[name])
        report.note(Difference(stage, group, name, error, f"{kind} of {name} off by {error:.3g}"), tolerance)
        if stage == "gradients" and tensor.shape == expected[name].shape:
            _widen_by_ratio(report, group, tensor, expected[name])


def _widen_by_ratio(report: Report, group: str, found: Tensor, expected: Tensor) -> None:
    if expected.numel() == 0:
        return
    counts = expected.abs() > _COUNTS_IN_RATIO * expected.abs().max()
    if not counts.any() and found.any():
        report.widen(group, -math.inf, math.inf)  # something where nothing is expected
    if counts.any():
        ratio = (found[counts] / expected[counts]).double()
        report.widen(group, float(ratio.min()), float(ratio.max()))

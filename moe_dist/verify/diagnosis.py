"""What a difference says: the groups concerned, the common factor if there is one, the degree that equals it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf, isfinite

from moe_dist.verify.compare import GROUPS, TERMS, Report

_SAME_RATIO = 1e-6  # ratios that are closer than this are one factor
_LARGEST_PART = 64  # numerator and denominator of a clean factor
_NO_FACTOR = "wrong by no common factor"
_ZERO = "zero: they are lost or cut off"
_NOT_FINITE = "not finite: memory that was never filled, or a division by zero"
_APART = "; ranks hold different values, so a sum over ranks is missing or is over the wrong group"
_THROUGH_ROUTER = "what comes through the router alone is wrong: the gate weights' gradient, a balance term or z-loss"
_AFTER_ROUTING = (
    "; routing is right: rows are lost, mixed up or weighed wrongly on their way, tokens are miscounted, "
    "or parts of the vocabulary are badly joined"
)
_AFTER_FORWARD = (
    "the forward pass is right: look at recompute, accumulation, or a scale that is not the same for all tokens"
)


def diagnose(report: Report, degrees: Mapping[str, int]) -> str | None:
    """Explains the first stage that differs; None where none does.

    Args:
        report: Of all ranks of a layout.
        degrees: Numbers that a wrong factor may come from, by name.
    """
    if not report.differences:
        return None
    stage = report.differences[0].stage
    match stage:
        case "first weights":
            return _first_weights(report)
        case "routing":
            return _routing(report, degrees)
        case "loss":
            return _terms(report, degrees)
        case "gradients":
            return _gradients(report, degrees)
        case "gradient norm":
            return f"all gradients are right, their global norm is {_times(report, 'grad_norm', degrees)}"
    return _update(report)


def _first_weights(report: Report) -> str:
    groups = _groups_of(report, "first weights")
    apart = any(_ranks_disagree(report, "first weights", group) for group in groups)
    where = "ranks that hold the same differ: look at seeds" if apart else "look at the names they are drawn by"
    return f"the first weights of the {_list(groups)} are not the oracle's, before any step: {where}"


def _update(report: Report) -> str:
    if all(difference.name.endswith(".selection_bias") for difference in report.differences):
        return "gradients and updates are right, but selection biases are moved otherwise: by another demand or rate"
    groups = _groups_of(report, "weights")
    return f"gradients and their norm are right, the update of the {_list(groups)} is not: clipping or the optimizer"


def _routing(report: Report, degrees: Mapping[str, int]) -> str:
    """The first layer that routes otherwise tells where to look; what comes after it differs in consequence."""
    first = report.differences[0]
    if not first.name.isdecimal():
        kinds = sorted({difference.group for difference in report.differences if difference.stage == "routing"})
        told = "; ".join(f"{kind} {_times(report, kind, degrees)}" for kind in kinds)
        return f"tokens are routed alike, but not each is counted once over all ranks: {told}"
    asks = first.group == "choices"
    what = "tokens ask for other experts" if asks else "the same choices are made and others dropped"
    if first.name == "0":
        where = "the router, its random numbers or its input" if asks else "capacity or its order"
        return f"{what} in the first MoE layer: look at {where}; what comes after differs in consequence"
    return (
        f"{what} in MoE layer {first.name}, while the layers before it route alike: its input is wrong, so look at "
        "what layers before it return: rows lost, mixed up or weighed wrongly on their way"
    )


def _terms(report: Report, degrees: Mapping[str, int]) -> str:
    wrong = [d.group for d in report.differences if d.stage == "loss"]
    names = [name for name in TERMS if name in wrong]
    names = [name for name in names if name != "loss"] or names
    told = "; ".join(f"{name} is {_times(report, name, degrees)}" for name in names)
    if "cross_entropy" in names:
        told += _AFTER_ROUTING
    return told


def _gradients(report: Report, degrees: Mapping[str, int]) -> str:
    wrong = _groups_of(report, "gradients")
    right = [group for group in GROUPS if group in report.factors and group not in wrong]
    apart = [group for group in wrong if _ranks_disagree(report, "gradients", group)]
    words = {group: _times_of_group(report, group, degrees) for group in wrong}
    parts = []
    for told in dict.fromkeys(words.values()):
        groups = [group for group in wrong if words[group] == told]
        note = _APART if told != _NOT_FINITE and set(groups) & set(apart) else ""
        parts.append(f"gradients of the {_list(groups)} are {told}{note}")
    parts.append(f"those of the {_list(right)} are right" if right else "no group is right")
    blurred = (_NO_FACTOR, _ZERO)
    if "experts" in right and "router" not in apart and words.get("router") in blurred:
        parts.append(_THROUGH_ROUTER)
    if not right and not apart and set(words.values()) == {_NO_FACTOR}:
        parts.append(_AFTER_FORWARD)
    return "; ".join(parts)


def _times_of_group(report: Report, group: str, degrees: Mapping[str, int]) -> str:
    of_group = [d for d in report.differences if d.stage == "gradients" and d.group == group]
    return _NOT_FINITE if any(d.error == inf for d in of_group) else _times(report, group, degrees)


def _groups_of(report: Report, stage: str) -> list[str]:
    wrong = {difference.group for difference in report.differences if difference.stage == stage}
    return [group for group in GROUPS if group in wrong]


def _ranks_disagree(report: Report, stage: str, group: str) -> bool:
    """Whether ranks that hold the same tensor are off by different amounts."""
    errors: dict[str, list[float]] = {}
    for difference in report.differences:
        if difference.stage == stage and difference.group == group:
            errors.setdefault(difference.name, []).append(difference.error)
    return any(max(values) > (1 + _SAME_RATIO) * min(values) for values in errors.values())


def _times(report: Report, key: str, degrees: Mapping[str, int]) -> str:
    """How the found value stands to the expected one, such as `exactly 1/2 of the oracle's (2: the expert degree)`."""
    least, most = report.factors.get(key, (0.0, inf))
    if not isfinite(most - least) or most - least > _SAME_RATIO * max(abs(least), abs(most)):
        return _NO_FACTOR
    middle = (least + most) / 2
    clean = Fraction(middle).limit_denominator(_LARGEST_PART)
    if abs(float(clean) - middle) > _SAME_RATIO * abs(middle) or clean.numerator > _LARGEST_PART:
        return f"{middle:.6g} times the oracle's"
    if clean == 0:
        return _ZERO
    if clean == 1:
        return "the oracle's up to rounding, as if computed in a narrower type"
    names = [name for name, degree in degrees.items() if degree > 1 and clean in (degree, Fraction(1, degree))]
    of = f" ({max(clean.numerator, clean.denominator)} is the {_list(names)})" if names else ""
    return f"exactly {clean}x the oracle's{of}"


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def common_ground(every: Sequence[Mapping[str, str]], failing: Sequence[bool]) -> str:
    """What cells that fail share and others lack.

    Args:
        every: Layout and options of all cells.
        failing: Whether each fails in the way that is asked about.
    """
    exact, only = [], []
    for name in every[0]:
        bad, good = (
            {cell[name] for cell, fails in zip(every, failing, strict=True) if fails is of} for of in (True, False)
        )
        values = f"{name} {' or '.join(sorted(bad))}"
        if good and not bad & good:
            exact.append(values)
        elif good - bad and len(bad) <= max(1, len(bad | good) // 2):
            only.append(values)
    if exact:
        return f"in all cells with {' and '.join(exact)} and in no other"
    return f"only with {' and '.join(only)}, but not in all such cells" if only else "whatever the layout and options"

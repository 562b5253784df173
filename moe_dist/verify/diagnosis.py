"""What a difference says: the groups concerned, the common factor if there is one, the degree that equals it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from moe_dist.verify.compare import GROUPS, TERMS, Report

_SAME_RATIO = 1e-6  # ratios that are closer than this are one factor
_LARGEST_PART = 64  # numerator and denominator of a clean factor


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
        case "routing":
            return _routing(report)
        case "loss":
            return _terms(report, degrees)
        case "gradients":
            return _gradients(report, degrees)
        case "gradient norm":
            return f"all gradients are right, their global norm is {_times(report, 'grad_norm', degrees)}"
    groups = _groups_of(report, "weights")
    return f"gradients and their norm are right, the update of the {_list(groups)} is not: clipping or the optimizer"


def _routing(report: Report) -> str:
    """The first layer that routes otherwise tells where to look; what comes after it differs in consequence."""
    first = report.differences[0]
    if not first.name.isdecimal():
        kinds = {difference.group for difference in report.differences if difference.stage == "routing"}
        return f"tokens are routed alike, but the {_list(sorted(kinds))} are not counted once each over all ranks"
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
        told += "; routing is right: rows are lost, mixed up or weighed wrongly on their way, or tokens miscounted"
    return told


def _gradients(report: Report, degrees: Mapping[str, int]) -> str:
    wrong = _groups_of(report, "gradients")
    right = [group for group in GROUPS if group in report.factors and group not in wrong]
    by_words: dict[str, list[str]] = {}
    for group in wrong:
        by_words.setdefault(_times(report, group, degrees), []).append(group)
    parts = []
    for words, groups in by_words.items():
        apart = [group for group in groups if _ranks_disagree(report, group)]
        note = "; ranks hold different values, so a sum over ranks is missing or is over the wrong group"
        parts.append(f"gradients of the {_list(groups)} are {words}{note if apart else ''}")
    rest = f"; those of the {_list(right)} are right" if right else "; no group is right"
    return "; ".join(parts) + rest


def _groups_of(report: Report, stage: str) -> list[str]:
    wrong = {difference.group for difference in report.differences if difference.stage == stage}
    return [group for group in GROUPS if group in wrong]


def _ranks_disagree(report: Report, group: str) -> bool:
    """Whether ranks that hold the same tensor are off by different amounts."""
    errors: dict[str, list[float]] = {}
    for difference in report.differences:
        if difference.stage == "gradients" and difference.group == group:
            errors.setdefault(difference.name, []).append(difference.error)
    return any(max(values) > (1 + _SAME_RATIO) * min(values) for values in errors.values())


def _times(report: Report, key: str, degrees: Mapping[str, int]) -> str:
    """How the found value stands to the expected one, such as `exactly 1/2 of the oracle's (2: the expert degree)`."""
    least, most = report.factors.get(key, (0.0, float("inf")))
    if not most - least <= _SAME_RATIO * max(abs(least), abs(most)):
        return "wrong by no common factor"
    middle = (least + most) / 2
    clean = Fraction(middle).limit_denominator(_LARGEST_PART)
    if abs(float(clean) - middle) > _SAME_RATIO * abs(middle) or clean.numerator > _LARGEST_PART:
        return f"{middle:.6g} times the oracle's"
    if clean == 0:
        return "zero: they are lost or cut off"
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

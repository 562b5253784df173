"""Planting a mistake and seeing whether its test catches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch.utils.checkpoint import CheckpointError

# Where the mistake goes, the name that it replaces, the mistake, and the test that must fail.
Planted = tuple[Any, str, Any, Callable[[], Any]]


def failure_with(planted: Planted) -> str | None:
    """What the test says with the mistake in place, None where it sees nothing; without it the test must pass.

    Errors of other kinds get through: they are the planter's.
    """
    where, name, mistake, check = planted
    check()
    with mock.patch.object(where, name, mistake):
        try:
            check()
        except (AssertionError, ValueError, CheckpointError) as failure:
            return (str(failure).strip() or type(failure).__name__).splitlines()[0]
    return None

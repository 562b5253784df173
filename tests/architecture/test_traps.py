"""The script that plants the known traps: it forgets none, names tests that exist, and fails where one is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import traps
from tests.parallel import test_expert_parallel as gang

ROOT = Path(__file__).resolve().parents[2]


def test_every_trap_has_a_planted_mistake_that_its_gang_knows():
    tables = traps.test_planted.PLANTED, traps.test_planted_more.PLANTED
    numbers = {int(key.split()[0]) for table in tables for key in table if key.split()[0].isdecimal()}
    of_gangs = traps.OF_STEP | traps.OF_STEP_BY_TOKEN
    assert numbers | {*of_gangs.values(), *traps.OF_LEDGER.values()} == set(traps.TRAPS)
    assert traps.OF_STEP.keys() <= gang.EXPECTED_DIAGNOSIS.keys()
    assert traps.OF_STEP_BY_TOKEN.keys() <= gang.EXPECTED_DIAGNOSIS_BY_TOKEN.keys()


def test_every_named_test_exists():
    for table in (traps.test_planted.PLANTED, traps.test_planted_more.PLANTED, traps.test_ledger.PLANTED):
        for *_, check in table.values():
            file, _, name = traps.name_of_test(check).partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(("caught", "left_out", "status"), [(True, None, 0), (False, None, 1), (True, 18, 1)])
def test_script_fails_where_a_mistake_is_missed_or_a_trap_has_none(monkeypatch, capsys, caught, left_out, status):
    numbers = [number for number in traps.TRAPS if number != left_out]
    findings = [traps.Finding(number, "x", "t.py::test_x", caught or number != 5, "") for number in numbers]
    monkeypatch.setattr(traps, "one_process", lambda: iter(findings))
    monkeypatch.setattr(traps, "several_ranks", lambda: iter(()))
    assert traps.main(["--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["without"] == ([] if left_out is None else [left_out])
    assert traps.main([]) == status
    assert f"{sum(f.caught for f in findings)} of {len(findings)} caught" in capsys.readouterr().out

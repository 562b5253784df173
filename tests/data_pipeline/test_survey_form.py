from __future__ import annotations

import dataclasses
from collections import Counter

from data_pipeline.survey import Sampled, Survey
from data_pipeline.survey_form import survey_from_bytes, survey_to_bytes
from data_pipeline.tally import Tally

# Names of files that are no UTF-8 have halves of surrogate pairs in them, as Python gives them.
FULL = Survey(
    documents=3,
    empty=2,
    lowest_hash=2**64 - 1,
    damaged={"b.txt", "a\udcff.txt"},
    skipped=[("a\udcff.txt", "torn"), ("c.jsonl:3", "größe 猫")],
    sample=[Sampled(2**64 - 2, 2**63 + 1, "line\r\n\u2028 🙂 \x01", 17), Sampled(3, 4, "", 0)],
    tally=Tally(Counter({"web": 5}), Counter({("NFC", "web"): 2}), Counter({("language", "a/b"): 1})),
    prints=bytearray(range(256)),
    signatures=bytearray(range(0, 256, 3)),
    leaked=bytearray(b"\x00\x01\x01"),
    leaked_by=Counter({"größe.jsonl": 2, "a\udcff.txt": 1}),
    leaks=[(2**64 - 3, "a\udcff.txt", "größe.jsonl", "a run\n of words"), (1, "b", "c", "")],
    sources=[("web", 5), ("books", 1)],
)


def test_survey_comes_back_equal_with_every_field() -> None:
    for field in dataclasses.fields(Survey):
        assert getattr(FULL, field.name), f"give {field.name} a value here, so that it is tested"
    for survey in (FULL, Survey()):
        again = survey_from_bytes(survey_to_bytes(survey))
        assert again == survey
        for field in dataclasses.fields(Survey):
            assert type(getattr(again, field.name)) is type(getattr(survey, field.name)), field.name
    assert {type(row) for row in survey_from_bytes(survey_to_bytes(FULL)).skipped} == {tuple}


def test_equal_surveys_have_equal_bytes() -> None:
    other = dataclasses.replace(FULL, damaged={"a\udcff.txt", "b.txt"})
    assert survey_to_bytes(other) == survey_to_bytes(FULL)

"""The ledger of a run: equal over layouts, followed bit for bit, and refused where it is of another run or damaged."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.config import Config
from moe_dist.errors import LedgerError
from moe_dist.moe.ledger import Choices, compare
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.language_modelling import language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.train import routing_ledger
from moe_dist.train.routing_ledger import Page, Place, RoutingLedger, read_page, read_part, recorded_steps
from moe_dist.train.step import train_step
from tests.support.gang import run_gang
from tests.support.models import LENGTH, plain_model, random_rows, small_config
from tests.support.parallel_step import parallel_trainee

ROWS, STEPS, BLOCKS = 6, 3, [1, 2]
MOE = {"router": "gshard", "input_jitter": 0.1, "capacity_factor": 1.0, "drop_policy": "position_choice_major"}


def config_of(folder: Path | str, replay: Path | str | None = None, micro: int = 6, **sections: Any) -> Config:
    """Three layers, of which the first is dense, in fp64."""
    ledger = {"routing_ledger": "record", "routing_replay": None if replay is None else str(replay)}
    train = {"micro_batch_sequences": micro, "steps": STEPS, **ledger}
    model = {"num_layers": 3, "num_dense_layers": 1}
    return small_config(MOE, run={"dir": str(folder)}, train=train, model=model, **{"seed": 5, **sections})


def losses_of(rank: int, ranks: int, config: Config, other_router: bool = False) -> list[float]:
    """Trains from the first weights, or from these with other routers."""
    trainee = parallel_trainee(config, ranks, optimizer="adamw")
    if other_router:
        for _, layer in trainee.model.moe_layers():
            layer.router.weight.data.neg_()
    trainee = dataclasses.replace(trainee, ledger=RoutingLedger(config, BLOCKS, rank, ranks))
    share = slice(ROWS * rank // ranks, ROWS * (rank + 1) // ranks)
    return [train_step(trainee, random_rows(ROWS, step)[share], step).loss for step in range(STEPS)]


def runs_of(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Records, follows with the same and with other router weights, and follows a ledger of other data."""
    home = Path(folder) / str(ranks)
    ledger = home / "recorded" / "routing"
    found: dict[str, Any] = {
        "recorded": losses_of(rank, ranks, config_of(home / "recorded", micro=1)),
        "followed": losses_of(rank, ranks, config_of(home / "followed", ledger, micro=1)),
        "moved": losses_of(rank, ranks, config_of(home / "moved", ledger, micro=3), other_router=True),
        "moved and free": losses_of(rank, ranks, config_of(home / "free", micro=3), other_router=True),
    }
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    folder = tmp_path_factory.mktemp("ledgers")
    return folder, {ranks: run_gang(runs_of, ranks, ranks, str(folder))[0] for ranks in (1, 2, 3)}


def same(a: Page, b: Page) -> bool:
    """Bit for bit, apart from the last bits of gates."""
    if not torch.equal(a.token_T, b.token_T) or a.choices.keys() != b.choices.keys():
        return False
    for block, mine in a.choices.items():
        theirs = b.choices[block]
        for name in ("expert_TK", "kept_TK", "asks_TK"):
            if not torch.equal(getattr(mine, name), getattr(theirs, name)):
                return False
        if not torch.allclose(mine.gate_TK, theirs.gate_TK, rtol=0, atol=1e-6):
            return False
    return True


def first_page_of_one_process() -> Page:
    """Step 1 as the whole model decides it over the whole batch, without any code of `train` or `parallel`."""
    config = config_of("unused")
    model, rows = plain_model(config, config.seed).train(), random_rows(ROWS, 0)
    records = language_modelling_sums(model, MicroBatch.of(rows), Draw(config.seed, 0, 0)).records
    choices = {block: Choices.of(record, 0) for block, record in zip(BLOCKS, records, strict=True)}
    return Page({}, rows[:, :-1].flatten(), choices)


def test_ledger_any_layout_and_accumulation_is_the_same(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert same(read_page(folder / "1/recorded/routing", 1), first_page_of_one_process())
    for step in range(1, STEPS + 1):
        whole = read_page(folder / "1/recorded/routing", step)
        assert not whole.choices[1].kept_TK.all() and not whole.choices[1].asks_TK.all(), "must drop and leave out"
        for ranks in (2, 3):
            assert same(read_page(folder / f"{ranks}/recorded/routing", step), whole), (ranks, step)


def test_replay_same_layout_repeats_every_loss_bit_for_bit(runs: tuple[Path, Any]) -> None:
    for ranks, found in runs[1].items():
        assert found["followed"] == found["recorded"], ranks


def test_replay_other_router_weights_keeps_what_was_recorded(runs: tuple[Path, Any]) -> None:
    folder, found = runs
    for step in range(1, STEPS + 1):
        recorded = read_page(folder / "2/recorded/routing", step)
        for ranks in (1, 2, 3):
            page = read_page(folder / f"{ranks}/moved/routing", step)
            for block in BLOCKS:
                difference = compare(page.choices[block], recorded.choices[block])
                assert (difference.experts, difference.drops) == (0, 0) and difference.gate > 0.01
        assert compare(read_page(folder / "2/free/routing", step).choices[1], recorded.choices[1]).experts > 0
    assert found[2]["moved"] != found[2]["moved and free"]
    assert found[1]["moved"] == pytest.approx(found[3]["moved"], rel=1e-10)


def written(folder: Path, rank: int = 0, ranks: int = 1, seed: int = 5) -> Path:
    """One rank's part of step 1, from the model in this process."""
    config = config_of(folder, seed=seed)
    share = slice(ROWS * rank // ranks, ROWS * (rank + 1) // ranks)
    rows, place = random_rows(ROWS, 0)[share], Place(0, share.start, ROWS)
    ledger = RoutingLedger(config, BLOCKS, rank, ranks)
    model = plain_model(config, 5).train()
    ledger.open_step(rows, place)
    ledger.keep(
        language_modelling_sums(model, MicroBatch.of(rows), Draw(5, 0, share.start)).records, share.start, LENGTH
    )
    ledger.close_step(rows, place)
    (file,) = (folder / "routing").glob(f"*part-{rank:05d}-of-{ranks:05d}*")
    return file


def test_continued_run_replaces_the_steps_it_redoes_in_another_layout(tmp_path: Path) -> None:
    for rank in range(3):
        written(tmp_path, rank, 3)
    whole = read_page(tmp_path / "routing", 1)
    for rank in range(2):
        written(tmp_path, rank, 2)
    assert len(recorded_steps(tmp_path / "routing")[1]) == 2
    assert same(read_page(tmp_path / "routing", 1), whole) and same(whole, first_page_of_one_process())


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "another file"])
def test_damaged_part_is_a_named_error(tmp_path: Path, damage: str) -> None:
    file = written(tmp_path)
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    match damage:
        case "cut":
            content = content[:-7]
        case "flipped":
            content[8 + length + 3] ^= 1
        case "header":
            content = content.replace(b'\\"seed\\": 5', b'\\"seed\\": 6')
        case "another file":
            content = bytearray(b"not safetensors")
    file.write_bytes(content)
    with pytest.raises(LedgerError) as caught:
        read_part(file)
    assert caught.value.where == str(file) and "record the step again" in caught.value.fix


def test_missing_part_is_a_named_error(tmp_path: Path) -> None:
    written(tmp_path, 0, 2)
    with pytest.raises(LedgerError, match=r"part-00000-of-00002(.|\n)*one part of each rank"):
        recorded_steps(tmp_path / "routing")
    shutil.copy(written(tmp_path, 0, 2), tmp_path / "routing/step-00000001.part-00001-of-00002.safetensors")
    with pytest.raises(LedgerError, match="cover every token once"):
        read_page(tmp_path / "routing", 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 6}, "seed is 6"),
        ({"model": {"moe": {**MOE, "num_experts": 4}}}, "num_experts is 4"),
        ({"model": {"moe": {**MOE, "router": "softmax_topk"}}}, "router is softmax_topk"),
    ],
)
def test_replay_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    written(tmp_path)
    base = config_of(tmp_path / "new", tmp_path).model_dump(mode="json")
    for section, values in changed.items():
        base[section] = base[section] | {"moe": values["moe"]} if section == "model" else values
    ledger = RoutingLedger(Config.model_validate(base), BLOCKS)
    with pytest.raises(LedgerError) as caught:
        ledger.open_step(random_rows(ROWS, 0), Place(0, 0, ROWS))
    assert said in caught.value.rule and "step-00000001" in caught.value.where


def test_replay_of_another_batch_names_the_rule(tmp_path: Path) -> None:
    written(tmp_path)
    config = config_of(tmp_path / "new", tmp_path)
    other = random_rows(ROWS, 0)
    other[2, 3] = (other[2, 3] + 1) % 300
    cases = {
        f"at position {2 * LENGTH + 3}": (BLOCKS, other, Place(0, 0, ROWS)),
        "every step that is followed": (BLOCKS, other, Place(1, 0, ROWS)),
        "sequences is 4": (BLOCKS, other[:4], Place(0, 0, 4)),
        "length is 11": (BLOCKS, other[:, :-1], Place(0, 0, ROWS)),
        r"blocks is \[0, 1\]": ([0, 1], other, Place(0, 0, ROWS)),
    }
    for said, (blocks, rows, place) in cases.items():
        with pytest.raises(LedgerError, match=said):
            RoutingLedger(config, blocks).open_step(rows, place)
    with pytest.raises(LedgerError, match="no recorded step"):
        RoutingLedger(config_of(tmp_path / "new", tmp_path / "nowhere"), BLOCKS)


def test_planted_positions_that_begin_anew_on_every_rank_are_caught(tmp_path: Path) -> None:
    def of_this_rank(record: Any, first: int) -> Choices:
        return dataclasses.replace(original_of(record, first), first=0)

    original_of = Choices.of
    with mock.patch.object(routing_ledger.Choices, "of", of_this_rank):
        written(tmp_path, 0, 2)
        with pytest.raises(AssertionError, match="recorded other tokens"):
            written(tmp_path, 1, 2)

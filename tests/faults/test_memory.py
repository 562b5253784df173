"""The newest state in memory outlives lost ranks: no step is made again; damage leads to the disk, by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.exit_codes import ExitCode
from launch.keepers import Shelf
from moe_dist.checkpoint.load import load_training_state, restore_newest
from moe_dist.checkpoint.memory import FileKeeper, Kept, Key, MemoryCopies
from moe_dist.checkpoint.save import Saved
from moe_dist.runtime.generation import Fence
from moe_dist.train.step import Trainee
from tests.checkpoint.test_resume import AFTER, BEFORE, LAYOUTS, ROWS, save, state_of, train, trainee_of
from tests.faults.test_signals import config_path, finish, ranks, reached, start
from tests.faults.three_nodes import play
from tests.launch.conftest import events, wait_until
from tests.support.gang import run_gang
from tests.support.tolerances import RELATIVE, TWENTY_STEPS

__all__ = ["config_path"]  # a fixture
GIVEN_BY = 4


def files_in(folder: str, ranks: int) -> list[list[tuple[Path, Path]]]:
    root = Path(folder)
    return [[(root / f"part-{rank}-{slot}", root / f"text-{rank}-{slot}") for slot in (0, 1)] for rank in range(ranks)]


def memory_of(trainee: Trainee, folder: str) -> MemoryCopies:
    return MemoryCopies(FileKeeper(files_in(folder, GIVEN_BY)), trainee.mesh, Fence())


def give(trainee: Trainee, memory: MemoryCopies, step: int) -> None:
    saved = Saved(step, trainee.config.model_dump(mode="json"), {"cursor": ROWS * step})
    memory.give(trainee.model, trainee.optimizer, saved, lambda: [{"step": step, "loss": 1.5}])


def given_run(rank: int, folder: str) -> dict[str, Any]:
    """A run that gives its state after every step, and saves one on the disk."""
    trainee = trainee_of(LAYOUTS["expert 4"][1])
    memory, losses = memory_of(trainee, folder), list[float]()
    for step in range(BEFORE):
        losses += train(trainee, step, 1)
        give(trainee, memory, step + 1)
        if step == 0:
            save(trainee, f"{folder}/run", 1)
    state = state_of(trainee)
    losses += train(trainee, BEFORE, AFTER)
    dist.barrier()
    return {"losses": losses, "state": state, "again": continued_run(rank, "expert 4", folder, False)}


def restore(trainee: Trainee, folder: str, told: list[str]) -> Any:
    def fill(path: Path, manifest: Any, opens: Any) -> None:
        load_training_state(path, manifest, trainee.model, trainee.optimizer, opens)

    memory = memory_of(trainee, folder)
    return restore_newest(Path(folder) / "run", trainee.mesh, told.append, lambda path, manifest: None, fill, [memory])


def continued_run(rank: int, name: str, folder: str, damages: bool) -> dict[str, Any]:
    """Goes on from memory; then, where asked, with a flipped bit in the newest state there, and with a part gone."""
    trainee, told = trainee_of(LAYOUTS[name][1]), list[str]()
    found, _ = restore(trainee, folder, told)
    result: dict[str, Any] = {"path": str(found.path), "record": found.record, "state": state_of(trainee)}
    result |= {"losses": train(trainee, BEFORE, AFTER), "damaged": [], "told": told}
    for damage in (flip_newest, forget_newest) if damages else ():
        dist.barrier()
        if rank == 0:
            damage(files_in(folder, GIVEN_BY))
        dist.barrier()
        told.clear()
        found, _ = restore(trainee, folder, told)
        result["damaged"].append((str(found.path), list(told), [float(loss) for loss in train(trainee, 1, 1)]))
    return result


def newest_slot(slots: list[tuple[Path, Path]]) -> tuple[Path, Path]:
    return max(slots, key=lambda slot: Kept.from_bytes(slot[1].read_bytes()).key)  # type: ignore[union-attr]


def flip_newest(files: list[list[tuple[Path, Path]]]) -> None:
    """One bit in the last byte of each part of the newest state; of rank 2 also in the one before."""
    for slot in (*map(newest_slot, files), *files[2]):
        content = bytearray(slot[0].read_bytes())
        content[-1] ^= 1
        slot[0].write_bytes(content)


def forget_newest(files: list[list[tuple[Path, Path]]]) -> None:
    """One rank's parts are cut short in the telling, as a kill leaves them."""
    for _, text in files[1]:
        text.write_bytes(text.read_bytes()[:-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def given(folder: str) -> list[dict[str, Any]]:
    return run_gang(given_run, GIVEN_BY, folder)


def test_state_in_memory_goes_on_in_any_layout_and_damage_leads_to_the_disk_by_name(given, folder):
    losses = given[0]["losses"][BEFORE:]
    for name in ("expert 4", "expert 2"):
        found = [rank["again"] for rank in given]
        if name == "expert 2":
            found = run_gang(continued_run, LAYOUTS[name][0], name, folder, True)
        for rank, result in enumerate(found):
            assert result["path"] == f"memory/step-{BEFORE:08d}" and result["told"] == []
            assert result["record"] == [{"step": BEFORE, "loss": 1.5}]
            assert result["losses"] == pytest.approx(losses, rel=RELATIVE[torch.float32], abs=0), name
            if name == "expert 4":
                assert result["losses"] == losses
                assert all(torch.equal(tensor, given[rank]["state"][key]) for key, tensor in result["state"].items())
    for result in found:
        (flipped, told, again), (forgotten, silent, once_more) = result["damaged"]
        assert flipped.endswith("run/step-00000001") and forgotten == flipped
        assert f"checkpoint step-{BEFORE:08d} is left out" in told[0] and "memory/" in told[0]
        assert ".safetensors: " in told[0] and "found other bytes" in told[0]
        assert len(told) == 2 and f"step-{BEFORE - 1:08d}" in told[1] and silent == []
        assert again == once_more == pytest.approx(given[0]["losses"][1:2], rel=RELATIVE[torch.float32], abs=0)


def kept(key: Key, size: int) -> tuple[Kept, memoryview]:
    return Kept(key, 0, 1, "", {"file": "part", "bytes": size}, None), memoryview(bytes([key.step]) * size)


def test_two_states_are_held_and_the_whole_one_is_never_written_over(tmp_path):
    keeper = FileKeeper(files_in(str(tmp_path), 1))
    whole: Key | None = None
    for step in range(1, 6):
        key = Key(1, step)
        keeper.put(*kept(key, 100 - step), whole)
        assert {held.key for held in keeper.find()} == {key} | ({whole} if whole else set())
        whole = key
    keeper.put(*kept(Key(1, 6), 50), whole)  # of which the other ranks' parts never come
    keeper.put(*kept(Key(2, 6), 70), whole)  # so that the next generation gives it anew, from the one before
    held = {held.key: held for held in keeper.find()}
    assert held.keys() == {whole, Key(2, 6)}
    opened = keeper.open(held[Key(1, 5)])
    content = bytearray(200)
    assert opened.size == 95 and opened.read(memoryview(content), 0) == 95
    assert content[:95] == bytes([5]) * 95
    opened.close()
    assert sum(file.stat().st_size > 40 for file in tmp_path.glob("part-*")) == 2
    keeper.put(*kept(Key(3, 1), 60), None)  # a state of the disk was gone on from: nothing here counts any more
    assert [held.key for held in keeper.find()] == [Key(3, 1)]


def test_actor_of_a_node_holds_two_states_of_each_rank_and_refuses_an_older_generation():
    shelf = Shelf()

    def put(rank: int, key: Key, keep: Key | None) -> None:
        shelf.put((rank, key), b"%d" % rank, bytes([key.step]) * 9, keep)

    def held() -> set[tuple[int, Key]]:
        return set(shelf.parts)

    for step in (1, 2, 3):
        for rank in (0, 1, 2):
            put(rank, Key(1, step), Key(1, step - 1) if step > 1 else None)
    assert held() == {(rank, Key(1, step)) for rank in (0, 1, 2) for step in (2, 3)}
    put(0, Key(1, 4), Key(1, 3))  # then rank 2 is lost: two ranks go on from step 3
    put(0, Key(2, 4), Key(1, 3))
    assert held() == {(0, Key(2, 4)), *((rank, Key(1, 3)) for rank in (0, 1, 2))}
    put(1, Key(2, 4), Key(1, 3))
    put(0, Key(2, 5), Key(2, 4))
    assert held() == {(0, Key(2, 4)), (1, Key(2, 4)), (0, Key(2, 5))}
    assert shelf.read((0, Key(2, 5)), 2, 6) == bytes([5]) * 4
    with pytest.raises(ValueError, match="generation 1; 2 has begun"):
        put(0, Key(1, 9), None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lost_workers_and_nodes_on_ray_lose_no_step(tmp_path: Path) -> None:
    """The four faults of three_nodes.py; the disk has a checkpoint only where the run was asked to stop."""
    more = ("checkpoint.memory_every_steps=1", "checkpoint.every_steps=100000")
    found = play(tmp_path, "optimizer.min_lr_fraction=1.0", *more)
    assert [(recovery.ranks, recovery.lost_steps) for recovery in found.recoveries] == [(3, 0), (3, 0), (2, 0), (3, 0)]
    restored = events(tmp_path / "run", "restored")
    assert [event["path"] for event in restored] == [f"memory/step-{event['step']:08d}" for event in restored]
    assert found.losses == pytest.approx(found.undisturbed, rel=TWENTY_STEPS)


def test_killed_ranks_start_again_from_memory_and_no_step_is_made_twice(config_path: Path, tmp_path: Path) -> None:
    """Each rank is killed once; the disk has no checkpoint before the end."""
    more = ["train.steps=120", "checkpoint.every_steps=1000"]
    undisturbed, _ = finish(start(config_path, tmp_path / "undisturbed", *more), ExitCode.DONE)
    run_dir = tmp_path / "run"
    process = start(config_path, run_dir, *more, "checkpoint.memory_every_steps=1")
    for number, step in enumerate((30, 60)):
        wait_until(reached(run_dir, step), 60, f"step {step}")
        os.kill(ranks(run_dir)[number], signal.SIGKILL)
        wait_until(lambda: len(events(run_dir, "restored")) > number, 60, "another start")  # noqa: B023
    found, err = finish(process, ExitCode.DONE)
    assert [event["path"] for event in events(run_dir, "restored")] == [
        f"memory/step-{event['first_step']:08d}" for event in events(run_dir, "start")[1:]
    ]
    assert found["losses"] == undisturbed["losses"] and len(found["losses"]) == 120
    assert found["effective_time"]["recomputed_steps"] == 0 and found["effective_time"]["attempts"] == 3
    assert "killed by SIGKILL; starting again from the newest state" in " ".join(err.split())

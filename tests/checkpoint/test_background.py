"""Saves beside training: what is copied is kept, ranks meet without a collective, a failure is heard, never two."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.load import load_model
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.checkpoint.save import Saved, Saver
from moe_dist.config.schema import CheckpointConfig
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.parallel_step import parallel_trainee

CONFIG = small_config()


class Held:
    """A saver whose writing waits for a gate, as that of a slow disk does."""

    def __init__(self, root: Path) -> None:
        self.trainee = parallel_trainee(CONFIG, 2, optimizer="adamw")
        pieces.prepare_moments(self.trainee.optimizer, 1)
        self.saver = Saver(root, self.trainee.mesh, CheckpointConfig(keep=9, asynchronous=True), 60)
        self.gate = threading.Event()
        write = self.saver._copy.write

        def wait_and_write(file: Path) -> Any:
            assert self.gate.wait(60)
            return write(file)

        self.saver._copy.write = wait_and_write  # type: ignore[method-assign]

    def start(self, step: int) -> None:
        saved = Saved(step, CONFIG.model_dump(mode="json"), {"cursor": step})
        with torch.no_grad():
            for parameter in self.trainee.model.parameters():
                parameter.fill_(step)
        self.saver.start(self.trainee.model, self.trainee.optimizer, saved)


def steps_in(root: Path) -> list[int]:
    return [store.step_of(path) for path in store.committed(root)]


def everything(rank: int, root: str) -> dict[str, Any]:
    folder, found = Path(root), {}
    held = Held(folder)
    saver = held.saver

    held.start(3)
    found["while held"] = (steps_in(folder), saver.news())
    with torch.no_grad():  # training goes on
        for parameter in held.trainee.model.parameters():
            parameter.fill_(-1)
    held.gate.set()
    found["published"] = saver.finish().name
    found["news of what was waited for"] = saver.news()

    held.gate.clear()
    held.start(4)
    threading.Timer(0.5, held.gate.set).start()
    held.start(5)
    found["at the next"] = steps_in(folder) if rank == 0 else None
    saver.finish()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))
    held.start(6)
    saver.wait()
    dist.barrier()
    found["news"] = saver.news()
    found["news again"] = saver.news()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    held.start(7)
    found["after"] = saver.finish().name

    if rank == 1:
        held.gate.clear()
    held.start(8)
    if rank == 0:
        saver.leave()
        found["left"] = saver.news()
    dist.barrier()
    held.gate.set()
    saver.wait()
    dist.barrier()
    found["files"] = sorted(path.name for path in folder.iterdir())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("background")


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, Any]]:
    return run_gang(everything, 2, str(root))


def test_save_in_the_background_holds_the_moment_it_was_started_at(found, root):
    for rank in found:
        assert rank["while held"] == ([], None)
        assert rank["published"] == "step-00000003" and rank["news of what was waited for"] is None
    for step in (3, 4, 5, 7):
        path = root / store.step_name(step)
        manifest = read_manifest(path)
        verify(path, manifest)
        assert manifest.data == {"cursor": step}
        model = load_model(path, manifest, torch.device("cpu"))
        assert {float(p.detach().unique()) for p in model.parameters()} == {step}


def test_next_save_waits_for_the_one_before(found):
    assert found[0]["at the next"] == [4, 3]


def test_failure_in_the_background_is_heard_once_on_the_first_rank_and_the_next_save_succeeds(found):
    problem = found[0]["news"].problem
    assert "rank 1: " in problem[0] and "File too large" in problem[1] and "part needs" in problem[2]
    assert found[1]["news"] is None and found[0]["news again"] is None
    assert {rank["after"] for rank in found} == {"step-00000007"}


def test_leaving_does_not_wait_long_for_a_rank_that_is_gone_and_it_writes_nothing_after(found):
    assert "nothing from ranks [1]" in found[0]["left"].problem[1]
    for rank in found:
        assert rank["files"] == [store.step_name(step) for step in (3, 4, 5, 7)]

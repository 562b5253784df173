"""Checkpoints: complete, layout-free, proven, atomic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.load import agree_on_newest, load_model, load_training_state, newest_verified
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.errors import CheckpointError
from moe_dist.model.naming import global_tensors
from moe_dist.parallel.fsdp import filling
from moe_dist.parallel.zero import state_holders
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.parallel_step import parallel_trainee

CONFIG = small_config()


def config_of(data: str) -> Any:
    return small_config(parallel={"data": data})


def marked_trainee(expert_degree: int, data: str) -> Any:
    """A trainee whose expert e is filled with e (moments: e + 1/4, e + 1/2), so that a lost or swapped one shows."""
    trainee = parallel_trainee(config_of(data), expert_degree, optimizer="adamw")
    pieces.prepare_moments(trainee.optimizer, updates=7)
    with torch.no_grad():
        for of_parameter, tensors in pieces.parameters_here(trainee.model, trainee.optimizer):
            for offset, held in zip((0.0, 0.25, 0.5), tensors.values(), strict=False):
                with filling(held) as tensor:
                    for piece in of_parameter:
                        mark = float(piece.name.partition("#")[2]) if piece.index is not None else len(piece.name)
                        piece.of(tensor).fill_(mark + offset)
    return trainee


def check_marks(trainee: Any) -> int:
    """Number of experts found here, after checking every mark."""
    for piece, tensors in pieces.pieces_here(trainee.model, trainee.optimizer):
        mark = float(piece.name.partition("#")[2]) if piece.index is not None else len(piece.name)
        for offset, tensor in zip((0.0, 0.25, 0.5), tensors.values(), strict=False):
            assert bool((tensor == mark + offset).all()), piece.name
    for holder in state_holders(trainee.optimizer):
        assert holder.state and {float(state["step"]) for state in holder.state.values()} == {7.0}
    return sum(piece.index is not None for piece in global_tensors(trainee.model))


def save_marked(rank: int, root: str, expert_degree: int, data: str = "replicate") -> str:
    trainee = marked_trainee(expert_degree, data)
    saved = Saved(7, CONFIG.model_dump(mode="json"), {"cursor": 42})
    return str(save_checkpoint(Path(root), trainee.model, trainee.optimizer, trainee.mesh, saved, keep=2))


def load_marked(rank: int, root: str, degrees: list[int], data: str = "replicate") -> list[int]:
    found = []
    for degree in degrees:
        trainee = parallel_trainee(config_of(data), degree, optimizer="adamw")
        path, manifest = agree_on_newest(Path(root), trainee.mesh, print)  # type: ignore[misc]
        load_training_state(path, manifest, trainee.model, trainee.optimizer)
        assert manifest["data"] == {"cursor": 42}
        found.append(check_marks(trainee))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks, expert degree four, made once."""
    root = tmp_path_factory.mktemp("four")
    run_gang(save_marked, 4, str(root), 4)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_experts_survive_from_four_ranks_to_one_two_and_three(saved):
    for ranks, degrees in ((1, [1]), (2, [1, 2]), (3, [3])):
        found = run_gang(load_marked, ranks, str(saved), degrees)
        for number, degree in enumerate(degrees):
            experts = sum(result[number] for result in found)
            assert experts == 8 * 2 * 2 * (ranks // degree)  # experts, matrices, layers, copies


@pytest.mark.parametrize(("ranks", "degree"), [(4, 2), (3, 3), (3, 1)])
def test_experts_survive_from_copies_and_uneven_shares_to_one(tmp_path, ranks, degree):
    run_gang(save_marked, ranks, str(tmp_path), degree)
    run_gang(load_marked, 1, str(tmp_path), [1])


@pytest.mark.parametrize("data", ["zero1", "fsdp"])
@pytest.mark.parametrize("degree", [1, 3])
def test_what_was_shared_out_survives_to_one_that_keeps_all_and_back(tmp_path, degree, data):
    run_gang(save_marked, 3, str(tmp_path), degree, data)
    run_gang(load_marked, 1, str(tmp_path), [1])
    run_gang(save_marked, 1, str(tmp_path), 1)
    run_gang(load_marked, 3, str(tmp_path), [degree], data)


def save_state_of_another_shard(rank: int, root: str) -> str:
    """Rank 1 also holds moments that are rank 0's."""
    trainee = marked_trainee(1, "zero1")
    for part in trainee.optimizer.parts if rank == 1 else ():
        for parameter in part.param_groups[0]["params"]:
            moments = {moment: torch.zeros_like(parameter) for moment in pieces.MOMENTS}
            part.optim.state.setdefault(parameter, {"step": torch.tensor(7.0), **moments})
    try:
        save_checkpoint(Path(root), trainee.model, trainee.optimizer, trainee.mesh, Saved(7, {}, {}), keep=2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_moments_of_another_ranks_shard_are_not_written_in_silence(tmp_path):
    errors = run_gang(save_state_of_another_shard, 2, str(tmp_path))
    assert all("written twice" in error for error in errors)
    assert not store.committed(tmp_path)


def test_checkpoint_holds_every_tensor_once_under_its_global_name(saved):
    path, manifest = newest_verified(saved, print)  # type: ignore[misc]
    names = [name for part in manifest["parts"] for name in load_file(path / part["file"])]
    assert sorted(names) == sorted(pieces.expected_names(CONFIG.model))
    assert len(manifest["parts"]) == 4
    assert "model/blocks.1.feed_forward.experts.down#7" in names
    model = load_model(path, manifest, torch.device("cpu"))
    assert model.get_parameter("blocks.0.feed_forward.experts.down")[5].unique().tolist() == [5.0]


def test_any_flipped_byte_of_a_checkpoint_is_found(root):
    (path,) = store.committed(root)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in torch.randint(0, len(content), (25,), generator=generator).tolist():
            changed = bytearray(content)
            changed[position] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
            file.write_bytes(changed)
            with pytest.raises(CheckpointError) as caught:
                store.verify(path)
            assert file.name in caught.value.where
        file.write_bytes(content)
    store.verify(path)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(root):
    (older,) = store.committed(root)
    newer = root / "step-00000009"
    shutil.copytree(older, newer)
    part = next(newer.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-10])
    reports: list[str] = []
    path, _ = newest_verified(root, reports.append)  # type: ignore[misc]
    assert path == older
    assert "step-00000009" in reports[0] and part.name in reports[0]


def test_missing_part_or_tensor_fails_loudly(root):
    (path,) = store.committed(root)
    manifest = store.read_manifest(path)
    name = "model/blocks.0.feed_forward.experts.gate_up#3"
    for part in manifest["parts"]:
        part["tensors"].pop(name, None)
    shutil.rmtree(path / "nothing", ignore_errors=True)
    store.commit(_as_draft(path), 7, manifest)
    with pytest.raises(CheckpointError, match=r"gate_up#3"):
        load_model(path, store.read_manifest(path), torch.device("cpu"))
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        store.verify(path)


def _as_draft(path: Path) -> Path:
    """The folder back under a temporary name, as a save has it before it commits."""
    draft = path.parent / ".writing-again"
    path.rename(draft)
    return draft


def test_unfinished_folders_are_no_checkpoints_and_are_swept(root):
    (path,) = store.committed(root)
    half = root / ".writing-step-00000050-dead"
    shutil.copytree(path, half)
    (half / store.MANIFEST).unlink()
    assert store.committed(root) == [path]
    store.begin(root, 60)
    assert not half.exists()


def test_pruning_keeps_the_newest(root):
    (path,) = store.committed(root)
    for step in (8, 9, 10):
        shutil.copytree(path, root / f"step-{step:08d}")
    store.prune(root, root / "step-00000010", keep=2)
    assert [p.name for p in store.committed(root)] == ["step-00000010", "step-00000009"]


def test_pruning_never_removes_what_was_just_published(root):
    (path,) = store.committed(root)
    for step in (8, 50, 100):  # 50 and 100 were damaged and passed over; the run has just published 8 again
        shutil.copytree(path, root / f"step-{step:08d}")
    store.prune(root, root / "step-00000008", keep=1)
    assert [p.name for p in store.committed(root)] == ["step-00000100", "step-00000050", "step-00000008"]


def test_no_whole_checkpoint_is_an_error_and_not_a_new_beginning(root):
    (path,) = store.committed(root)
    part = next(path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="proves whole"):
        newest_verified(root, print)
    errors = run_gang(load_nothing_whole, 2, str(root))
    assert len(set(errors)) == 1 and part.name in errors[0]
    assert newest_verified(root / "empty", print) is None


def load_nothing_whole(rank: int, root: str) -> str:
    trainee = parallel_trainee(CONFIG, 2, optimizer="adamw")
    try:
        agree_on_newest(Path(root), trainee.mesh, print)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def one_rank_cannot_write(rank: int, root: str) -> str:
    from moe_dist.checkpoint import save

    if rank == 1:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        save.save_file = full  # type: ignore[assignment]
    try:
        save_marked(rank, root, 2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_failure_of_one_rank_is_the_same_named_error_on_all_and_leaves_the_old_checkpoint(root):
    before = store.committed(root)
    errors = run_gang(one_rank_cannot_write, 2, str(root))
    assert len(set(errors)) == 1
    assert "rank 1" in errors[0] and "No space left" in errors[0]
    assert store.committed(root) == before
    store.verify(before[0])


def test_manifest_of_another_format_is_refused(root):
    (path,) = store.committed(root)
    manifest = store.read_manifest(path)
    manifest["format"] = 99
    store.commit(_as_draft(path), 7, manifest)
    with pytest.raises(CheckpointError, match="format"):
        store.verify(path)
    (path / store.MANIFEST).write_text(json.dumps([]))
    with pytest.raises(CheckpointError):
        store.verify(path)

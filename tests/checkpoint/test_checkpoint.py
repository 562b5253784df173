"""Checkpoints: complete, layout-free, proven, atomic."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.load import check_names, load_model, load_newest_model
from moe_dist.checkpoint.manifest import MANIFEST, Manifest, checked, manifest_bytes, read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.errors import CheckpointError
from moe_dist.model.naming import global_tensors
from moe_dist.parallel.fsdp import filling
from moe_dist.parallel.zero import state_holders
from tests.support import checkpoints
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
        manifest = checkpoints.restored(Path(root), trainee)
        assert manifest is not None and manifest.data == {"cursor": 42}
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
    path, manifest = checkpoints.newest(saved)
    names = [name for part in manifest.parts for name in load_file(path / part.file)]
    assert sorted(names) == sorted(pieces.expected_shapes(CONFIG.model))
    assert len(manifest.parts) == 4
    assert "model/blocks.1.feed_forward.experts.down#7" in names
    model = load_model(path, manifest, torch.device("cpu"))
    assert model.get_parameter("blocks.0.feed_forward.experts.down")[5].unique().tolist() == [5.0]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(root):
    (older,) = store.committed(root)
    newer = root / "step-00000009"
    shutil.copytree(older, newer)
    part = next(newer.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-10])
    reports: list[str] = []
    _, manifest = load_newest_model(root, torch.device("cpu"), reports.append)
    assert manifest.step == 7
    assert "step-00000009" in reports[0] and part.name in reports[0]


def recommitted(path: Path, change: Any) -> Manifest:
    """A checkpoint whose manifest was changed, and is what was written."""
    manifest = read_manifest(path)
    tree = manifest.model_dump(exclude_none=True)
    change(tree)
    draft = path.parent / ".writing-again"
    path.rename(draft)
    store.commit(draft, checked(tree, "test"))
    return read_manifest(path)


def test_missing_unexpected_and_stale_tensors_are_named(root):
    (path,) = store.committed(root)
    whole, name = read_manifest(path), "model/blocks.0.feed_forward.experts.gate_up#3"
    kept = [part for part in whole.parts if name not in part.tensors]

    def drop(tree: Any) -> None:
        tree["parts"] = [part.model_dump(exclude_none=True) for part in kept]

    with pytest.raises(CheckpointError, match=r"missing.*gate_up#3|unexpected|parameters"):
        load_model(path, recommitted(path, drop), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"part-0000\d.*\n.*unexpected"):
        verify(path, read_manifest(path))
    with pytest.raises(CheckpointError, match=r"unexpected: .*#7"):
        check_names(path, whole, small_config({"num_experts": 7}).model)


def test_part_of_another_save_is_called_stale(root):
    (path,) = store.committed(root)
    run_gang(save_marked, 4, str(root.parent / "again"), 4)
    (again,) = store.committed(root.parent / "again")
    part = read_manifest(path).parts[2].file
    shutil.copyfile(again / part, path / part)
    with pytest.raises(CheckpointError, match="stale") as caught:
        verify(path, read_manifest(path))
    assert part in caught.value.where


def test_unfinished_folders_are_no_checkpoints_and_are_swept(root):
    (path,) = store.committed(root)
    half = root / ".writing-step-00000050-dead"
    shutil.copytree(path, half)
    (half / store.MANIFEST).unlink()
    assert store.committed(root) == [path]
    store.begin(root, 60, 0)
    assert not half.exists()


def test_pruning_keeps_the_newest(root):
    (path,) = store.committed(root)
    for step in (8, 9, 10):
        shutil.copytree(path, root / f"step-{step:08d}")
    store.prune(root, root / "step-00000010", keep=2)
    assert [p.name for p in store.committed(root)] == ["step-00000010", "step-00000009"]


def test_pruning_keeps_those_of_every_so_many_steps(root):
    (path,) = store.committed(root)
    for step in (8, 10, 15, 20, 25):
        shutil.copytree(path, root / f"step-{step:08d}")
    gone = store.prune(root, root / "step-00000025", keep=1, keep_every=10)
    assert {store.step_of(p) for p in store.committed(root)} == {25, 20, 10}
    assert {store.step_of(p) for p in gone} == {15, 8, 7}


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
        load_newest_model(root, torch.device("cpu"), print)
    errors = run_gang(load_nothing_whole, 2, str(root))
    assert len(set(errors)) == 1 and part.name in errors[0]
    assert run_gang(load_nothing_whole, 1, str(root / "empty")) == ["nothing"]


def load_nothing_whole(rank: int, root: str) -> str:
    trainee = parallel_trainee(CONFIG, dist.get_world_size(), optimizer="adamw")
    try:
        found = checkpoints.restored(Path(root), trainee)
    except CheckpointError as error:
        return str(error)
    return "nothing" if found is None else "loaded"


def one_rank_cannot_write(rank: int, root: str) -> str:
    """The kernel lets rank 1 write no more than a few pages a file, as a quota would."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
    try:
        save_marked(rank, root, 2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_failure_of_one_rank_is_the_same_named_error_on_all_and_leaves_the_old_checkpoint(root):
    before = store.committed(root)
    errors = run_gang(one_rank_cannot_write, 2, str(root))
    assert len(set(errors)) == 1
    assert re.search(r"rank 1: .*\n.*File too large; [\d,]+ bytes free\n.*part needs [\d,]+ bytes", errors[0])
    assert store.committed(root) == before and not list(root.glob(".writing-*"))
    verify(before[0], read_manifest(before[0]))


def test_manifest_of_another_format_is_refused(root):
    (path,) = store.committed(root)
    later = manifest_bytes(read_manifest(path)).replace(b'"format": 2', b'"format": 99')
    (path / MANIFEST).write_bytes(later)
    with pytest.raises(CheckpointError, match=r"format 99[^$]*formats 1 and 2[^$]*version of moe_dist"):
        read_manifest(path)
    (path / MANIFEST).write_text(json.dumps([]))
    with pytest.raises(CheckpointError):
        read_manifest(path)


def as_format_one(path: Path) -> None:
    """The checkpoint as version 0.1 wrote it: files without the save's name, one SHA-256 a part."""
    manifest, parts = read_manifest(path), []
    for part in manifest.parts:
        tensors = load_file(path / part.file)
        save_file(tensors, path / part.file)
        content = (path / part.file).read_bytes()
        shapes = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
        digest = hashlib.sha256(content).hexdigest()
        parts.append({"file": part.file, "bytes": len(content), "sha256": digest, "tensors": shapes})
    old = {"format": 1, "parts": parts, "layout": "", "step": 7, "config": manifest.config, "data": manifest.data}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({**old, "sha256": digest}, indent=1, sort_keys=True))


def test_format_one_is_read_and_its_damage_found(root):
    (path,) = store.committed(root)
    as_format_one(path)
    verify(path, read_manifest(path))
    run_gang(load_marked, 2, str(root), [2])
    part = next(path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        verify(path, read_manifest(path))
    assert part.name in caught.value.where

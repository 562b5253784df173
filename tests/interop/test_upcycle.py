"""A dense model as a mixture of experts: the same outputs at step 0 in every layout, and experts that part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from launch.run_directory import CONFIG_FILE
from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.load import load_newest_model
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.config import Config, load_config
from moe_dist.config.load import write_yaml
from moe_dist.errors import ConfigError, TrainingFault
from moe_dist.interop.upcycle import check_upcycling
from moe_dist.model import Transformer
from moe_dist.objectives.language_modelling import token_nats
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.train.checks import check_weights
from moe_dist.train.step import train_step
from tests.support.checkpoints import restored
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

AT_STEP_0 = 1e-6  # of nats and logits of about 6 and 1
STEPS, ROWS = 8, 8
LAYOUTS = {"expert 2": {"expert": 2}, "tensor 2, expert 2": {"expert": 2, "tensor": 2}}
SCHEMES: dict[str, list[str]] = {
    "copies": ["--experts", "8", "--top-k", "2"],
    "sigmoid, bias, groups": [
        *("--experts", "8", "--top-k", "2", "model.moe.router=sigmoid_topk", "model.moe.selection_bias=true"),
        *("model.moe.num_groups=4", "model.moe.groups_per_token=2"),
    ],
    "slices": ["--experts", "16", "--top-k", "8", "--slices", "4"],
    "slices, a shared one, a dense block": [
        *("--experts", "8", "--top-k", "4", "--slices", "2", "--shared-width", "8", "--dense-layers", "1"),
    ],
}
TRAINED = ("copies, fp32", "slices, a shared one, a dense block, fp32")


def dense_config(precision: str, **options: Any) -> Config:
    model = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 2, "ffn_width": 24, "init_std": 0.1, **options}
    train = {"precision": precision, "global_batch_sequences": ROWS, "micro_batch_sequences": 2, "checks": "full"}
    optimizer = {"lr": 1e-2, "warmup_steps": 0}
    return small_config({"balance_loss": 0.01}, model=model, train=train, optimizer=optimizer)


def dense_run(folder: Path, precision: str, **options: Any) -> Path:
    """A run of a dense model after some updates."""
    config = dense_config(precision, **options)
    with one_rank():
        trainee = parallel_trainee(config, 1, optimizer="adamw")
        for step in range(3):
            train_step(trainee, random_rows(ROWS, seed=step), step)
        saved = Saved(3, config.model_dump(mode="json"), {"cursor": 3 * ROWS, "tokenizer_sha256": "that of the run"})
        save_checkpoint(folder / "checkpoints", trainee.model, trainee.optimizer, trainee.mesh, saved, keep=1)
    (folder / CONFIG_FILE).write_text(write_yaml(config.model_dump(mode="json")))
    return folder


def upcycled(dense: Path, out: Path, scheme: list[str]) -> dict[str, Any]:
    """What the command answers."""
    result = CliRunner().invoke(app, ["upcycle", str(dense), str(out), *scheme, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def newest_model(run: Path) -> Transformer:
    return load_newest_model(run / "checkpoints", torch.device("cpu"), print)[0]


def nats_of(model: Transformer) -> torch.Tensor:
    """The loss of every token of some rows."""
    with torch.no_grad():
        return token_nats(model.eval(), MicroBatch.of(random_rows(ROWS, seed=50), None), None)[0]


def at_step_0_and_after(rank: int, runs: dict[str, str]) -> dict[str, Any]:
    """By run and layout: the nats at step 0, the losses of some steps, and what the check of weights says."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        for layout, parallel in LAYOUTS.items():
            config = load_config(Path(run) / CONFIG_FILE, [f"parallel.{key}={n}" for key, n in parallel.items()])
            trainee = parallel_trainee(config, parallel["expert"], optimizer="adamw")
            restored(Path(run) / "checkpoints", trainee)
            check_weights(trainee, 0, now=True)
            nats, losses = nats_of(trainee.model), []
            mine = random_rows(ROWS, seed=60).tensor_split(trainee.mesh.layout.data)[trainee.mesh.data_place]
            for step in range(STEPS if name in TRAINED else 0):
                losses.append(train_step(trainee, mine, step).loss)
                if step == 0:
                    check_weights(trainee, step=1, now=True)
            found[f"{name}, {layout}"] = nats, losses
    return found


def test_upcycled_model_in_every_layout_equals_the_dense_one_and_trains_on(tmp_path):
    runs, dense_nats = {}, {}
    for precision in ("fp32", "fp64"):
        dense = dense_run(tmp_path / precision, precision)
        model = newest_model(dense)
        for scheme, options in SCHEMES.items():
            name = f"{scheme}, {precision}"
            runs[name] = str(tmp_path / name)
            upcycled(dense, Path(runs[name]), options)
            sparse, dense_nats[name] = newest_model(Path(runs[name])), nats_of(model)
            hidden = [m(random_rows(ROWS)[:, :-1]) for m in (model, sparse)]
            apart = (model.logits(hidden[0][0]) - sparse.logits(hidden[1][0])).abs().max()
            assert apart <= (AT_STEP_0 if precision == "fp32" else 1e-13), f"{name}, (1): {apart}"
            assert len(hidden[1][1]) == 2 - ("dense block" in name), "these blocks have experts"
    one_layout = {name: run for name, run in runs.items() if "fp32" in name}
    for rank, found in enumerate(run_gang(at_step_0_and_after, 4, one_layout)):
        for name, (nats, losses) in found.items():
            expected = dense_nats[name.rpartition(", fp32")[0] + ", fp32"]
            apart = (nats - expected).abs().max()
            assert apart <= AT_STEP_0, f"rank {rank}, {name}: {apart}"
            assert not losses or losses[-1] < 0.9 * losses[0], f"{name}: {losses}"
    assert sum(bool(losses) for _, losses in found.values()) == 2 * len(TRAINED)


@pytest.mark.parametrize(
    ("options", "scheme", "sparse_blocks"),
    [
        ({"ffn_activation": "gelu", "norm": "layer"}, "slices, a shared one, a dense block", 1),
        ({"tie_embeddings": False}, "copies", 2),
        ({"num_layers": 4, "num_dense_layers": 4}, "copies, every other block", 2),
    ],
)
def test_every_kind_of_dense_model_is_upcycled(options, scheme, sparse_blocks, tmp_path):
    dense = dense_run(tmp_path / "dense", "fp64", **options)
    upcycled(dense, tmp_path / "new", SCHEMES.get(scheme, [*SCHEMES["copies"], "model.moe_every_layers=2"]))
    found = [model(random_rows(ROWS)[:, :-1]) for model in map(newest_model, (dense, tmp_path / "new"))]
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-13
    assert len(found[1][1]) == sparse_blocks


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_run(tmp_path / "dense", "fp64")


def test_upcycled_checkpoint_is_whole_at_step_0_with_fresh_moments(dense, tmp_path):
    answer = upcycled(dense, tmp_path / "new", SCHEMES["slices"])
    path = Path(answer["checkpoint"])
    manifest = read_manifest(path)
    verify(path, manifest)
    assert (manifest.step, manifest.data) == (0, {"tokenizer_sha256": "that of the run"})
    assert not store.committed(tmp_path / "new" / "checkpoints")[1:]
    config = load_config(answer["config"])
    assert config.train.equal_experts_at_start and config.model.moe.gate_scale == 4.0
    with one_rank():
        trainee = parallel_trainee(config, 1, optimizer="adamw")
        restored(tmp_path / "new" / "checkpoints", trainee)
        for _, tensors in pieces.parameters_here(trainee.model, trainee.optimizer):
            assert all(not tensors[moment].any() for moment in pieces.MOMENTS)
    router = trainee.model.blocks[0].feed_forward.router.weight
    assert torch.equal(router[0], router[3]) and not torch.equal(router[3], router[4])


def test_equal_experts_are_refused_where_the_config_does_not_allow_them(dense, tmp_path):
    answer = upcycled(dense, tmp_path / "new", SCHEMES["copies"])
    config = load_config(answer["config"], ["train.equal_experts_at_start=false"])
    with one_rank():
        trainee = parallel_trainee(config, 1, optimizer="adamw")
        restored(tmp_path / "new" / "checkpoints", trainee)
        with pytest.raises(TrainingFault, match="equal weights"):
            check_weights(trainee, 0, now=True)


@pytest.mark.parametrize(
    ("moe", "slices", "key"),
    [
        ({"router": "hash"}, 1, "router"),
        ({"activation": "gelu"}, 1, "activation"),
        ({"capacity_factor": 1.0}, 1, "capacity_factor"),
        ({"normalize_gates": False}, 1, "normalize_gates"),
        ({"weigh": "input"}, 1, "weigh"),
        ({"expert_width": 12}, 1, "expert_width"),
        ({"expert_width": 12}, 2, "gate_scale"),
        ({"expert_width": 12, "gate_scale": 2.0, "top_k": 3}, 2, "top_k"),
        ({"expert_width": 12, "gate_scale": 2.0, "num_groups": 8, "groups_per_token": 2}, 2, "num_groups"),
    ],
)
def test_model_that_would_not_begin_as_the_dense_one_is_refused(moe, slices, key):
    dense = dense_config("fp64").model
    plain = {"num_experts": 8, "top_k": 2, "expert_width": 24, "shared_expert_width": 0}
    given = {"z_loss": 0.0, "balance_loss": 0.0, **plain, **moe}
    sparse = dense.model_copy(update={"num_dense_layers": 0, "moe": dense.moe.model_copy(update=given)})
    with pytest.raises(ConfigError) as error:
        check_upcycling(dense, sparse, slices)
    assert error.value.where == f"model.moe.{key}"
    good = {**given, **plain, "router": "softmax_topk", "activation": "swiglu", "normalize_gates": True}
    good |= {"weigh": "output", "capacity_factor": None, "gate_scale": 1.0, "num_groups": 1, "groups_per_token": 1}
    check_upcycling(dense, sparse.model_copy(update={"moe": dense.moe.model_copy(update=good)}), 1)


@pytest.mark.parametrize(
    ("options", "word"),
    [(["model.moe.top_k=4"], "options decide"), (["model.norm_eps=0.1"], "but for its experts")],
)
def test_override_that_the_command_cannot_keep_is_refused(dense, tmp_path, options, word):
    with pytest.raises(ConfigError, match=word):
        arguments = ["upcycle", str(dense), str(tmp_path / "new"), *SCHEMES["copies"], *options]
        CliRunner().invoke(app, arguments, catch_exceptions=False)

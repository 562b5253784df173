"""`moe-dist ablate`: equal compute, a table with its spread, and only what is missing is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import ablation
from launch.ablation import Cell, cells_of, plan_variants
from launch.cli import app
from launch.run_directory import SUMMARY_FILE
from moe_dist.config.load import write_yaml
from moe_dist.errors import ConfigError, TrainingFault

WORDS = "the cat and the dog saw a bird in the old tree by the house where it sang all day long "
DENSE: dict[str, Any] = {
    "data": {"sequence_length_tokens": 16, "holdout_fraction": 0.2, "prefetch_batches": 0},
    "model": {"vocab_size": 300, "num_layers": 2, "num_dense_layers": 2, "width": 16, "num_heads": 2, "head_width": 8}
    | {"num_kv_heads": 2, "ffn_width": 40},
    "train": {"steps": 40, "global_batch_sequences": 2},
    "evaluate": {"sequences": 8},
    "generate": {"prompts": []},
}
SPARSE = {"num_dense_layers": 0, "moe": {"num_experts": 4, "top_k": 2, "expert_width": 24, "shared_expert_width": 0}}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two variants, and text for them."""
    for number in range(40):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(f"{number} {WORDS[number:]} {number} {WORDS * 3}")
    data = {**DENSE["data"], "input": str(tmp_path / "text"), "dir": str(tmp_path / "data")}
    dense = {**DENSE, "data": data}
    paths = [tmp_path / "plain.yaml", tmp_path / "experts.yaml"]
    for path, model in zip(paths, ({}, SPARSE), strict=True):
        path.write_text(write_yaml({**dense, "model": {**DENSE["model"], **model}}))
    return [str(path) for path in paths]


def ablate(files: list[str], out: Path, *options: str) -> dict[str, Any]:
    """What the command answers."""
    result = CliRunner().invoke(app, ["ablate", *files, "--out", str(out), "--json", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def stand_in(started: list[str], failing: str = "") -> Any:
    """A process that writes a result in place of training, or fails."""

    def start(cell: Cell) -> subprocess.Popen[bytes]:
        started.append(f"{cell.variant} {cell.seed}")
        after = {"bits_per_byte": 2.0 + cell.seed + (0.5 if cell.variant == "experts" else 0.0)}
        summary = {"status": "finished", "steps": cell.config.train.steps, "heldout": {"after": after}}
        text = json.dumps({**summary, "expert_load": [], "seconds": 1.0})
        write = "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
        file = str(Path(cell.config.run.dir) / SUMMARY_FILE)
        arguments = ["/dev/null", text, "1"] if cell.variant == failing else [file, text, "0"]
        return subprocess.Popen([sys.executable, "-S", "-c", write, *arguments])

    return start


def test_two_variants_are_trained_once_for_equal_compute(files, tmp_path, monkeypatch):
    answer = ablate(files, tmp_path / "out", "--seeds", "1", "--jobs", "2")
    plain, experts = answer["variants"]
    assert (answer["reference"], plain["name"], experts["name"]) == ("plain", "plain", "experts")
    assert plain["steps"] == 40 and plain["compute"] == 1.0
    assert experts["steps"] < 40 and abs(experts["compute"] - 1) <= 0.5 / experts["steps"] + 1e-9
    assert all(1 < row["bits_per_byte"][0] < 6 and row["parameters"]["active"] > 0 for row in (plain, experts))
    assert experts["difference"] == [experts["mean"] - plain["mean"]] and experts["max_vio"][0] >= 0
    started: list[str] = []
    monkeypatch.setattr(ablation, "_start", stand_in(started))
    again = ablate(files, tmp_path / "out", "--seeds", "1")
    assert again == answer and not started
    more = ablate(files, tmp_path / "out", "--seeds", "2")
    assert sorted(started) == ["experts 1", "plain 1"]
    row = more["variants"][1]
    assert row["seeds"] == [0, 1] and row["bits_per_byte"] == [*experts["bits_per_byte"], 3.5]
    assert row["difference"] == [experts["difference"][0], 0.5]
    assert row["spread"] == max(row["bits_per_byte"]) - min(row["bits_per_byte"])


def test_failed_cell_leaves_the_others_finished_and_is_named(files, tmp_path, monkeypatch):
    cells = cells_of(plan_variants(files, (), None), 2, tmp_path / "out", jobs=1)
    started: list[str] = []
    monkeypatch.setattr(ablation, "_start", stand_in(started, failing="plain"))
    finished: list[int] = []
    with pytest.raises(TrainingFault, match=r"plain/seed-0.*plain/seed-1"):
        ablation.run_cells(cells, 2, lambda cell, done: finished.append(done))
    assert len(started) == 4 and finished == [1, 2]


def test_variants_that_are_not_comparable_are_refused(files):
    with pytest.raises(ConfigError, match="name of one of the variants"):
        plan_variants(files, (), "dense")
    other = Path(files[1])
    other.write_text(other.read_text().replace("vocab_size: 300", "vocab_size: 400"))
    with pytest.raises(ConfigError, match="one tokenizer"):
        plan_variants(files, (), None)
    other.write_text(other.read_text().replace("holdout_fraction: 0.2", "holdout_fraction: 0.1"))
    with pytest.raises(ConfigError, match=r"experts: data\.holdout_fraction"):
        plan_variants(files, (), None)
    with pytest.raises(ConfigError, match="its variant"):
        plan_variants([files[0], files[0]], (), None)

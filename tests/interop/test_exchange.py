"""Import and export as commands: what travels, what a kill leaves, and a run that begins with what was imported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import train_tokenizer
from moe_dist.checkpoint import store
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.read import Reader, verify
from moe_dist.checkpoint.reshard import reshard
from moe_dist.config import load_config
from moe_dist.errors import CheckpointError, ConfigError, ExchangeError
from moe_dist.interop import work
from tests.support.exchange import answer
from tests.support.hub_tensors import hub_tensors
from tests.support.models import small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee
from tests.support.small_hub import write_llama, write_mixtral
from tests.support.small_runs import open_trainer, run_to_the_end

# Runs a command, which is killed in the middle of the n-th file that it writes.
KILLED = """
import os, signal, sys
from pathlib import Path
from moe_dist.checkpoint.write import bytes_of
import moe_dist.interop.{module} as module
whole, left = module.{writer}, [int(sys.argv[1])]
def writer(file, header, tensors):
    left[0] -= 1
    def some():
        for number, tensor in enumerate(tensors):
            if left[0] == 0 and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor
    return whole(file, header, some())
module.{writer} = writer
sys.argv[1:2] = []
from launch.cli import main
main()
"""


def killed(module: str, writer: str, file: int, *arguments: str | Path) -> None:
    """Runs a command until it kills itself in the middle of a file."""
    script = KILLED.format(module=module, writer=writer)
    command = [sys.executable, "-c", script, str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "hub")


def test_files_travel_and_no_others(hub: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    code, found = answer("import", hub, run, "--parts", 3, "model.moe.balance_loss=0.02")
    assert code == 0 and (found["family"], found["parts"], found["parts_kept"]) == ("mixtral", 3, 0)
    path = Path(found["path"])
    manifest = read_manifest(path)
    verify(path, manifest)
    assert manifest.step == 0 and len(manifest.parts) == 3 and not list(path.glob("*.done"))
    config = load_config(run / "imported.yaml")
    assert config.model.moe.balance_loss == 0.02 and config.run.dir == str(run)
    assert {file.name for file in (run / "hub").iterdir()} == {
        "config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert answer("export", run, out)[1]["dtype"] == "float32"
    assert hub_tensors(out) == hub_tensors(hub)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    with pytest.raises(ExchangeError, match="never written over"):
        answer("export", run, out)
    with pytest.raises(ExchangeError, match="has not begun"):
        answer("import", hub, run)


def test_export_is_the_same_from_any_cut_and_proves_what_it_reads(hub: Path, tmp_path: Path) -> None:
    path = Path(answer("import", hub, tmp_path / "run")[1]["path"])
    cut = reshard(path, tmp_path / "cut", 5)
    _, found = answer("export", cut, tmp_path / "out", "--shard-bytes", 20_000)
    assert found["files"] > 2 and hub_tensors(tmp_path / "out") == hub_tensors(hub)
    part = read_manifest(cut).parts[0]
    with (cut / part.file).open("r+b") as file:
        file.seek(part.bytes - 1)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="its bytes are those"):
        answer("export", cut, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_killed_import_and_export_go_on_from_the_files_that_are_done(hub: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    killed("importing", "stream_file", 3, "import", hub, run, "--parts", "4")
    assert not store.committed(run / "checkpoints")
    _, found = answer("import", hub, run, "--parts", 4)
    assert found["parts_kept"] == 2
    path = Path(found["path"])
    verify(path, read_manifest(path))
    killed("exporting", "write_shard", 2, "export", run, out, "--shard-bytes", "15000")
    assert not out.exists()
    _, found = answer("export", run, out, "--shard-bytes", 15_000)
    assert found["files_kept"] == 1 and found["files"] > 2
    assert hub_tensors(out) == hub_tensors(hub)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_was_done_of_another_plan_is_not_taken_and_two_do_not_work_in_one_place(tmp_path: Path) -> None:
    folder = tmp_path / ".work"

    def make(file: Path) -> int:
        file.write_text("a")
        return 7

    with work.begin(folder, {"seen": 1}) as doing:
        assert doing.file("a", make) == 7 and doing.kept == 0
        with pytest.raises(ExchangeError, match="in use"), work.begin(folder, {"seen": 1}):
            pass
    with work.begin(folder, {"seen": 1}) as doing:
        assert doing.file("a", make) == 7 and doing.kept == 1
    with work.begin(folder, {"seen": 2}) as doing:
        assert doing.file("a", make) == 7 and doing.kept == 0
    with pytest.raises(ExchangeError, match="still to be written"), work.begin(folder, {"seen": 2}, 2**60):
        pass


def test_run_begins_with_zero_moments_at_its_first_batch_and_goes_on(hub: Path, tmp_path: Path) -> None:
    answer("import", hub, tmp_path / "run")
    config = load_config(tmp_path / "run" / "imported.yaml")
    train = small_config().train.model_copy(update={"steps": 2, "precision": "fp32"})
    data = config.data.model_copy(update={"sequence_length_tokens": 12})
    config = config.model_copy(update={"train": train, "data": data})
    imported, manifest = store.committed(tmp_path / "run" / "checkpoints")[0], None
    manifest = read_manifest(imported)
    with one_rank():
        trainer = open_trainer(config, 1)
        assert trainer.step == 0
        found = run_to_the_end(trainer)
        assert found["status"] == "finished" and found["first"] == 0
        fresh = parallel_trainee(config, 1, optimizer="adamw")
        with Reader(imported, manifest) as reader, torch.no_grad():
            fresh.model.embedding.weight.copy_(reader.tensor("model/embedding.weight"))
        assert not torch.equal(found["state"]["embedding.weight"], fresh.model.embedding.weight)
    newest = store.committed(tmp_path / "run" / "checkpoints")[0]
    assert store.step_of(newest) == 2 and any(n.startswith("exp_avg/") for n in read_manifest(newest).tensors)
    _, told = answer("export", tmp_path / "run", tmp_path / "out")
    assert told["from"] == str(newest) and hub_tensors(tmp_path / "out").keys() == hub_tensors(hub).keys()


def test_tokenizer_of_the_run_is_handed_out_where_it_is_another(hub: Path, tmp_path: Path) -> None:
    answer("import", hub, tmp_path / "run")
    tokenizer = train_tokenizer(["some words and some more words"] * 3, 280)
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    answer("export", tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.file_bytes
    assert not (tmp_path / "out" / "chat_template.jinja").exists(), "it is of another tokenizer"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == tokenizer.end_of_text
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["eos_token"] == tokenizer.decode([tokenizer.end_of_text])


def test_model_that_no_family_has_is_refused_by_its_key(tmp_path: Path) -> None:
    hub = write_llama(tmp_path / "hub")
    for asked, key in (("model.rope_pairing=interleaved", "rope_pairing"), ("model.attention.sinks=true", "sinks")):
        run = tmp_path / key
        if key == "rope_pairing":
            answer("import", hub, run, asked)
            with pytest.raises(ExchangeError, match=key):
                answer("export", run, tmp_path / "out", "--family", "llama")
        else:
            with pytest.raises(ExchangeError, match=key):
                answer("import", hub, run, asked)


def test_wrong_places_and_types_are_wrong_input(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint"):
        answer("export", tmp_path, tmp_path / "out")
    with pytest.raises(ExchangeError, match="Hugging Face directory"):
        answer("import", tmp_path / "nothing", tmp_path / "run")
    answer("import", hub, tmp_path / "run")
    with pytest.raises(ExchangeError, match="bfloat16"):
        answer("export", tmp_path / "run", tmp_path / "out", "--dtype", "int4")
    with pytest.raises(ExchangeError, match="families that are carried"):
        answer("export", tmp_path / "run", tmp_path / "out", "--family", "bert")
    with pytest.raises(ExchangeError, match="model"):
        answer("export", tmp_path / "run", tmp_path / "out", "--family", "olmoe")

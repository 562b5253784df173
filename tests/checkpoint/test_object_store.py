"""Checkpoints in a store that speaks S3: there when the manifest is, proven as they are read, swept, gone on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moe_dist.checkpoint import store as disk
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.object_store import ObjectStore
from moe_dist.checkpoint.read import Reader
from moe_dist.config import parse_config
from moe_dist.errors import CheckpointError, ConfigError
from tests.support.checkpoints import one_rank_checkpoint
from tests.support.models import small_config
from tests.support.object_store import BUCKET, Store, point_to, running_store
from tests.support.one_rank import one_rank
from tests.support.small_runs import open_trainer, run_to_the_end, same, state_of

URL = f"s3://{BUCKET}/runs/one"


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with running_store() as running:
        running.files.create_dir(BUCKET)
        yield running


@pytest.fixture
def objects(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    point_to(server.endpoint, monkeypatch)
    yield ObjectStore(URL)
    server.files.delete_dir_contents(f"{BUCKET}/runs", missing_dir_ok=True)


def keys(server: Store) -> list[str]:
    from pyarrow import fs

    found = server.files.get_file_info(fs.FileSelector(f"{BUCKET}/runs/one", recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{BUCKET}/runs/one/") for info in found if info.type == fs.FileType.File)


def problems(objects: ObjectStore, step: int) -> list[CheckpointError]:
    source = objects.source(step)
    manifest = source.manifest()
    with Reader(source.path, manifest, False, source.opens()) as reader:
        return [error for part in manifest.parts for error in reader.damages(part)]


DIES = """
import os, sys
from pathlib import Path
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.object_store import ObjectStore
objects, path = ObjectStore(sys.argv[1]), Path(sys.argv[2])
writing = objects._writing
def until_the_manifest(name):
    if name.endswith("manifest.json"):
        os.kill(os.getpid(), 9)
    return writing(name)
objects._writing = until_the_manifest
objects.publish(path, read_manifest(path))
"""


def test_manifest_commits_what_a_kill_leaves_is_swept_and_damage_is_named(objects, server, tmp_path):
    paths = [one_rank_checkpoint(tmp_path / str(step), step) for step in (5, 7, 9)]
    for path in paths[:2]:
        objects.publish(path, read_manifest(path))
    assert objects.find() == [7, 5] and problems(objects, 7) == []
    assert objects.manifest(7) == read_manifest(paths[1])

    killed = subprocess.run([sys.executable, "-c", DIES, URL, str(paths[2])], timeout=120)
    assert killed.returncode == -9
    assert any(key.startswith("step-00000009/") for key in keys(server)) and objects.find() == [7, 5]
    again = one_rank_checkpoint(tmp_path / "again", 7)
    objects.publish(again, read_manifest(again))
    objects.prune(read_manifest(again), keep=1, keep_every=0)
    save = read_manifest(again).save
    assert keys(server) == sorted([f"step-00000007/{save}/{disk.part_name(0, 1)}", "step-00000007/manifest.json"])
    assert problems(objects, 7) == []

    part = read_manifest(again).parts[0]
    name, entry = next(iter(part.tensors.items()))
    content = bytearray((again / part.file).read_bytes())
    content[entry.start] ^= 1
    server.put(f"runs/one/step-00000007/{save}/{part.file}", bytes(content))
    (error,) = problems(objects, 7)
    assert part.file in error.where and name in error.where
    server.put(f"runs/one/step-00000007/{save}/{part.file}", bytes(content[:-1]))
    assert "bytes" in str(problems(objects, 7)[0].value)
    server.put("runs/one/step-00000007/manifest.json", json.dumps({"format": 2}).encode())
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        objects.manifest(7)


def test_run_whose_disk_is_gone_goes_on_from_the_store(objects, tmp_path, monkeypatch):
    settings = {"every_steps": 2, "keep": 2, "keep_every_steps": 4, "store": URL}

    def config(steps: int, url: str):
        train = {"steps": steps, "precision": "fp32", "global_batch_sequences": 4}
        run = {"dir": str(tmp_path / "run")}
        return small_config(train=train, run=run, checkpoint={**settings, "store": url}, generate={"prompts": []})

    with one_rank():
        trainer = open_trainer(config(12, URL), 1)
        first = run_to_the_end(trainer, stop_after=9)
        trainer.close()
        assert first["step"] == 9 and objects.find() == [9, 8, 4]
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        again = open_trainer(config(12, URL), 1)
        assert again.step == 9 and again.batches.state_dict() == trainer.batches.state_dict()
        assert same(first["state"], state_of(again.trainee)) == []
        again.close()
        again.recorder.close()
        shutil.rmtree(tmp_path / "run")
        elsewhere = open_trainer(config(4, "s3://nowhere-at-all/run"), 1)
        assert run_to_the_end(elsewhere)["status"] == "finished"
        elsewhere.close()
        elsewhere.recorder.close()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing answers: nothing begins anew in silence
        assert open_trainer(config(4, URL), 1).step == 4
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(CheckpointError, match=URL):
            open_trainer(config(4, URL), 1)
    events = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["event"] == "message"]
    assert any("step 2: not copied to s3://nowhere-at-all/run, training goes on" in text for text in told), told


@pytest.mark.parametrize("url", ["runs/one", "s3://key:secret@bucket/run", "bucket"])
def test_what_is_no_url_or_holds_a_key_is_refused(url):
    with pytest.raises(ConfigError, match=r"checkpoint\.store"):
        parse_config({"checkpoint": {"store": url}})

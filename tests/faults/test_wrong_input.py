"""A wrong type, an unknown key, an impossible layout: refused, with the nearest legal value, before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch.conftest import ROOT

# What is given: (where, the nearest legal value).
REFUSED = {
    "train.steps=0": ("train.steps", "train.steps=1"),
    "train.steps=2.6": ("train.steps", "train.steps=3"),
    "train.steps='20'": ("train.steps", "train.steps=20"),
    "train.precision=bf61": ("train.precision", "train.precision=bf16"),
    "train.compile=3": ("train.compile", "train.compile=false"),
    "optimizer.lr=-1": ("optimizer.lr", "optimizer.lr=0.001"),
    "optimizer.beta2=1.0": ("optimizer.beta2", "optimizer.beta2=0.95"),
    "optimizer.min_lr_fraction=2": ("optimizer.min_lr_fraction", "optimizer.min_lr_fraction=1"),
    "data.text_field=7": ("data.text_field", "data.text_field=text"),
    "optimiser.lr=1": ("optimiser", "optimizer"),
    "watch.stop_after_nonfinite_step=3": ("watch", "watch.stop_after_nonfinite_steps"),
    "model.moe.top_k=9": ("model.moe.top_k", "model.moe.top_k=8"),
    "parallel.expert=3": ("parallel.expert", "parallel.expert=2"),
    "parallel.tensor=3": ("parallel.tensor", "parallel.tensor=2"),
}


_WATCHED = """
import sys
started = []
def watch(event, details):
    if event in ("os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen"):
        started.append(event)
for word in sys.argv[2:]:
    sys.argv, code = ["moe-dist", "simulate", sys.argv[1], "--ranks", "2", word], None
    from launch.cli import main
    if not started:
        sys.addaudithook(watch)
    try:
        main()
    except SystemExit as end:
        code = end.code
    print(f"==== {word} exits {int(code)}, started {started}", file=sys.stderr)
"""


def test_wrong_type_unknown_key_and_impossible_layout_start_nothing_and_exit_2(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\ndata: {{dir: {tmp_path / 'data'}}}\n")
    script = _WATCHED.replace("for word in sys.argv[2:]:", "config = sys.argv[1]\nfor word in sys.argv[2:]:")
    script = script.replace('"simulate", sys.argv[1]', '"simulate", config')
    command = [sys.executable, "-c", script, str(config), *REFUSED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    texts = done.stderr.split("==== ")
    assert len(texts) == len(REFUSED) + 1 and not done.stdout
    said = dict(zip(REFUSED, texts, strict=False))
    for number, (word, (where, nearest)) in enumerate(REFUSED.items(), start=1):
        text = said[word].partition("\n")[2] if number > 1 else said[word]
        assert texts[number].startswith(f"{word} exits 2, started []\n"), texts[number]
        lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
        assert lines["where"].startswith(where) and nearest in lines["fix"], text
    assert not (tmp_path / "data").exists()

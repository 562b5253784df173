"""MiniMind's files against their forward pass, re-stated; and on to the hub where a family has such models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moe_dist.checkpoint.load import load_model
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.errors import ExchangeError
from tests.support import minimind
from tests.support.double import Double
from tests.support.exchange import answer
from tests.support.models import random_rows
from tests.support.tolerances import assert_close

TOKENS = random_rows(2, seed=30)[:, :-1]
# (layout, routed): the family that has such models exactly.
LAYOUTS = {
    ("oldest", False): "llama",
    ("early2025", False): "llama",
    ("minimind2", False): "llama",
    ("minimind3", False): "qwen3",
    ("minimind3", True): "qwen3_moe",
    ("oldest", True): None,
    ("early2025", True): None,
    ("minimind2", True): None,
}


@pytest.mark.parametrize(("layout", "routed"), LAYOUTS)
def test_file_becomes_the_model_it_was(layout: str, routed: bool, tmp_path: Path) -> None:
    weights = minimind.random_weights(layout, routed)
    torch.save(weights, tmp_path / "full_sft.pth")
    run = tmp_path / "run"
    _, found = answer("import", tmp_path / "full_sft.pth", run, "train.precision=fp64", "--trust-pickle")
    path = Path(found["path"])
    ours = load_model(path, read_manifest(path), torch.device("cpu"))
    expected = minimind.forward(weights, layout, routed, TOKENS)
    with torch.no_grad():
        assert_close(ours.logits(ours(TOKENS)[0]), expected, f"{layout}: logits")
    named = "oldest" if layout == "early2025" else layout
    assert found["family"] == f"minimind ({named})"
    family = LAYOUTS[layout, routed]
    if family is None:
        with pytest.raises(ExchangeError, match="shared_expert_width"):
            answer("export", run, tmp_path / "out")
        return
    assert answer("export", run, tmp_path / "out")[1]["family"] == family
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float64, experts_implementation="eager"
    )
    assert not any(report.values()), report
    with Double(), torch.no_grad():
        logits = model.eval()(TOKENS, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rows_of_the_oldest_are_turned_and_not_left(tmp_path: Path) -> None:
    """A file whose layout was mistaken for a later one gives another model: the permutation does something."""
    weights = minimind.random_weights("early2025", False)
    renamed = dict(zip(minimind.random_weights("minimind2", False), weights.values(), strict=True))
    expected = minimind.forward(weights, "early2025", False, TOKENS)
    assert (minimind.forward(renamed, "minimind2", False, TOKENS) - expected).abs().max() > 0.01


def test_heads_that_do_not_share_out_the_rows_are_refused(tmp_path: Path) -> None:
    torch.save(minimind.random_weights("minimind2", False), tmp_path / "a.pth")
    with pytest.raises(ExchangeError, match="share the rows"):
        answer("import", tmp_path / "a.pth", tmp_path / "run", "--trust-pickle", "--heads", 7)

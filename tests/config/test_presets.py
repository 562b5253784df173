"""The models of the field: their published sizes, and that a shrunk twin of each learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.model_commands import describe
from moe_dist.config import load_config
from moe_dist.model import Transformer
from moe_dist.model.flops import count_parameters
from moe_dist.verify.shrink import shrunk
from tests.support.models import plain_model
from tests.support.parallel_step import oracle_step

FOLDER = Path(__file__).parents[2] / "configs" / "models"
# Parameters in all, and active for a token, to the unit; docs/models.md compares them with what is published.
COUNTS = {
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
    "glam-64b-64e": (1_161_756_155_904, 96_604_266_496),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),
    "gpt3-175b": (174_604_259_328, 174_604_259_328),
    "llama3-8b": (8_030_261_248, 8_030_261_248),
    "minimind-3": (63_912_192, 63_912_192),
    "minimind-3-moe": (198_416_640, 63_936_768),
    "minimind2": (104_030_976, 104_030_976),
    "minimind2-moe": (145_029_760, 91_945_600),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "switch-base-128": (7_386_895_104, 195_760_896),
}


def test_every_preset_has_a_count() -> None:
    assert sorted(COUNTS) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", COUNTS)
def test_preset_has_the_published_size_and_the_built_model_too(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    counts = count_parameters(config.model)
    assert (counts.total, counts.active) == COUNTS[name]
    with torch.device("meta"):
        model = Transformer(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total


@pytest.mark.parametrize("name", COUNTS)
def test_shrunk_twin_of_a_preset_makes_a_step(name: str) -> None:
    small, _ = shrunk(load_config(FOLDER / f"{name}.yaml"))
    rows = torch.randint(0, small.model.vocab_size, (2, small.data.sequence_length_tokens + 1))
    step = oracle_step(small, rows)
    model = plain_model(small)
    moved = [name for name, weight in model.named_parameters() if name in step.gradients]
    assert moved and all(bool(grad.isfinite().all()) for grad in step.gradients.values())
    assert all(bool(grad.any()) for key, grad in step.gradients.items() if key.endswith(("output.weight", "down")))


def test_info_adds_up_and_is_json() -> None:
    found = describe(load_config(FOLDER / "deepseek-v3.yaml"), 64)
    flops = found["flops_per_token"]
    assert sum(value for name, value in flops.items() if name != "total") == pytest.approx(flops["total"])
    assert found["cache_bytes_per_token"]["whole"] == 2 * 61 * (512 + 64)  # the compressed latent and the shared key
    assert found["ranks"][0]["expert"] == 64 and found["ranks"][0]["parameters"] < 28e9
    assert json.loads(json.dumps(found)) == found
    windows = describe(load_config(FOLDER / "gpt-oss-20b.yaml"), None)["cache_bytes_per_token"]
    assert windows == {"whole": 2 * 12 * 2 * 8 * 64, "window": 2 * 12 * 2 * 8 * 64, "window_tokens": 128}

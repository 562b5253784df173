"""Every family against `transformers`: logits, steps and files; once more as four processes of two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moe_dist.checkpoint.load import load_model
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.interop.exporting import Asked, export
from moe_dist.interop.families import family_of, other_fields
from moe_dist.interop.shards import read_json
from tests.support.gang import run_gang
from tests.support.hub_models import CONFIGS, SPARSE, bring_in, hub_logits, hub_steps, ours_of, save_hub
from tests.support.hub_tensors import hub_tensors
from tests.support.imported import BATCHES, TOKENS, every_job, three_steps
from tests.support.one_rank import one_rank
from tests.support.tolerances import assert_close

LAYOUTS = {"tp2 x ep2": {"tensor": 2, "expert": 2}, "ep4": {"expert": 4}}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of every family: its imported config and checkpoint, their logits, losses and weights after three steps."""
    found = {}
    for family in CONFIGS:
        folder = tmp_path_factory.mktemp(family)
        model = save_hub(family, folder / "hub")
        config, path = bring_in(folder / "hub", folder / "checkpoints", bias_update_rate=0.0)
        told = {"config": config, "path": path, "hub": folder / "hub", "logits": hub_logits(model, TOKENS)}
        told["losses"] = hub_steps(model, BATCHES, lr=0.1)
        model.save_pretrained(folder / "after")
        found[family] = {**told, "after": ours_of(folder / "after", config)}
    return found


def check(found: list[dict[str, Any]], told: dict[str, Any], name: str) -> None:
    """The ranks of a layout against what `transformers` computed."""
    shares = {rank["first"]: rank["logits"] for rank in found}
    logits = torch.cat([share for _, share in sorted(shares.items())], dim=-1)
    assert_close(logits.view_as(told["logits"]), told["logits"], f"{name}: logits")
    assert_close(torch.tensor(found[0]["losses"]).double(), torch.tensor(told["losses"]).double(), f"{name}: losses")
    after: dict[str, Tensor] = {}
    for rank in found:
        after |= rank["after"]
    assert after.keys() == told["after"].keys()
    for tensor, value in told["after"].items():
        assert_close(after[tensor], value.to(after[tensor].dtype), f"{name}: {tensor}")


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_three_steps_are_those_of_transformers(family: str, trained: dict[str, dict[str, Any]]) -> None:
    told = trained[family]
    config = told["config"].model_copy(update={"parallel": told["config"].parallel.model_copy(update={"expert": 1})})
    with one_rank():
        check([three_steps(config, told["path"])], told, family)
    before = ours_of(told["hub"], config)
    moved = [name for name, value in told["after"].items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.7 * len(before), "three steps change nearly every tensor"


def test_imported_weights_are_the_same_model_in_every_layout(trained: dict[str, dict[str, Any]]) -> None:
    jobs, names = [], []
    for family in SPARSE:
        for layout, degrees in LAYOUTS.items():
            config = trained[family]["config"]
            jobs.append((config.model_copy(update={"parallel": config.parallel.model_copy(update=degrees)}), family))
            names.append(f"{family}, {layout}")
    found = run_gang(every_job, 4, [(config, trained[family]["path"]) for config, family in jobs])
    for number, (name, (_, family)) in enumerate(zip(names, jobs, strict=True)):
        check([rank[number] for rank in found], trained[family], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_export_is_byte_equal_and_loads_without_a_missing_key(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    model = save_hub(family, hub, dtype, max_shard_size="20KB")
    _, path = bring_in(hub, tmp_path / "checkpoints", "fp32")
    manifest = read_manifest(path)
    if dtype == torch.float32:
        with torch.no_grad():
            ours = load_model(path, manifest, torch.device("cpu"))
            assert_close(ours.logits(ours(TOKENS)[0]), model(TOKENS, use_cache=False).logits, family)
    kept = read_json(hub / "config.json")
    max_bytes = sum(file.stat().st_size for file in hub.glob("*.safetensors")) // 3
    told = Asked(None, str(dtype).removeprefix("torch."), max_bytes, other_fields(family_of(family, ""), kept), {})
    found, files, _ = export(path, manifest, tmp_path / "out", told)
    assert found.model_type == family and files > 2
    mine, theirs = hub_tensors(tmp_path / "out"), hub_tensors(hub)
    assert mine.keys() == theirs.keys()
    different = [name for name in theirs if mine[name] != theirs[name]]
    assert not different
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=dtype
    )
    assert not any(report.values()), report
    assert all(torch.equal(value, model.state_dict()[name].to(dtype)) for name, value in loaded.state_dict().items())
    expected = {name: value for name, value in model.config.to_dict().items() if name not in _SAID_OTHERWISE}
    assert {name: value for name, value in loaded.config.to_dict().items() if name in expected} == expected


_SAID_OTHERWISE = {"_name_or_path", "num_nextn_predict_layers", "num_mtp_layers"}

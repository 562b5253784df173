"""What the benchmark of the layer promises: its JSON, its measure of memory, and peers that compute the same thing."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.benchmarks import allocator, moe_layer, peak_memory, peers
from tests.support.tolerances import assert_close

SMALL = (peers.Shape(8, 2, 24, 16), peers.Shape(4, 1, 12, 16))


@pytest.fixture
def small(monkeypatch):
    """The benchmark with small shapes, in this process."""
    monkeypatch.setattr(moe_layer, "SHAPES", SMALL)

    def here(name: str, tokens: int) -> list[float]:
        return [peak_memory.peak_of(name, shape, tokens, passes=1) for shape in SMALL]

    monkeypatch.setattr(peak_memory, "in_a_process_of_its_own", here)
    for name, value in allocator.KEEP.items():
        monkeypatch.setenv(name, value)


def test_layer_benchmark_json_has_its_keys(small, monkeypatch, capsys):
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "absent", peers.Implementation(peers.dense, "no_such_module"))
    names = ["dense", "ours", "transformers grouped"]
    moe_layer.main(["--quick", "--json", "--tokens", "64", "--only", *names, "absent"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["shape"] for row in result["rows"]] == ["E8 k2 F24 D16", "E4 k1 F12 D16"]
    for row in result["rows"]:
        assert list(row["share_of_dense"]) == list(row["milliseconds"]) == names
        assert row["share_of_dense"]["dense"] == 1.0
        assert list(row["peak_mb"]) == (names if peak_memory.can_measure() else [])
    assert result["left_out"] == {"absent": "no_such_module: No module named 'no_such_module'"}
    assert result["allocator"] == allocator.KEEP


def test_layer_benchmark_says_where_peak_memory_is_above_the_field():
    rows = [{"shape": f"s{n}", "peak_mb": {"ours": ours, "transformers grouped": 2.0}} for n, ours in enumerate([1, 3])]
    assert moe_layer.memory_verdict(rows).endswith("at: s1 (3.0 > 2.0 MB)")
    assert moe_layer.memory_verdict(rows[:1]).endswith("at: no shape")
    assert moe_layer.memory_verdict([{"shape": "s", "peak_mb": {}}]) == ""


def test_benchmark_starts_again_where_the_allocator_is_not_set(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "77")
    calls = []

    class ReplacedError(Exception):
        """Stands for the end of this program."""

    def execve(*call: object) -> None:
        calls.append(call)
        raise ReplacedError

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(ReplacedError):
        allocator.restart_with_kept_blocks()
    ((program, arguments, environment),) = calls
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    wanted = {"MALLOC_MMAP_THRESHOLD_": "77", "MALLOC_TRIM_THRESHOLD_": allocator.KEEP["MALLOC_TRIM_THRESHOLD_"]}
    assert {name: environment[name] for name in wanted} == wanted


@pytest.mark.skipif(not peak_memory.can_measure(), reason="this system does not reset a process's high-water mark")
def test_peak_memory_counts_what_other_threads_write_into_given_buffers():
    """48 MB blocks, which glibc always maps by themselves: two alive at once, then one more after they are gone."""

    def work() -> None:
        first, second = torch.ones(12_000_000), torch.empty(12_000_000)
        torch.add(first, 1, out=second)
        del first, second
        torch.ones(12_000_000)

    with ThreadPoolExecutor(1) as pool, peak_memory.high_water() as found:
        pool.submit(work).result()
    assert found == [pytest.approx(96, abs=6)]


def stacked(layer: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router [E, D], gate and up [E, D, 2F], and down [E, F, D] of a peer."""
    if name == "torchtitan":
        inner = layer.routed_experts.inner_experts
        gate_up = torch.cat([inner.w1_EFD, inner.w3_EFD], dim=1)
        return layer.router.gate.weight, gate_up, inner.w2_EDF.transpose(1, 2)
    if name == "litgpt":
        gate_up = torch.stack([torch.cat([e.fc_1.weight, e.fc_2.weight]) for e in layer.experts])
        return layer.gate.weight, gate_up, torch.stack([e.proj.weight.T for e in layer.experts])
    return layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj.transpose(1, 2)


@pytest.mark.parametrize("name", ["transformers grouped", "transformers eager", "torchtitan", "litgpt"])
def test_peer_computes_the_same_layer(name):
    if reason := peers.missing([name]):
        pytest.skip(reason[name])
    ours, theirs = peers.build("ours", SMALL[0]), peers.build(name, SMALL[0])
    with torch.no_grad():
        for mine, other in zip(
            (ours.router.weight, ours.experts.gate_up, ours.experts.down), stacked(theirs, name), strict=True
        ):
            mine.copy_(other)
    x, grad = peers.tokens_and_gradient(64, SMALL[0].width)
    found, _ = ours(x)
    wanted = theirs(x)
    assert_close(found, wanted, "output")
    assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (found, wanted)), "gradient of x")

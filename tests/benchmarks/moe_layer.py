"""One MoE feed-forward layer, forward and backward, against a dense one of equal active FLOPs and against peers.

    python -m tests.benchmarks.moe_layer [--quick] [--json]

All implementations get the same tokens, take turns within each round, and are compared by the median of their rounds,
so that whatever else the machine does falls on all alike. fp32, 2,048 tokens. A peer that is not installed is left out
and named. `--json` ends with one object:

    {"rows": [{"shape", "share_of_dense": {name: share}, "milliseconds": {name: ms}}]}
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.model.feed_forward import FeedForward
from moe_dist.moe.layer import MoELayer

TOKENS = 2048


@dataclass(frozen=True)
class Shape:
    """A layer: experts, experts per token, expert width, model width."""

    experts: int
    top_k: int
    expert_width: int
    width: int

    def __str__(self) -> str:
        return f"E{self.experts} k{self.top_k} F{self.expert_width} D{self.width}"


SHAPES = (Shape(4, 2, 1408, 512), Shape(64, 8, 256, 512), Shape(64, 8, 128, 512), Shape(8, 2, 3584, 1024))


def dense(shape: Shape) -> nn.Module:
    """SwiGLU as wide as the experts of one token together."""
    return FeedForward(shape.width, shape.top_k * shape.expert_width)


def ours(shape: Shape) -> nn.Module:
    """The whole layer of this project: router, plan, dispatch, experts, combine, and its record."""
    config = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, expert_width=shape.expert_width, shared_expert_width=0
    )
    return MoELayer(shape.width, config, None)


def transformers_block(implementation: str) -> Callable[[Shape], nn.Module]:
    """The Qwen3-MoE block of `transformers` with one of its expert implementations."""

    def build(shape: Shape) -> nn.Module:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        return Qwen3MoeSparseMoeBlock(config)

    return build


IMPLEMENTATIONS: dict[str, Callable[[Shape], nn.Module]] = {
    "dense": dense,
    "ours": ours,
    "transformers grouped": transformers_block("grouped_mm"),
    "transformers eager": transformers_block("eager"),
}


def one_pass(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward; gradients are made anew each time, as after `zero_grad`."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    started = time.perf_counter()
    out = layer(x)
    (out[0] if isinstance(out, tuple) else out).backward(grad)
    return time.perf_counter() - started


def compare(shape: Shape, names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds by implementation, taking turns."""
    x = torch.randn(1, TOKENS, shape.width, requires_grad=True)
    grad = torch.randn(1, TOKENS, shape.width)
    layers = {name: IMPLEMENTATIONS[name](shape) for name in names}
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, layer in layers.items():
            taken = one_pass(layer, x, grad)
            if turn >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    options = parser.parse_args()
    names = [n for n in IMPLEMENTATIONS if "transformers" not in n or importlib.util.find_spec("transformers")]
    rows = []
    table = Table(title=f"forward + backward of {TOKENS} tokens, fp32, {torch.get_num_threads()} threads")
    for title in ("shape", *names):
        table.add_column(title, justify="right")
    for shape in SHAPES:
        seconds = compare(shape, names, 5 if options.quick else 15)
        shares = {name: seconds["dense"] / seconds[name] for name in names}
        rows.append({"shape": str(shape), "share_of_dense": shares, "milliseconds": _milliseconds(seconds)})
        table.add_row(str(shape), *(f"{shares[name]:.2f} ({1000 * seconds[name]:.0f} ms)" for name in names))
    console = Console(file=sys.stderr if options.json else sys.stdout)
    console.print(table)
    if len(names) < len(IMPLEMENTATIONS):
        console.print("transformers is not installed: left out")
    if options.json:
        print(json.dumps({"rows": rows}))


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1000 * value for name, value in seconds.items()}


if __name__ == "__main__":
    main()

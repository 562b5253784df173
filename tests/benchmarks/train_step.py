"""A whole training step: ours, a dense model of equal active FLOPs, and peers; and where the time of ours goes.

    python -m tests.benchmarks.train_step [--rows N] [--quick] [--json]

About 10 M active of 53 M parameters: 6 layers of width 384, 16 experts of width 448, two a token, vocabulary 4,096;
8 rows of 256 tokens (or N), fp32, AdamW, clipping at 1, balance loss. All in one process and its threads, taking turns
within each round; the median counts. Ours and the dense model make the trainer's own step, with all that it records.
`transformers` is Mixtral with grouped experts and `transformers dense` Mistral of equal active FLOPs, the dense model
that a user of that library trains; `torchtitan` is its Qwen3 decoder with its experts, without their casts to bf16; all
three with a plain loop and torch's own clipping. Then two ranks of one thread with expert degree 2, and one
process again, are timed for `two_ranks_share`. `--json` ends with one object: {"rows": [{implementation,
milliseconds, tokens_per_second, mfu, share_of_dense, share_of_transformers_dense}], "ours_over_best_peer",
"parts": {part: share of the step}, "two_ranks_share", "left_out"}.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moe_dist.config import Config, parse_config
from moe_dist.model import Transformer
from moe_dist.model.flops import count_parameters, training_flops_per_token
from moe_dist.moe.layer import MoELayer
from moe_dist.optim import build_adamw
from moe_dist.runtime.profiling import measure_gemm_peak
from moe_dist.train import step as step_module
from moe_dist.train.step import train_step
from tests.benchmarks import peers
from tests.benchmarks.allocator import restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.support.gang import run_gang
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

LENGTH, WIDTH, LAYERS, EXPERTS, TOP_K, EXPERT_WIDTH, VOCABULARY = 256, 384, 6, 16, 2, 448, 4096
Step = Callable[[Tensor, int], Any]


def config_of(rows: int, dense: bool = False) -> Config:
    """The model of every implementation; `dense` has feed-forwards as wide as the experts of one token together."""
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, "expert_width": EXPERT_WIDTH, "shared_expert_width": 0}
    model = {"vocab_size": VOCABULARY, "num_layers": LAYERS, "width": WIDTH, "num_heads": 6, "num_kv_heads": 2}
    model |= {"head_width": 64, "tie_embeddings": True, "ffn_width": TOP_K * EXPERT_WIDTH}
    model |= {"num_dense_layers": LAYERS if dense else 0, "moe": {**moe, "balance_loss": 0.01}}
    train = {"steps": 1000, "global_batch_sequences": rows, "micro_batch_sequences": rows, "clip_norm": 1.0}
    # Weights hardly move: every router keeps the load that its first weights give, about as even as training holds it.
    optimizer = {"lr": 1e-6, "warmup_steps": 0}
    tree = {"model": model, "train": train, "optimizer": optimizer, "data": {"sequence_length_tokens": LENGTH}}
    return parse_config(tree)


def batch_of(rows: int, step: int) -> Tensor:
    """Token rows of a step, by Zipf's law."""
    draw = torch.Generator().manual_seed(step)
    weight = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    return torch.multinomial(weight.expand(rows, -1), LENGTH + 1, replacement=True, generator=draw)


def ours(rows: int, dense: bool = False) -> Step:
    """The trainer's own step."""
    trainee = parallel_trainee(config_of(rows, dense), 1, "adamw")
    return lambda rows, step: train_step(trainee, rows, step)


def transformers_step(dense: bool = False) -> Step:
    """Mixtral with grouped experts and its own balance loss, or Mistral of equal active FLOPs; and a plain loop."""
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True, "use_cache": False}
    model: nn.Module
    if dense:
        config = MistralConfig(**shape, intermediate_size=TOP_K * EXPERT_WIDTH, sliding_window=None)
        model = MistralForCausalLM(config)
    else:
        experts = {"intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        config = MixtralConfig(**shape, **experts, output_router_logits=True, router_aux_loss_coef=0.01)
        config._experts_implementation = "grouped_mm"
        model = MixtralForCausalLM(config)

    def loss_of(rows: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss
        return loss

    return plain_step(model.train(), loss_of)


def torchtitan_step() -> Step:
    """Its Qwen3 decoder without norms of queries and keys, with the attention that a CPU has, and a plain loop."""
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config

    draw, norm = {"weight": partial(nn.init.normal_, std=0.02)}, qwen3._qwen3_norm(WIDTH)
    attention = make_gqa_config(
        dim=WIDTH,
        n_heads=6,
        n_kv_heads=2,
        head_dim=64,
        wqkv_param_init=draw,
        wo_param_init=draw,
        inner_attention=ScaledDotProductAttention.Config(),
        fuse_qkv=True,
        rope=CosSinRoPE.Config(dim=64, max_seq_len=LENGTH),
    )
    # A feed-forward holds the place until the experts without their casts to bf16 are put there.
    dense = make_ffn_config(dim=WIDTH, hidden_dim=8, w1_param_init=draw, w2w3_param_init=draw)
    block = qwen3.Qwen3TransformerBlock.Config(
        attention=attention, feed_forward=dense, attention_norm=norm, ffn_norm=norm
    )
    model = qwen3.Qwen3Model.Config(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        norm=norm,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=WIDTH, param_init=draw),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCABULARY, param_init=draw),
        layers=[block] * LAYERS,
        enable_weight_tying=True,
    ).build()
    model.init_states()
    for layer in model.layers.values():
        layer.feed_forward = peers.build("torchtitan", peers.Shape(EXPERTS, TOP_K, EXPERT_WIDTH, WIDTH))

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return plain_step(model, loss_of)


def plain_step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """What a training loop does around a model, in as few lines as torch allows."""
    optimizer = build_adamw(model, config_of(1).optimizer)

    def step_of(rows: Tensor, step: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step_of


IMPLEMENTATIONS: dict[str, Callable[[int], Step]] = {
    "dense": lambda rows: ours(rows, dense=True),
    "ours": ours,
    "transformers dense": lambda _: transformers_step(dense=True),
    "transformers": lambda _: transformers_step(),
    "torchtitan": lambda _: torchtitan_step(),
}
MIXTURES = ("transformers", "torchtitan")


def medians(steps: dict[str, Step], rounds: int, rows: int) -> dict[str, float]:
    """Seconds of a step by implementation, taking turns in every place."""
    names, taken = list(steps), defaultdict[str, list[float]](list)
    for turn in range(rounds + 2):
        batch, first = batch_of(rows, turn), turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            steps[name](batch, turn)
            if turn >= 2:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@contextlib.contextmanager
def clocked(owner: Any, name: str, part: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of a function to a part while inside."""
    original = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*given, **named)
        finally:
            spent[part] += time.perf_counter() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def parts_of_step(rounds: int, rows: int) -> dict[str, float]:
    """Shares of our step: of modules, forward and backward, by hooks; of the rest by function."""
    trainee = parallel_trainee(config_of(rows), 1, "adamw")
    spent: dict[str, float] = defaultdict(float)
    for module, part in _parts(trainee.model):
        _clock_module(module, part, spent)
    total = 0.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(clocked(trainee.optimizer, "step", "optimizer", spent))
        stack.enter_context(clocked(trainee.gradients, "reduce", "communication", spent))
        stack.enter_context(clocked(trainee.gradients, "clip", "norm and clipping", spent))
        stack.enter_context(clocked(step_module._Tally, "figures", "telemetry", spent))
        for turn in range(rounds + 2):
            if turn == 2:
                spent.clear()
                total = 0.0
            started = time.perf_counter()
            train_step(trainee, batch_of(rows, turn), turn)
            total += time.perf_counter() - started
    shares = {part: seconds / total for part, seconds in spent.items()}
    shares["routing, permutation, experts"] = shares.pop("experts")
    return {**shares, "logits, loss, norms, the rest": 1 - sum(shares.values())}


def _parts(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    for block in model.blocks:
        yield block.attention, "attention"
        assert isinstance(block.feed_forward, MoELayer), "every block of this model has experts"
        yield block.feed_forward, "experts"


def _clock_module(module: nn.Module, part: str, spent: dict[str, float]) -> None:
    """Clocks forward and backward; on a CPU both are done when they return."""
    started: list[float] = []

    def start(*_: Any) -> None:
        started.append(time.perf_counter())

    def stop(*_: Any) -> None:
        spent[part] += time.perf_counter() - started.pop()

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop)
    module.register_full_backward_pre_hook(start)
    module.register_full_backward_hook(stop)


def seconds_of_rank(rank: int, ranks: int, rounds: int, rows: int) -> float:
    """A step of so many ranks of one thread, until the slowest is done."""
    torch.set_num_threads(1)
    trainee, taken = parallel_trainee(config_of(rows), ranks, "adamw"), []
    for turn in range(rounds + 2):
        mine = batch_of(rows, turn).chunk(ranks)[rank]
        dist.barrier()
        started = time.perf_counter()
        train_step(trainee, mine, turn)
        dist.barrier()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def main() -> None:
    """Measures, prints tables and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens in a step (8)")
    options = parser.parse_args()
    restart_with_kept_blocks()
    rounds, rows = 5 if options.quick else 15, options.rows
    left_out = peers.missing([name for name in IMPLEMENTATIONS if name in peers.IMPLEMENTATIONS])
    with one_rank():
        steps = {name: build(rows) for name, build in IMPLEMENTATIONS.items() if name not in left_out}
        seconds = medians(steps, rounds, rows)
        parts = parts_of_step(rounds, rows)
        alone = medians({"ours": steps["ours"]}, rounds, rows)["ours"]
    two_ranks = run_gang(seconds_of_rank, 2, 2, rounds, rows, timeout_seconds=900)[0]
    best = min(taken for name, taken in seconds.items() if name in MIXTURES)
    figures = {"ours_over_best_peer": best / seconds["ours"], "parts": parts, "two_ranks_share": alone / two_ranks}
    console = Console(file=sys.stderr if options.json else sys.stdout)
    lines = table_of(seconds, rows * LENGTH)
    counts = count_parameters(config_of(rows).model)
    table = Table(*lines[0], title=f"{counts.active / 1e6:.1f} M active of {counts.total / 1e6:.1f} M parameters")
    for line in lines:
        table.add_row(line["implementation"], *(f"{line[key]:.3g}" for key in list(line)[1:]))
    console.print(table, f"ours over the best peer: {figures['ours_over_best_peer']:.3f}")
    console.print(*(f"{part}: {share:.1%}" for part, share in sorted(parts.items(), key=lambda p: -p[1])), sep="\n")
    console.print(f"two ranks of one thread, over one process of two: {figures['two_ranks_share']:.3f}")
    if options.json:
        print(json.dumps({"rows": lines, **figures, "left_out": left_out}))


def table_of(seconds: dict[str, float], tokens: int) -> list[dict[str, Any]]:
    """A line of figures for each implementation, from its seconds a step."""
    flops = training_flops_per_token(config_of(1).model, LENGTH) * tokens
    peak = measure_gemm_peak(torch.device("cpu"), torch.float32)
    return [
        {
            "implementation": name,
            "milliseconds": 1000 * taken,
            "tokens_per_second": tokens / taken,
            "mfu": flops / taken / peak,
            "share_of_dense": seconds["dense"] / taken,
            "share_of_transformers_dense": seconds["transformers dense"] / taken,
        }
        for name, taken in seconds.items()
    ]


if __name__ == "__main__":
    main()

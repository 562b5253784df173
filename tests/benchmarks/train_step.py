"""A whole training step: ours, a dense model of equal active FLOPs, and peers; and where the time of ours goes.

    python -m tests.benchmarks.train_step [--quick] [--json]

About 10 M active of 53 M parameters: 6 layers of width 384, 16 experts of width 448, two a token, vocabulary 4,096;
8 rows of 256 tokens, fp32, AdamW, clipping at 1, balance loss. All in one process and its threads, taking turns within
each round; the median counts. Ours and the dense model make the trainer's own step, with all that it records.
`transformers` is Mixtral with grouped experts; `torchtitan` its MoE layer (experts without their casts to bf16) in our
decoder, both with a plain loop and torch's own clipping. Then two ranks of one thread with expert degree 2, and one
process again, are timed for `two_ranks_share`. `--json` ends with one object: {"rows": [{implementation,
milliseconds, tokens_per_second, mfu, share_of_dense}], "ours_over_best_peer", "parts": {part: share of the step},
"two_ranks_share", "left_out"}.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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
from tests.support.models import plain_model
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

ROWS, LENGTH, WIDTH, LAYERS, EXPERTS, TOP_K, EXPERT_WIDTH, VOCABULARY = 8, 256, 384, 6, 16, 2, 448, 4096
Step = Callable[[Tensor, int], Any]


def config_of(dense: bool = False) -> Config:
    """The model of every implementation; `dense` has feed-forwards as wide as the experts of one token together."""
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, "expert_width": EXPERT_WIDTH, "shared_expert_width": 0}
    model = {"vocab_size": VOCABULARY, "num_layers": LAYERS, "width": WIDTH, "num_heads": 6, "num_kv_heads": 2}
    model |= {"head_width": 64, "tie_embeddings": True, "ffn_width": TOP_K * EXPERT_WIDTH}
    model |= {"num_dense_layers": LAYERS if dense else 0, "moe": {**moe, "balance_loss": 0.01}}
    train = {"steps": 1000, "global_batch_sequences": ROWS, "micro_batch_sequences": ROWS, "clip_norm": 1.0}
    # Weights hardly move: every router keeps the load that its first weights give, about as even as training holds it.
    optimizer = {"lr": 1e-6, "warmup_steps": 0}
    tree = {"model": model, "train": train, "optimizer": optimizer, "data": {"sequence_length_tokens": LENGTH}}
    return parse_config(tree)


def rows_of(step: int) -> Tensor:
    """Token rows of a step, by Zipf's law."""
    draw = torch.Generator().manual_seed(step)
    weight = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    return torch.multinomial(weight.expand(ROWS, -1), LENGTH + 1, replacement=True, generator=draw)


def ours(dense: bool = False) -> Step:
    """The trainer's own step."""
    trainee = parallel_trainee(config_of(dense), 1, "adamw")
    return lambda rows, step: train_step(trainee, rows, step)


def transformers_step() -> Step:
    """Mixtral with grouped experts, its own balance loss, and a plain loop."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    model = MixtralForCausalLM(config).train()

    def loss_of(rows: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss
        return loss

    return plain_step(model, loss_of)


def torchtitan_step() -> Step:
    """Our decoder with torchtitan's MoE layers, and a plain loop."""
    model = plain_model(config_of())
    shape = peers.Shape(EXPERTS, TOP_K, EXPERT_WIDTH, WIDTH)
    for block in model.blocks:
        block.feed_forward = peers.build("torchtitan", shape)

    def loss_of(rows: Tensor) -> Tensor:
        hidden, _ = model(rows[:, :-1])
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), rows[:, 1:].flatten())

    return plain_step(model, loss_of)


def plain_step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """What a training loop does around a model, in as few lines as torch allows."""
    optimizer = build_adamw(model, config_of().optimizer)

    def step_of(rows: Tensor, step: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step_of


IMPLEMENTATIONS: dict[str, Callable[[], Step]] = {
    "dense": lambda: ours(dense=True),
    "ours": ours,
    "transformers": transformers_step,
    "torchtitan": torchtitan_step,
}


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Seconds of a step by implementation, taking turns in every place."""
    names, taken = list(steps), defaultdict[str, list[float]](list)
    for turn in range(rounds + 2):
        rows, first = rows_of(turn), turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            steps[name](rows, turn)
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


def parts_of_step(rounds: int) -> dict[str, float]:
    """Shares of our step: of modules, forward and backward, by hooks; of the rest by function."""
    trainee = parallel_trainee(config_of(), 1, "adamw")
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
            train_step(trainee, rows_of(turn), turn)
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


def seconds_of_rank(rank: int, ranks: int, rounds: int) -> float:
    """A step of so many ranks of one thread, until the slowest is done."""
    torch.set_num_threads(1)
    trainee, taken = parallel_trainee(config_of(), ranks, "adamw"), []
    for turn in range(rounds + 2):
        rows = rows_of(turn).chunk(ranks)[rank]
        dist.barrier()
        started = time.perf_counter()
        train_step(trainee, rows, turn)
        dist.barrier()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def main() -> None:
    """Measures, prints tables and, with --json, one object."""
    options = parser_of(__doc__).parse_args()
    restart_with_kept_blocks()
    rounds = 5 if options.quick else 15
    left_out = peers.missing([name for name in IMPLEMENTATIONS if name in peers.IMPLEMENTATIONS])
    with one_rank():
        steps = {name: build() for name, build in IMPLEMENTATIONS.items() if name not in left_out}
        seconds = medians(steps, rounds)
        parts = parts_of_step(rounds)
        alone = medians({"ours": steps["ours"]}, rounds)["ours"]
    two_ranks = run_gang(seconds_of_rank, 2, 2, rounds, timeout_seconds=900)[0]
    config, tokens = config_of(), ROWS * LENGTH
    flops = training_flops_per_token(config.model, LENGTH) * tokens
    peak = measure_gemm_peak(torch.device("cpu"), torch.float32)
    rows = [
        {
            "implementation": name,
            "milliseconds": 1000 * taken,
            "tokens_per_second": tokens / taken,
            "mfu": flops / taken / peak,
            "share_of_dense": seconds["dense"] / taken,
        }
        for name, taken in seconds.items()
    ]
    best = min(taken for name, taken in seconds.items() if name not in ("dense", "ours"))
    figures = {"ours_over_best_peer": best / seconds["ours"], "parts": parts, "two_ranks_share": alone / two_ranks}
    console = Console(file=sys.stderr if options.json else sys.stdout)
    counts = count_parameters(config.model)
    table = Table(*rows[0], title=f"{counts.active / 1e6:.1f} M active of {counts.total / 1e6:.1f} M parameters")
    for row in rows:
        table.add_row(row["implementation"], *(f"{row[key]:.3g}" for key in list(row)[1:]))
    console.print(table, f"ours over the best peer: {figures['ours_over_best_peer']:.3f}")
    console.print(*(f"{part}: {share:.1%}" for part, share in sorted(parts.items(), key=lambda p: -p[1])), sep="\n")
    console.print(f"two ranks of one thread, over one process of two: {figures['two_ranks_share']:.3f}")
    if options.json:
        print(json.dumps({"rows": rows, **figures, "left_out": left_out}))


if __name__ == "__main__":
    main()

"""The config tree: every key with its type, unit, default and meaning. Frozen and strict; it holds no behaviour.

What sections are made of is in `section.py`; those about the model are in `model_schema.py`, those about data in
`data_schema.py`, what a run watches of itself in `watch_schema.py`. Rules that join several keys are in `rules.py`;
reading files and overrides is in `load.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from moe_dist.config.data_schema import DataConfig
from moe_dist.config.model_schema import ModelConfig
from moe_dist.config.section import Section, key, section
from moe_dist.config.watch_schema import WatchConfig


class RunConfig(Section):
    dir: str = key("runs/default", "Directory of this run: resolved config, metrics, checkpoints, logs.", "path")


class ParallelConfig(Section):
    expert: int | None = key(
        None,
        "Ranks that share one copy of the experts. null takes the largest divisor of the rank count that is not "
        "above the number of experts.",
        "ranks",
        ge=1,
    )
    tensor: int = key(
        1,
        "Ranks that share one copy of attention, dense feed-forward, embedding and output, and their tokens.",
        "ranks",
        ge=1,
    )
    expert_tensor: int = key(1, "Ranks that share each expert, cut by its width.", "ranks", ge=1)
    dispatch: Literal["all_to_all", "all_gather", "deduplicated", "two_level", "deepep"] = key(
        "all_to_all",
        "How tokens reach experts on other ranks: a row for every choice; every token to every rank; a token once to "
        "each rank that holds one of its experts; once to each node and from there to its ranks; or by DeepEP.",
    )
    overlap_chunks: int = key(
        1,
        "Parts of a micro-batch of which one is exchanged while another is computed; 1 does not overlap.",
        "parts",
        ge=1,
    )
    data: Literal["replicate", "zero1", "fsdp"] = key(
        "replicate",
        "What ranks that hold the same parameters keep: each all of everything; each the optimizer's state of some "
        "parameters, which it updates for the others (ZeRO stage 1); or each a part of every parameter, gradient and "
        "state (FSDP2).",
    )
    data_shard: int | None = key(
        None,
        "Neighbouring data ranks over which fsdp shares out one copy of the parameters; between these copies gradients "
        "are summed (hybrid). null takes all of them, which makes one copy.",
        "ranks",
        ge=1,
    )
    overlap_gradients: bool = key(
        False, "Gradients are summed over ranks beside the backward pass that makes them, and not after it."
    )
    ranks_per_node: int | None = key(
        None, "Neighbouring ranks that share a node, for two_level; null takes the launcher's count.", "ranks", ge=1
    )


class TrainConfig(Section):
    steps: int = key(100, "Optimizer updates of the whole run.", "steps", ge=1)
    global_batch_sequences: int = key(16, "Sequences in one optimizer update, over all ranks.", "sequences", ge=1)
    micro_batch_sequences: int = key(
        16, "Most sequences a rank takes through the model at once; more are accumulated.", "sequences", ge=1
    )
    precision: Literal["fp32", "bf16", "fp64"] = key(
        "fp32", "Arithmetic: fp32, bf16 autocast over fp32 weights, or fp64 (for proofs)."
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none",
        "What the backward pass computes again rather than keeps: nothing; attention, norms, dense feed-forwards and "
        "the shared expert, but no routed expert and no exchange; or all inside every block, exchanges included.",
    )
    compile: bool = key(
        False,
        "Attention, norms, dense and shared feed-forwards are compiled by torch.compile at the first step, which takes "
        "from seconds to minutes; on a CPU a C++ compiler must be there. Routing, exchange and experts are not.",
    )
    loss_chunk_tokens: int | None = key(
        1024,
        "Tokens whose scores over the whole vocabulary exist at once; null makes those of a micro-batch together.",
        "tokens",
        ge=1,
    )
    clip_norm: float | None = key(1.0, "Gradients are scaled down to this global norm; null does not clip.", gt=0)
    routing_ledger: Literal["none", "record"] = key(
        "none", "`record` writes the experts of every token at every step to the folder `routing` in run.dir."
    )
    routing_replay: str | None = key(
        None,
        "A ledger, or the directory of a run that recorded one: its choices of experts and drops are followed instead "
        "of choosing.",
        "path",
    )
    checks: Literal["off", "light", "full"] = key(
        "light",
        "Invariants that stop a run where they do not hold: none; those of counts and gradients at every step, and now "
        "and then that copies of a tensor are identical and experts are not; or the latter also at both ends of a run.",
    )
    checks_every_steps: int = key(100, "Copies of weights are compared every so many steps.", "steps", ge=1)
    equal_experts_at_start: bool = key(
        False, "Experts may be equal before the first update, as `moe-dist upcycle` makes them; checks allow it there."
    )
    threads_per_rank: int | None = key(
        None, "CPU threads of a rank; null shares the machine's cores evenly.", "threads", ge=1
    )

    @field_validator("checks", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class OptimizerConfig(Section):
    lr: float = key(1e-3, "Peak learning rate of AdamW.", gt=0)
    min_lr_fraction: float = key(0.1, "The cosine ends at this share of the peak.", "fraction", ge=0, le=1)
    warmup_steps: int = key(10, "Steps of linear warm-up.", "steps", ge=0)
    beta1: float = key(0.9, "Decay of AdamW's first moment.", ge=0, lt=1)
    beta2: float = key(0.95, "Decay of AdamW's second moment.", ge=0, lt=1)
    eps: float = key(1e-8, "AdamW's epsilon.", gt=0)
    weight_decay: float = key(0.1, "Decoupled decay of matrices; vectors and embeddings have none.", ge=0)


class EvaluateConfig(Section):
    every_steps: int = key(0, "Evaluate every so many steps; 0 only before and after training.", "steps", ge=0)
    sequences: int = key(64, "Held-out rows that are scored, spread evenly over the held-out text.", "sequences", ge=1)


class GenerateConfig(Section):
    prompts: tuple[str, ...] = key(
        ("def ", "class ", "import "), "Beginnings that the samples at the end of a run continue.", strict=False
    )
    max_new_tokens: int = key(128, "Length of a sample.", "tokens", ge=1)
    temperature: float = key(0.8, "Divides the logits; 0 takes the most probable token.", ge=0)
    top_k: int = key(50, "Sample among so many most probable tokens; 0 among all.", "tokens", ge=0)


class CheckpointConfig(Section):
    every_steps: int = key(50, "Save every so many steps, and at the end.", "steps", ge=1)
    keep: int = key(2, "Newest checkpoints that are kept.", "checkpoints", ge=1)
    keep_every_steps: int = key(
        0,
        "Checkpoints of steps that are multiples of this are kept for good; 0: none are.",
        "steps",
        ge=0,
    )
    asynchronous: bool = key(
        True,
        "A save between others lets training go on once its state is copied to host memory, and is written beside it; "
        "the next save waits for it. Takes as much host memory as a rank's part, for the whole run.",
    )
    store: str | None = key(
        None,
        "An object store, such as s3://bucket/runs/demo, to which checkpoints are copied once they are on the disk; a "
        "run whose disk has none goes on from there. Keys and the store's address come from the environment.",
        "URL",
        pattern=r"^[a-z][a-z0-9+.-]*://[^@]+$",
    )
    memory_every_steps: int = key(
        0,
        "The newest state is also kept in host memory outside of the ranks, every so many steps, and lost ranks go on "
        "from there: with 1 no step is lost. Takes three times a rank's part of host memory, on Ray five times. 0: it "
        "is not.",
        "steps",
        ge=0,
    )


class WorkersConfig(Section):
    """How many ranks a Ray run has; a whole number in place of this section is both."""

    min: int = key(2, "Fewest ranks that a run goes on with when nodes are lost.", "ranks", ge=1)
    max: int = key(2, "Ranks that a run has where the cluster can hold them.", "ranks", ge=1)


class LaunchConfig(Section):
    workers: WorkersConfig = section(
        WorkersConfig,
        "Ranks of a Ray run: a whole number, or {min, max} for as many as there is room for; when nodes go or come, "
        "the run goes on in the best layout of what is there.",
    )
    cpus_per_worker: float = key(1.0, "CPUs that Ray reserves for a rank.", "CPUs", gt=0)
    gpus_per_worker: float | None = key(
        None, "GPUs that Ray reserves for a rank; null takes one each where the cluster has enough.", "GPUs", ge=0
    )
    placement: Literal["pack", "spread", "strict_spread"] = key(
        "pack", "Ranks on few nodes, on many, or each on its own."
    )
    max_failures: int = key(3, "Times that a failed group of workers is started again.", ge=0)
    preemption_poll_seconds: float = key(
        2.0, "How often Ray is asked for nodes that are to go away or have come.", "seconds", gt=0
    )
    timeout_seconds: float = key(300.0, "A collective that takes longer fails the rank.", "seconds", gt=0)
    hang_timeout_seconds: float | None = key(
        240.0,
        "A rank that stands still for so long, or gives no sign of life, is named, the stacks of all ranks are saved, "
        "and the group is started again; null watches for none.",
        "seconds",
        gt=0,
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _number_is_both(cls, value: Any) -> Any:
        """`launch.workers=4` is {min: 4, max: 4}."""
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Config(Section):
    """The whole configuration of a run."""

    seed: int = key(0, "Seed of initial weights, data order and sampling.", ge=0)
    run: RunConfig = section(RunConfig, "Where a run lives.")
    data: DataConfig = section(DataConfig, "Text, tokenizer, shards and rows.")
    model: ModelConfig = section(ModelConfig, "The decoder.")
    parallel: ParallelConfig = section(ParallelConfig, "How ranks share the work.")
    train: TrainConfig = section(TrainConfig, "Steps and batches.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "AdamW and its schedule.")
    evaluate: EvaluateConfig = section(EvaluateConfig, "Held-out evaluation.")
    generate: GenerateConfig = section(GenerateConfig, "Samples of text.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Checkpoints.")
    watch: WatchConfig = section(WatchConfig, "What a run watches of itself, and when it stops or warns.")
    launch: LaunchConfig = section(LaunchConfig, "Processes.")

"""From a dense model to a mixture of experts whose first forward pass is that of the dense model.

Every expert is a slice of the dense feed-forward, which is a sum over its F inner channels. They are cut into
`slices` parts of equal width, behind those that the shared expert takes:

    channels   |   shared   |  slice 0  |  slice 1  |          slices = 2, num_experts = 6, top_k = 4
    expert ids               0, 2, 4      1, 3, 5              copies 0 (0, 1), 1 (2, 3) and 2 (4, 5)

With one slice an expert is a copy of the whole (sparse upcycling). With several, the experts 'copy * slices + slice'
of a copy begin with the same row of the router, so that a token scores them alike: its `top_k` best are all slices of
its best `top_k / slices` copies, since equal scores are taken in the order of the ids. The gate weights of a copy's
slices are equal and, times `gate_scale = slices`, those of the copies sum to one: the whole feed-forward comes out.
Copies part with the first update, for each sees other tokens, and so do a copy's rows of the router, for each slice
returns something else.

Source: Komatsuzaki et al. 2023 (sparse upcycling) for copies; He et al. 2024 (Upcycling large language models into
mixture of experts) for slices in virtual groups. They scale the weights of experts, here the gates are; the shared
expert is ours.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint import store
from moe_dist.checkpoint.header import plan_header
from moe_dist.checkpoint.load import check_complete
from moe_dist.checkpoint.manifest import FORMAT, Manifest, checked, read_manifest
from moe_dist.checkpoint.pieces import expected_shapes
from moe_dist.checkpoint.read import Reader
from moe_dist.checkpoint.write import stream_file
from moe_dist.config import Config, ModelConfig
from moe_dist.config.load import write_yaml
from moe_dist.errors import ConfigError
from moe_dist.model.init import initial_value

_MAY_DIFFER = ("num_dense_layers", "moe_every_layers", "moe")
# Keys below model.moe, the value at which the first forward pass is that of the dense model, and why no other.
_MUST_BE = (
    ("normalize_gates", True, "the gate weights of a token sum to one before model.moe.gate_scale"),
    ("weigh", "output", "a gate weight on what an expert receives goes through its activation"),
    ("latent_width", None, "experts work on the channels of the dense feed-forward"),
    ("expert_bias", False, "the dense feed-forward has no bias that an expert could begin with"),
    ("shared_expert_gate", False, "the shared expert's part of the dense feed-forward is not weighed"),
    ("capacity_factor", None, "a token that is dropped lacks its feed-forward"),
    ("capacity_factor_eval", None, "a token that is dropped lacks its feed-forward"),
)
_ROUTERS = ("softmax_topk", "sigmoid_topk")


@dataclass(frozen=True)
class _Cast:
    """Who plays which part: what a tensor of the new model is made of.

    Attributes:
        config: Of the new model.
        slices: Parts of the dense feed-forward.
        reader: The dense checkpoint.
        held: The dense tensor that was read last, by its name; the pieces of one come one after the other.
    """

    config: Config
    slices: int
    reader: Reader
    held: dict[str, Tensor]

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor of the new model by its name in a checkpoint."""
        kind, _, path = name.partition("/")
        if kind != "model" or path.endswith("router.selection_bias"):
            return torch.zeros(shape)
        block, inside, part = path.partition(".feed_forward.")
        if part.startswith("router."):
            value_EX = initial_value(path, shape, self.config.model, self.config.seed)
            return value_EX[:: self.slices].repeat_interleave(self.slices, 0)
        if part.startswith("experts."):
            matrix, _, expert = part.removeprefix("experts.").partition("#")
            return self._slice(f"{block}{inside}{matrix}.weight", self._channels(int(expert)), stacked=True)
        if part.startswith("shared."):
            channels = slice(0, self.config.model.moe.shared_expert_width)
            return self._slice(f"{block}{inside}{part.removeprefix('shared.')}", channels, stacked=False)
        return self._dense(path)

    def _channels(self, expert: int) -> slice:
        """The channels of the dense feed-forward that an expert begins with."""
        moe = self.config.model.moe
        first = moe.shared_expert_width + expert % self.slices * moe.expert_width
        return slice(first, first + moe.expert_width)

    def _slice(self, path: str, channels: slice, stacked: bool) -> Tensor:
        """Some channels of a matrix of the dense feed-forward; a stacked `down` is [F, D], a dense one [D, F]."""
        whole = self._dense(path)
        if path.endswith("down.weight"):
            return whole[:, channels].T if stacked else whole[:, channels]
        parts = 2 if path.endswith("gate_up.weight") else 1
        return torch.cat([part[channels] for part in whole.chunk(parts)])

    def _dense(self, path: str) -> Tensor:
        if path not in self.held:
            self.held.clear()
            self.held[path] = self.reader.tensor(f"model/{path}")
        return self.held[path]


def upcycle(source: Path, root: Path, config: Config, slices: int = 1) -> Path:
    """Writes the checkpoint of step 0 of a mixture of experts that begins as the dense model of `source`.

    One tensor of the dense model is in memory at a time, and every byte of it is proven as it is read. Moments are
    zero and the data begins at the first sample.

    Args:
        source: The dense checkpoint.
        root: The folder of checkpoints that gets it.
        config: Of the new run.
        slices: Parts of the dense feed-forward, each of which is an expert; 1 copies it whole.

    Raises:
        ConfigError: The first forward pass would not be that of the dense model.
        CheckpointError: The source is damaged, or there is no room.
    """
    manifest = read_manifest(source)
    check_upcycling(check_complete(source, manifest).model, config.model, slices)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    shapes = {
        name: (shape, torch.float32 if name.endswith("router.selection_bias") else dtype)
        for name, shape in expected_shapes(config.model).items()
    }
    needed = sum(shape.numel() * kind.itemsize for shape, kind in shapes.values())
    folder, save = store.begin(root, 0, needed), uuid.uuid4().hex
    header = plan_header(shapes, {"save": save, "step": "0"})
    try:
        with Reader(source, manifest) as reader:
            cast = _Cast(config, slices, reader, {})

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name in header.tensors:
                    shape, kind = shapes[name]
                    tensor = cast.tensor(name, shape)
                    assert tensor.shape == shape, f"{name}: {tensor.shape} for {shape}"
                    yield name, tensor.to(kind)

            part = stream_file(folder / store.part_name(0, 1), header, tensors())
        return store.commit(folder, _manifest_of(config, manifest, part, save))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _manifest_of(config: Config, dense: Manifest, part: dict[str, object], save: str) -> Manifest:
    tokenizer = dense.data.get("tokenizer_sha256")
    told = {
        "format": FORMAT,
        "step": 0,
        "save": save,
        "config": config.model_dump(mode="json"),
        "data": {} if tokenizer is None else {"tokenizer_sha256": tokenizer},
        "state": {"upcycled": {"save": dense.save, "step": dense.step}},
        "layout": f"upcycled from a dense model after {dense.step} updates",
        "parts": [part],
    }
    return checked(told, "the checkpoint of the new model")


def check_upcycling(dense: ModelConfig, sparse: ModelConfig, slices: int) -> None:
    """That the first forward pass of `sparse` can be that of `dense`.

    Raises:
        ConfigError: It cannot; with the key, the rule and the value that would do.
    """
    for error in _hindrances(dense, sparse, slices):
        raise error


def _hindrances(dense: ModelConfig, sparse: ModelConfig, slices: int) -> Iterator[ConfigError]:
    if dense.num_dense_layers < dense.num_layers:
        rule = f"a dense model is upcycled: all of its {dense.num_layers} blocks have a dense feed-forward"
        fix = f"the run of a dense model (model.num_dense_layers={dense.num_layers})"
        yield ConfigError("model.num_dense_layers of the dense run", dense.num_dense_layers, rule, fix)
    if sparse.num_dense_layers >= sparse.num_layers:
        rule = "some block of the new model has experts"
        yield ConfigError("model.num_dense_layers", sparse.num_dense_layers, rule, "model.num_dense_layers=0")
    for name, before in dense:
        now = getattr(sparse, name)
        if name not in _MAY_DIFFER and now != before:
            rule = "the new model is the dense one but for its experts"
            yield ConfigError(f"model.{name}", now, rule, f"model.{name}={before}")
    for name, value in (("ffn_bias", False), ("mix.kind", "none")):
        found = sparse.mix.kind if name == "mix.kind" else sparse.ffn_bias
        if found != value:
            yield ConfigError(f"model.{name}", found, "an expert has no such part", f"a dense run with {name}={value}")
    yield from _moe_hindrances(dense, sparse, slices)


def _moe_hindrances(dense: ModelConfig, sparse: ModelConfig, slices: int) -> Iterator[ConfigError]:
    moe = sparse.moe
    if moe.router not in _ROUTERS:
        rule = f"a token's experts are weighed so that the weights sum to one in training too: {' or '.join(_ROUTERS)}"
        yield ConfigError("model.moe.router", moe.router, rule, "model.moe.router=softmax_topk")
    wanted = (
        ("activation", dense.ffn_activation, "experts compute what the dense feed-forward computes"),
        ("gate_scale", float(slices), "the gate weights of all slices of a copy together are the copy's"),
    )
    for name, value, why in (*_MUST_BE, *wanted):
        if getattr(moe, name) != value:
            fix = f"model.moe.{name}={write_yaml(value, one_line=True)}"
            yield ConfigError(f"model.moe.{name}", getattr(moe, name), why, fix)
    covered = slices * moe.expert_width + moe.shared_expert_width
    if covered != dense.ffn_width:
        rule = f"{slices} experts and the shared one together are as wide as the dense feed-forward ({dense.ffn_width})"
        routed = dense.ffn_width - moe.shared_expert_width
        fix = f"slices that divide {routed}, and model.moe.expert_width={routed // slices}"
        yield ConfigError("model.moe.expert_width", moe.expert_width, rule, fix)
    of_group = moe.num_experts // moe.num_groups
    for name, number in (("num_experts", moe.num_experts), ("top_k", moe.top_k), ("num_groups", of_group)):
        if number % slices:
            rule = f"experts come in copies of {slices} slices, and so do a token's and those of a group"
            yield ConfigError(f"model.moe.{name}", getattr(moe, name), rule, f"multiples of {slices}")

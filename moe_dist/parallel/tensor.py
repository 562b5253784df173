"""Tensor parallelism with sequence parallelism: attention, dense feed-forward, embedding and output are cut over the
ranks of a tensor group, and so are the tokens between them.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, t = T / ranks tokens of this rank, D model width,
V vocabulary.

    tokens t  --gather-->  T  --[cut by heads or width]-->  partial sums T  --sum, scatter-->  tokens t

Every rank of a tensor group reads the same rows. Between the cut parts it holds a run of their tokens: norms, router,
shared expert and experts see each token on one rank, as they do under data parallelism. So whatever is not cut has a
gradient that is summed over all ranks, and what is cut one that is summed over the ranks with the same cut; nothing is
divided. Source: Korthikanti et al. 2022 (sequence parallelism), here over the tokens of all sequences in a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.model.attention import Attention
from moe_dist.model.block import Block
from moe_dist.model.feed_forward import FeedForward
from moe_dist.model.latent_attention import LatentAttention
from moe_dist.model.mix import Adapter, CausalMix
from moe_dist.model.naming import Cut, GlobalTensor
from moe_dist.model.norm import RMSNorm
from moe_dist.model.transformer import Transformer
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.product import Linear, linear
from moe_dist.parallel.collectives import arrived_rows, start_rows, summed
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.waits import waiting


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of a micro-batch, of which the ranks of a tensor group route a run each.

    Attributes:
        group: The tensor group.
    """

    group: dist.ProcessGroup

    def here(self, count: int) -> slice:
        """Which of `count` tokens are routed here; the layout lets the ranks divide them."""
        share, place = count // dist.get_world_size(self.group), dist.get_rank(self.group)
        return slice(place * share, (place + 1) * share)

    def whole(self, held: Tensor) -> Tensor:
        """Integers or numbers without gradient of all tokens, from those of the tokens here."""
        kind = held.dtype
        held = held.byte() if kind == torch.bool else held
        parts = [torch.empty_like(held) for _ in range(dist.get_world_size(self.group))]
        with waiting():
            dist.all_gather(parts, held.detach().contiguous(), group=self.group)
        return torch.cat(parts).to(kind)


def cut_tensors(model: Transformer, mesh: Mesh) -> None:
    """Leaves a model on `meta` this rank's cut of what is cut, and puts the exchange of tokens around it."""
    group, parts, place = mesh.tensor, mesh.layout.tensor, mesh.tensor_place
    if parts == 1:
        return
    with torch.device("meta"):
        model.embedding = VocabularyEmbedding(model.config.vocab_size, model.config.width, group)
        if model.output is not None:
            model.output = _cut_linear(model.output, Cut(0, parts, place))
        for block in model.blocks:
            assert isinstance(block, Block), "a decoder is made of blocks"
            _cut_heads(block.attention, Cut(0, parts, place), group)
            _exchange_around(block.attention, group)
            if isinstance(block.feed_forward, MoELayer):
                block.feed_forward.tokens = SharedTokens(group)
                if isinstance(block.feed_forward.shared, FeedForward) and block.feed_forward.shared.mix is not None:
                    _tell_tokens_before(block.feed_forward.shared, group)
                continue
            dense = block.feed_forward
            name, first = dense.first
            setattr(dense, name, _cut_linear(first, Cut(0, parts, place, dense.activation.parts)))
            dense.down = _cut_linear(dense.down, Cut(1, parts, place))
            _cut_mix(dense, Cut(0, parts, place))
            _exchange_around(dense, group)
    model.tokens = SharedTokens(group)
    model.vocabulary = SharedVocabulary(group, place * (model.config.vocab_size // parts))


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids that this rank scores: its part of the output weight.

    Scores are never gathered: the largest, the sum of exponentials and the score of the target are reduced. The result
    is the same on all ranks, and each backward takes its gradient once.

    Attributes:
        group: The tensor group.
        first: The first id here.
    """

    group: dist.ProcessGroup
    first: int

    def hidden(self, x_1tD: Tensor) -> Tensor:
        return gather_tokens(x_1tD.flatten(0, 1), self.group)

    def largest(self, value_C: Tensor) -> Tensor:
        with waiting():
            dist.all_reduce(value_C, op=dist.ReduceOp.MAX, group=self.group)
        return value_C

    def total(self, value: Tensor) -> Tensor:
        with waiting():
            dist.all_reduce(value, group=self.group)
        return value


class VocabularyEmbedding(nn.Embedding):
    """The rows of an embedding whose ids fall to this rank; gives the tokens of this rank, [1, t, D]."""

    def __init__(self, vocabulary: int, width: int, group: dist.ProcessGroup) -> None:
        parts, place = dist.get_world_size(group), dist.get_rank(group)
        super().__init__(vocabulary // parts, width)
        self.group, self.first = group, place * (vocabulary // parts)
        self.cuts = {"weight": Cut(0, parts, place)}

    def forward(self, tokens_BS: Tensor) -> Tensor:
        local_T = tokens_BS.reshape(-1) - self.first
        inside_T = (local_T >= 0) & (local_T < self.num_embeddings)
        rows_TD = F.embedding(local_T.where(inside_T, 0), self.weight).where(inside_T[:, None], 0)
        return sum_and_scatter(rows_TD, self.group)[None]


def gather_tokens(x_tD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks of a group, [T, D], in order of rank; its gradient is summed and scattered."""
    ranks = dist.get_world_size(group)
    each = [x_tD.shape[0]] * ranks
    return arrived_rows(start_rows(x_tD.repeat(ranks, 1), each, each, group))


def sum_and_scatter(y_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums of all tokens, added up in order of rank where the tokens are, [t, D]."""
    ranks = dist.get_world_size(group)
    each = [y_TD.shape[0] // ranks] * ranks
    return arrived_rows(start_rows(y_TD, each, each, group)).unflatten(0, (ranks, -1)).sum(0)


class PartialLinear(Linear):
    """The input channels here of a linear map: partial sums, to which no rank adds the bias, see `_exchange_around`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class CutRMSNorm(nn.Module):
    """The channels here of an RMSNorm over all of them; the sum of squares is that of all ranks."""

    def __init__(self, whole: RMSNorm, cut: Cut, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.width, self.group, self.cuts = whole.eps, len(whole.weight), group, {"weight": cut}
        self.weight = nn.Parameter(torch.empty(self.width // cut.parts))

    @torch.compiler.disable(recursive=True)  # no compiled part holds a collective
    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = summed(exact.square().sum(-1, keepdim=True), self.group) / self.width
        return (exact * torch.rsqrt(mean + self.eps) * self.weight.to(exact.dtype)).to(x.dtype)


def _cut_heads(attention: Attention | LatentAttention, cut: Cut, group: dist.ProcessGroup) -> None:
    """Leaves attention its part of the heads.

    What heads share stays whole, and every rank makes it of all tokens: norms of a head, and the way down to latents.
    A rank has the part of its gradient that comes through its heads, so that it too is summed over all ranks.
    """
    for name, whole in list(attention.named_children()):
        if name in ("query", "key", "value", "query_up", "kv_up"):
            setattr(attention, name, _cut_linear(cast(Linear, whole), cut))
    attention.output = _cut_linear(attention.output, replace(cut, dim=1))
    if isinstance(attention, Attention) and attention.qk_norm == "whole":
        for name in ("query_norm", "key_norm"):
            setattr(attention, name, CutRMSNorm(getattr(attention, name), cut, group))
    if attention.sinks is not None:
        attention.sinks = nn.Parameter(torch.empty(len(attention.sinks) // cut.parts))
        attention.cuts = {"sinks": cut}  # type: ignore[assignment]


def _cut_linear(whole: Linear, cut: Cut) -> Linear:
    """A linear map of whose weight [out, in] this is a cut, and of whose bias where outputs are cut."""
    size = list(whole.weight.shape)
    size[cut.dim] //= cut.parts
    kind = PartialLinear if cut.dim else Linear
    held = kind(size[1], size[0], bias=whole.bias is not None)
    held.cuts = {"weight": cut} if cut.dim else {"weight": cut, "bias": cut}  # type: ignore[assignment]
    return held


def _exchange_around(module: Attention | LatentAttention | FeedForward, group: dist.ProcessGroup) -> None:
    """Lets a module see all tokens and gives on the sums of those here."""
    last = module.down if isinstance(module, FeedForward) else module.output

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD = gather_tokens(given[0].flatten(0, 1), group)
        length = given[1].cos.shape[-2]  # of the rotary table
        return x_TD.view(-1, length, x_TD.shape[1]), *given[1:]

    def after(_: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        here_1tD = sum_and_scatter(out.reshape(-1, out.shape[-1]), group)[None]
        bias_D = last.bias  # once for each token: that of a partial sum would be added on every rank
        return here_1tD if bias_D is None else here_1tD + bias_D.to(here_1tD.dtype)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _cut_mix(dense: FeedForward, cut: Cut) -> None:
    """Leaves what sees the tokens before the channels that are here; an adapter the part of its narrow ones."""
    match dense.mix:
        case CausalMix():
            _cut_channels(dense.mix, replace(cut, sections=dense.activation.parts))
        case Adapter():
            dense.mix.narrow = _cut_linear(dense.mix.narrow, cut)
            dense.mix.wide = _cut_linear(dense.mix.wide, replace(cut, dim=1))
            _cut_channels(dense.mix.conv, cut)


def _cut_channels(mix: CausalMix, cut: Cut) -> None:
    channels, seen = mix.weight.shape
    mix.weight = nn.Parameter(torch.empty(channels // cut.parts, seen))
    mix.cuts = {"weight": cut}  # type: ignore[assignment]


def _tell_tokens_before(shared: FeedForward, group: dist.ProcessGroup) -> None:
    """Lets a shared expert, which is whole on every rank, compute the few tokens before those here, too.

    They are taken off what it returns, and the gradient of what they told goes back to where they are.
    """
    conv = shared.mix.conv if isinstance(shared.mix, Adapter) else shared.mix
    assert conv is not None, "asked where there is a mix"
    before_here = conv.weight.shape[1] - 1

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, places = gather_tokens(given[0].flatten(0, 1), group), given[1]
        place_S = torch.arange(places.cos.shape[-2], device=x_TD.device)
        place_BS = place_S.expand(len(x_TD) // len(place_S), -1) if places.position_BS is None else places.position_BS
        here = SharedTokens(group).here(len(x_TD))
        line = slice(here.start, here.stop + before_here)  # of all behind so many that stand for none
        x_LD, place_L = F.pad(x_TD, (0, 0, before_here, 0))[line], F.pad(place_BS.flatten(), (before_here, 0))[line]
        return x_LD[None], places._replace(position_BS=place_L[None])

    def after(_: nn.Module, given: tuple[Any, ...], out_1tD: Tensor) -> Tensor:
        return out_1tD[:, before_here:]

    shared.register_forward_pre_hook(before)
    shared.register_forward_hook(after)


def gather_cut(piece: GlobalTensor, held: Tensor, mesh: Mesh) -> Tensor:
    """The whole of a globally named tensor; entered by all ranks that share it, with their cuts of it."""
    if piece.cut is None:
        return held
    group = mesh.tensor if piece.index is None else mesh.expert_tensor
    parts = [torch.empty_like(held) for _ in range(piece.cut.parts)]
    with waiting():
        dist.all_gather(parts, held.contiguous(), group=group)
    return piece.cut.join(parts)

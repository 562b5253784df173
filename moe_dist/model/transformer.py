"""The decoder. Shape letters: B batch, S sequence, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.block import Block
from moe_dist.model.cache import Cache
from moe_dist.model.norm import norm_of
from moe_dist.model.places import Places, places_behind, places_of
from moe_dist.model.vocabulary import VocabularyShare, WholeVocabulary
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import AllTokens, MoELayer, MoERecord, TokenShare
from moe_dist.moe.ledger import Choices
from moe_dist.moe.product import Linear, linear
from moe_dist.moe.randomness import Draw


class Transformer(nn.Module):
    """Embedding, blocks, final norm, output projection (tied to the embedding or its own)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_positions_tokens, config.width) if learned else None
        self.blocks = nn.ModuleList(Block(config, number) for number in range(config.num_layers))
        self.final_norm = norm_of(config)
        self.output = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        # Set by `parallel` where processes share the vocabulary, and the tokens between what is cut.
        self.vocabulary: VocabularyShare = WholeVocabulary()
        self.tokens: TokenShare = AllTokens()

    def forward(
        self,
        tokens_BS: Tensor,
        counted_BS: Tensor | None = None,
        draw: Draw | None = None,
        demand: Mapping[int, Tensor] | None = None,
        replay: Mapping[int, Choices] | None = None,
        position_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[MoERecord]]:
        """Runs the blocks.

        Args:
            tokens_BS: Token ids.
            counted_BS: False for padding tokens, which no routed expert sees; None where every token counts.
            draw: Names the random numbers of routers that draw some in training; None outside training.
            demand: What the balance terms know of the step's demand, see `RoutingContext`.
            replay: Choices to be followed, by number of the block; see `RoutingContext`.
            position_BS: Of each token in its document, where documents do not see each other (`document_positions`);
                None where each row is one document.

        Returns:
            The normed final hidden state [B, S, D] and the record of every mixture-of-experts layer in order.
        """
        x_BSD = self._embed(tokens_BS, position_BS)
        places = places_of(position_BS, tokens_BS.shape[1], self.config, x_BSD)
        return self._run(x_BSD, places, counted_BS, RoutingContext(tokens_BS, draw, demand, replay))

    def continued(self, tokens_BS: Tensor, lengths: Sequence[int], cache: Cache, position_BS: Tensor | None) -> Tensor:
        """The normed final hidden states [B, S, D] of tokens that follow those of a cache, which takes them in.

        Args:
            tokens_BS: On the first call whole prompts, padded at their end; then one token a row.
            lengths: New tokens of each row.
            cache: Of as many rows.
            position_BS: As in `forward`.
        """
        cache.begin(lengths)
        place_BS = cache.first_places()[:, None] + torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSD = self._embed(tokens_BS, place_BS if position_BS is None else position_BS)
        if cache.is_empty:
            places = places_of(position_BS, tokens_BS.shape[1], self.config, x_BSD)._replace(cache=cache)
        else:
            places = places_behind(cache, position_BS, self.config, x_BSD)
        place_S = torch.arange(tokens_BS.shape[1], device=x_BSD.device)
        counted_BS = place_S < torch.tensor(cache.new, device=x_BSD.device)[:, None]
        hidden_BSD, _ = self._run(x_BSD, places, counted_BS, RoutingContext(tokens_BS))
        cache.end()
        return hidden_BSD

    def _embed(self, tokens_BS: Tensor, position_BS: Tensor | None) -> Tensor:
        """What the first block reads, of the tokens here."""
        x_BSD = self.embedding(tokens_BS)
        if self.positions is None:
            return x_BSD
        if position_BS is None:
            position_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        here_T = position_BS.reshape(-1)[self.tokens.here(tokens_BS.numel())]
        return x_BSD + self.positions(here_T).view_as(x_BSD)

    def _run(
        self, x_BSD: Tensor, places: Places, counted_BS: Tensor | None, context: RoutingContext
    ) -> tuple[Tensor, list[MoERecord]]:
        records = []
        for block in self.blocks:
            x_BSD, record = block(x_BSD, places, counted_BS, context)
            if record is not None:
                records.append(record)
        return self.final_norm(x_BSD), records

    @property
    def output_weight(self) -> Tensor:
        """[V, D]; the embedding itself where they are tied."""
        return self.embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [..., V], of hidden states [..., D]."""
        return linear(hidden, self.output_weight)

    def moe_layers(self) -> Iterator[tuple[str, MoELayer]]:
        """(name, layer) of every mixture-of-experts layer, in order."""
        for name, module in self.named_modules():
            if isinstance(module, MoELayer):
                yield name, module

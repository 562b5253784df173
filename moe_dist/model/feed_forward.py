"""The dense feed-forward; also the shared expert. Shape letters: B, S tokens, D model width, F inner width."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.mix import Adapter, CausalMix
from moe_dist.model.places import Places
from moe_dist.moe.activation import activation_of
from moe_dist.moe.product import Linear


class FeedForward(nn.Module):
    """`down(activation(gate x, up x))`, or `down(activation(up x))` where the activation is not gated.

    Source: Shazeer 2020 (GLU variants); the activations are in `moe/activation.py`.

    Attributes:
        gate_up: [2F, D], the first F rows are the gate; None where the activation is not gated.
        up: [F, D] in its place.
        down: [D, F].
        mix: What it sees of the tokens before; None where it sees none.
    """

    def __init__(self, config: ModelConfig, inner: int, number: int = 0) -> None:
        super().__init__()
        self.activation, bias = activation_of(config.ffn_activation), config.ffn_bias
        gated = self.activation.parts == 2
        self.gate_up = Linear(config.width, 2 * inner, bias=bias) if gated else None
        self.up = None if gated else Linear(config.width, inner, bias=bias)
        self.down = Linear(inner, config.width, bias=bias)
        self.mix: CausalMix | Adapter | None = None
        name = f"{number}.mix"
        if config.mix.kind == "conv":
            self.mix = CausalMix(self.activation.parts * inner, config.mix.kernel_tokens, name)
        elif config.mix.kind == "adapter":
            self.mix = Adapter(config, name)

    @property
    def first(self) -> tuple[str, Linear]:
        """Name and map of the first product."""
        name = "up" if self.gate_up is None else "gate_up"
        linear: Linear = getattr(self, name)
        return name, linear

    def forward(self, x_BSD: Tensor, places: Places | None = None) -> Tensor:
        """`places` is read where there is a mix; without one, tokens may come in any shape."""
        hidden = self.first[1](x_BSD)
        if self.mix is None:
            return self._second(hidden)
        assert places is not None, "a mix is told where tokens stand"
        if isinstance(self.mix, CausalMix):
            return self._second(self.mix(hidden, places))
        return self._second(hidden) + self.mix(x_BSD, places)

    def _second(self, hidden: Tensor) -> Tensor:
        return self.down(self.activation.forward(*hidden.chunk(self.activation.parts, dim=-1))[0])

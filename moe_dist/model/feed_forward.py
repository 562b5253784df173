"""The dense feed-forward; also the shared expert. Shape letters: D model width, F inner width."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.moe.activation import activation_of


class FeedForward(nn.Module):
    """`down(activation(gate x, up x))`, or `down(activation(up x))` where the activation is not gated.

    Source: Shazeer 2020 (GLU variants); the activations are in `moe/activation.py`.

    Attributes:
        gate_up: [2F, D], the first F rows are the gate; None where the activation is not gated.
        up: [F, D] in its place.
        down: [D, F].
    """

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.activation, bias = activation_of(config.ffn_activation), config.ffn_bias
        gated = self.activation.parts == 2
        self.gate_up = nn.Linear(config.width, 2 * inner, bias=bias) if gated else None
        self.up = None if gated else nn.Linear(config.width, inner, bias=bias)
        self.down = nn.Linear(inner, config.width, bias=bias)

    @property
    def first(self) -> tuple[str, nn.Linear]:
        """Name and map of the first product."""
        name = "up" if self.gate_up is None else "gate_up"
        linear: nn.Linear = getattr(self, name)
        return name, linear

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first[1](x)
        return self.down(self.activation.forward(*hidden.chunk(self.activation.parts, dim=-1))[0])

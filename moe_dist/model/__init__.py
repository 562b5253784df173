"""The plain decoder: single-device PyTorch that knows nothing of other processes."""

from moe_dist.model.transformer import Transformer

__all__ = ["Transformer"]

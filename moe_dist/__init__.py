"""moe_dist: training of mixture-of-experts language models on Ray and torch.distributed."""

__version__ = "0.1.0"

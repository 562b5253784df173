"""The one typed config tree: schema, rules across keys, loading, and explanation."""

from moe_dist.config.load import load_config, parse_config
from moe_dist.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig

__all__ = ["Config", "ModelConfig", "MoEConfig", "ParallelConfig", "load_config", "parse_config"]

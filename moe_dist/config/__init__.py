"""The one typed config tree: schema, rules across keys, loading, and explanation."""

from moe_dist.config.load import load_config, parse_config
from moe_dist.config.model_schema import ModelConfig, MoEConfig
from moe_dist.config.schema import Config, ParallelConfig

__all__ = ["Config", "ModelConfig", "MoEConfig", "ParallelConfig", "load_config", "parse_config"]

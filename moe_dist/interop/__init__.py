"""Weights of other systems in and out: Hugging Face directories and MiniMind files against our checkpoints."""

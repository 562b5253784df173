"""Weights of other systems in and out, of Hugging Face directories and MiniMind files; and from dense to experts."""

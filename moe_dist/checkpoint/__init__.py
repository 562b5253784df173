"""Checkpoints: globally named tensors in safetensors parts, a manifest that proves them, and an atomic publish."""

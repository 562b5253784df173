"""Weights of other models and other programs: in, out, and from dense to mixture-of-experts."""

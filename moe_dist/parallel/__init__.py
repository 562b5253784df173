"""Parallelism, applied from outside to the plain model. The only room that creates process groups."""

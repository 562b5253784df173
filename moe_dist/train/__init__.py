"""The training loop: one step, the loop around it, evaluation, metrics."""

PROGRESS_FILE = "progress.jsonl"
ROUTING_FOLDER = "routing"

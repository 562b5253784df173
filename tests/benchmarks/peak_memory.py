"""Peak memory of one forward and backward pass of a layer, beyond what was there before it.

    python -m tests.benchmarks.peak_memory IMPLEMENTATION [--tokens N]

What is counted is resident memory, so that nothing escapes: buffers given as `out=`, temporaries inside kernels and
autograd functions, and what other threads allocate. (A dispatch mode or a profiler of torch sees one thread's tensors.)
Each implementation is measured in a process of its own, born with an allocator that gives freed blocks of 64 KiB and
more back at once, so that resident memory is what is alive, in pages. Linux resets its high-water mark between passes.

The figure is the mark less the memory before the pass, when parameters, input and output gradient are alive and no
gradient is: activations, temporaries and *the gradients of the parameters* are in it. Two passes before warm up what
libraries keep for good; of three passes the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import peers
from tests.benchmarks.allocator import GIVE_BACK
from tests.benchmarks.peers import SHAPES, Shape

MEGABYTE = 1e6
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@contextlib.contextmanager
def high_water() -> Iterator[list[float]]:
    """Appends to the list the most megabytes that lived inside the block, beyond those before it. Linux only."""
    found: list[float] = []
    gc.collect()
    CLEAR.write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    yield found
    found.append((_status("VmHWM") - before) / MEGABYTE)


def _status(field: str) -> float:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * float(line.split()[1])


def can_measure() -> bool:
    """Whether this system lets a process reset its high-water mark."""
    return os.access(CLEAR, os.W_OK)


def peak_of(name: str, shape: Shape, tokens: int, passes: int = 3) -> float:
    """Megabytes of one pass; meant for a process born with `GIVE_BACK`."""
    layer, (x, grad) = peers.build(name, shape), peers.tokens_and_gradient(tokens, shape.width)
    peaks = []
    for turn in range(passes + 2):
        with high_water() as found:
            peers.forward_backward(layer, x, grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        if turn >= 2:
            peaks += found
    return statistics.median(peaks)


def in_a_process_of_its_own(name: str, tokens: int) -> list[float]:
    """Peaks of an implementation in all of `SHAPES`."""
    command = [sys.executable, "-m", "tests.benchmarks.peak_memory", name, "--tokens", str(tokens)]
    done = subprocess.run(command, env=os.environ | GIVE_BACK, stdout=subprocess.PIPE, text=True, check=True)
    peaks: list[float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    """Prints a JSON list: the peaks of one implementation by shape, in megabytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementation", choices=peers.IMPLEMENTATIONS)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if any(os.environ.get(variable) != value for variable, value in GIVE_BACK.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | GIVE_BACK)
    with peers.process_group_of_one() if options.implementation == "fairscale" else contextlib.nullcontext():
        print(json.dumps([peak_of(options.implementation, shape, options.tokens) for shape in SHAPES]))


if __name__ == "__main__":
    main()

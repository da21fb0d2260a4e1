"""Measure the compilation time of a training step, with a cold and with a warm cache.

TORCHINDUCTOR_CACHE_DIR=cache python -m benchmarks.compile RECIPE [--size 640x640]

Run the command twice with the same cache folder, which must be empty at first: the first run has a cold cache, the
second a warm one. The batch is two generated images. The output has wall-clock time and processor time, including
compiler processes. The compilation time is the time of the first step minus the time of a later step.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from torch._dynamo.utils import counters

from boxwright.benchmark.bench import OURS, Bench
from boxwright.benchmark.plan import Plan, parse_size

STEPS = 3


def processor_seconds() -> float:
    """Processor time of this process and of its finished child processes, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times of the first steps and the compiler's counters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--size", default="640x640", help="height and width of the canvas (default: 640x640)")
    options = parser.parse_args(arguments)
    plan = Plan(recipe=options.recipe, size=parse_size(options.size), batch=2, precision="float32")
    with Bench(plan) as bench:
        batch = bench.batches(training=True)[0]
        system = bench.system(OURS, training=True, compiled=True)
        inputs = system.prepare(batch)
        for step in range(1, STEPS + 1):
            start, start_processor = time.perf_counter(), processor_seconds()
            system.train_step(inputs)
            clock, processor = time.perf_counter() - start, processor_seconds() - start_processor
            print(f"step {step}: {clock:.1f} s wall-clock, {processor:.1f} s processor", flush=True)
    for group in ("stats", "graph_break", "aot_autograd", "inductor"):
        print(f"{group}: {dict(counters[group])}")


if __name__ == "__main__":
    main()

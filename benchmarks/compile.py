"""How long compiling a training step takes, and what a process finds of it in the cache of the one before.

TORCHINDUCTOR_CACHE_DIR=cache python -m benchmarks.compile RECIPE [--size 640x640]

Run it twice with the same cache, an empty folder at first: the first run is cold, the second is warm. Steps of two
generated pictures; times are of the clock and of the processor, compilers that the process starts included. The first
step less a later one is compiling.
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
    """What this process and those that it waited for have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the first steps and what the compiler counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--size", default="640x640", help="height and width of the canvas (default: 640x640)")
    options = parser.parse_args(arguments)
    plan = Plan(recipe=options.recipe, size=parse_size(options.size), batch=2, precision="float32")
    with Bench(plan) as bench:
        batch = bench.batches(training=True)[0]
        system = bench.system(OURS, training=True, compiled=True)
        given = system.prepare(batch)
        for number in range(STEPS):
            start, start_processor = time.perf_counter(), processor_seconds()
            system.train_step(given)
            clock, processor = time.perf_counter() - start, processor_seconds() - start_processor
            print(f"step {number + 1}: {clock:.1f} s of the clock, {processor:.1f} s of the processor", flush=True)
    for group in ("stats", "graph_break", "aot_autograd", "inductor"):
        print(f"{group}: {dict(counters[group])}")


if __name__ == "__main__":
    main()

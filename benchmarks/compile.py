"""How long compiling a training step takes, and what a process finds of it in the cache of the one before.

python -m benchmarks.compile RECIPE [--backend inductor]

Run it twice with the same TORCHINDUCTOR_CACHE_DIR, an empty folder at first: the first run is cold, the second is warm.
Two pictures of noise on a canvas of 640 x 640, without masks: the recipe is one of boxes. Times are of the clock and of
the processor, compilers that the process starts included; the first step less a later one is compiling.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.gpu import synthetic_batch
from boxwright.recipes import find_recipe
from boxwright.structures import Batch
from boxwright.training.experiment import build
from boxwright.training.step import Losses, keep_compiled


def processor() -> float:
    """Seconds that this process and those that it waited for have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed_step(losses: nn.Module, batch: Batch) -> str:
    """Losses and gradients once."""
    start, start_processor = time.perf_counter(), processor()
    sum(losses(batch).values()).backward()
    losses.zero_grad()
    return f"{time.perf_counter() - start:.1f} s of the clock, {processor() - start_processor:.1f} s of the processor"


def main() -> None:
    """Print the first steps and what the compiler counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--backend", default="inductor", help="aot_eager for Dynamo and AOTAutograd alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    detector = build(find_recipe(options.recipe)().model, num_classes=80).to(memory_format=torch.channels_last)
    batch = synthetic_batch(2, (640, 640))
    keep_compiled()
    losses = torch.compile(Losses(detector.train()), fullgraph=True, dynamic=False, backend=options.backend)
    for number in (1, 2, 3):
        print(f"step {number}: {timed_step(losses, batch)}", flush=True)
    for group in ("stats", "graph_break", "aot_autograd"):
        print(f"{group}: {dict(counters[group])}")


if __name__ == "__main__":
    main()

"""What must hold and what it costs on one GPU: `python -m benchmarks.gpu --out FOLDER`, under ten minutes.

Checks first, then times, the most wanted first; see docs/benchmarks/gpu.md. Each item has so many seconds, and all
together have `--seconds`. An item that fails, hangs or breaks the GPU is told and does not stop the others; the exit
status says whether all that ran did well. `--device cpu --small` runs the same code on small shapes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import kernels, speed
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.results import Outcome, write
from benchmarks.gpu.scale import FAMILIES, FULL, SMALL, Scale
from benchmarks.gpu.worker import Item, Worker

LEFT_OUT = "left out: the time was up"


def items(scale: Scale) -> Iterator[Item]:
    """All that there is to do, the most wanted first."""
    first, rest = FAMILIES[:3], FAMILIES[3:]
    yield Item("matrix rate", 20, partial(kernels.matrix_rate, scale))
    # On a card a check of one graph compiles for long: most of them come after the first times.
    for family in FAMILIES:
        for check in CHECKS[:2]:
            yield Item(f"{family}: {check.__name__}", 40, partial(check, scale, family))
    yield Item("roi_align", 40, partial(kernels.roi_align, scale))
    yield Item("nms", 40, partial(kernels.suppression, scale))
    yield Item("matcher", 20, partial(kernels.matcher, scale))
    for family in first:
        yield Item(f"{family}: train, eager", 40, partial(speed.train, scale, family, "eager"))
        yield Item(f"{family}: infer 1", 30, partial(speed.infer, scale, family, 1))
        yield Item(f"{family}: operations", 20, partial(speed.operations, scale, family))
    compiles = CHECKS[2]
    yield Item(f"mask_rcnn: {compiles.__name__}", 100, partial(compiles, scale, "mask_rcnn"))
    for mode in ("compiled", "graphs"):
        yield Item(f"mask_rcnn: train, {mode}", 100, partial(speed.train, scale, "mask_rcnn", mode))
    yield Item("faster_rcnn: detect 1", 100, partial(speed.detect, scale, "faster_rcnn", 1))
    for family in rest:
        yield Item(f"{family}: train, eager", 40, partial(speed.train, scale, family, "eager"))
        yield Item(f"{family}: infer 1", 30, partial(speed.infer, scale, family, 1))
        yield Item(f"{family}: operations", 20, partial(speed.operations, scale, family))
    for batch in scale.batches:
        for family in first:
            yield Item(f"{family}: infer {batch}", 30, partial(speed.infer, scale, family, batch))
    for family in FAMILIES[1:]:
        yield Item(f"{family}: {compiles.__name__}", 100, partial(compiles, scale, family))
    for family in (*first[1:], *rest):
        for mode in ("compiled", "graphs"):
            yield Item(f"{family}: train, {mode}", 100, partial(speed.train, scale, family, mode))
    for family in first:
        yield Item(f"{family}: train, float32", 40, partial(speed.train, scale, family, "eager", "float32"))
    yield Item("faster_rcnn: detect 16", 100, partial(speed.detect, scale, "faster_rcnn", 16))
    for family in first:
        yield Item(f"{family}: memory", 80, partial(speed.memory, scale, family))


def main(arguments: list[str] | None = None) -> int:
    """Do all; 1 if an item failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.md, gpu.json and benchmark.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the benchmark itself")
    parser.add_argument("--seconds", type=float, default=570, help="for all items; what comes later is left out")
    parser.add_argument("--only", default="", help="items whose name holds this text")
    options = parser.parse_args(arguments)
    if (options.device == "cpu") != options.small:
        parser.error(
            "the shapes of --small are for --device cpu, and a CPU is too slow for others: give both or neither"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: give --device cpu --small to test the benchmark itself", file=sys.stderr)
        return 1
    scale = SMALL if options.small else FULL
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    return run([item for item in items(scale) if options.only in item.name], options, command)


def run(todo: list[Item], options: argparse.Namespace, command: str) -> int:
    """Do items in order and write what is known after each."""
    options.out.mkdir(parents=True, exist_ok=True)
    worker, outcomes, text = Worker(options.device), list[Outcome](), ""
    end = time.perf_counter() + options.seconds
    try:
        for item in todo:
            left = end - time.perf_counter()
            if left > 0:
                outcome = worker.do(item, min(item.budget, left))
            else:
                outcome = Outcome(item=item.name, seconds=0.0, error=LEFT_OUT)
            outcomes.append(outcome)
            last = outcome.error.strip().splitlines()[-1:]
            print("FAILED" if last else "ok    ", item.name, f"{outcome.seconds:.0f} s", *last, flush=True)
            text = write(options.out, outcomes, command, worker.facts)
    finally:
        worker.close()
    print(text)
    return int(any(outcome.error not in ("", LEFT_OUT) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

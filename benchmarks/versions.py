"""Compare the speed and memory of two versions of Boxwright in alternating runs on the CPU.

git worktree add /tmp/before COMMIT
python benchmarks/versions.py --before /tmp/before/src --after src --out versions.md

Each version runs in a separate process. Both processes use the same random images and objects. They alternate, one
training step or detection at a time, so that a change in the machine's load affects both. Peak memory is measured in
fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = ("faster_rcnn_r50_fpn_1x", "mask_rcnn_r50_fpn_1x", "retinanet_r50_fpn_1x")
TASKS = ("train", "detect")
PRECISIONS = ("float32", "bfloat16")
NUM_OBJECTS, NUM_CLASSES = 8, 80


def make_work(recipe: str, task: str, precision: str, size: int) -> Callable[[], None]:
    """A training step, or a detection, on one random image of `size` x `size` pixels."""
    import torch

    from boxwright.recipes import find_recipe
    from boxwright.structures import Batch, MaskGrids, Targets
    from boxwright.training.experiment import build

    try:
        from boxwright.layers.optimize import optimize_for_cpu
    except ModuleNotFoundError:  # a version before `layers`
        from boxwright.detectors.inference import pack_convolutions as optimize_for_cpu

    torch.manual_seed(0)
    detector = build(find_recipe(recipe)().model, num_classes=NUM_CLASSES).to(memory_format=torch.channels_last)
    corner = torch.rand(1, NUM_OBJECTS, 2) * size * 0.6
    boxes = torch.cat([corner, corner + 20 + torch.rand(1, NUM_OBJECTS, 2) * size * 0.3], -1)
    valid = torch.ones(1, NUM_OBJECTS, dtype=torch.bool)
    bitmaps = torch.full((1, NUM_OBJECTS, 56, 56), 255, dtype=torch.uint8)
    sizes = torch.tensor([[size, size]])
    batch = Batch(
        images=torch.randint(256, (1, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last),
        image_sizes=sizes,
        original_sizes=sizes,
        transforms=torch.eye(2, 3)[None],
        image_ids=torch.zeros(1, dtype=torch.int64),
        seeds=torch.zeros(1, dtype=torch.int64),
        targets=Targets(
            boxes=boxes,
            labels=torch.randint(NUM_CLASSES, (1, NUM_OBJECTS)),
            valid=valid,
            crowd=~valid,
            masks=MaskGrids(bitmaps=bitmaps, frames=boxes, valid=valid),
        ),
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    if task == "detect":
        detector.eval()
        optimize_for_cpu(detector)

        def detect() -> None:
            with torch.inference_mode(), autocast:
                detector.detect(batch)

        return detect
    detector.train()

    def train() -> None:
        with autocast:
            losses = detector.losses(batch)
        torch.stack(list(losses.values())).sum().backward()
        detector.zero_grad(set_to_none=True)

    return train


def serve(arguments: list[str]) -> None:
    """Do the work once for each line of standard input and print its seconds; "peak" prints the peak memory."""
    recipe, task, precision, size, clock = arguments
    now = time.process_time if clock == "cpu" else time.perf_counter
    work = make_work(recipe, task, precision, int(size))
    for line in sys.stdin:
        if line.strip() == "peak":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
            continue
        start = now()
        work()
        print(now() - start, flush=True)


class Worker:
    """A version of Boxwright in a separate process."""

    def __init__(self, source: Path, case: tuple[str, str, str], options: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *case, str(options.size), options.clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, line: str = "run") -> float:
        """Send a line and return the number that comes back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(case: tuple[str, str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds and peak MiB of both versions in one case."""
    seconds: tuple[list[float], list[float]] = ([], [])
    workers = [Worker(source, case, options) for source in (options.before, options.after)]
    for worker in workers:
        for _ in range(options.warmup):
            worker.ask()
    for turn in range(options.rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for index in order:
            seconds[index].append(workers[index].ask())
    peaks = [worker.ask("peak") for worker in workers]
    for worker in workers:
        worker.close()
    before, after = (statistics.median(times) for times in seconds)
    pairs = sorted(second / first for first, second in zip(*seconds, strict=True))
    ratio = statistics.median(pairs)
    return {"case": case, "before": before, "after": after, "ratio": ratio, "pairs": pairs, "peaks": peaks}


def row(result: dict[str, Any]) -> str:
    """A row of the table."""
    pairs, peaks = result["pairs"], result["peaks"]
    spread = f"{pairs[len(pairs) // 4]:.2f} to {pairs[-1 - len(pairs) // 4]:.2f}"
    cells = [
        *result["case"],
        f"{result['before']:.3f}",
        f"{result['after']:.3f}",
        f"{result['ratio']:.2f} ({spread})",
        f"{peaks[0]:.0f}",
        f"{peaks[1]:.0f}",
        f"{peaks[1] / peaks[0]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| recipe | task | precision | before, s | after, s | after / before (quartiles) | before, MiB | after, MiB | "
    "after / before |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Run all cases and print a Markdown table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="src folder of the earlier version")
    parser.add_argument("--after", type=Path, required=True, help="src folder of the later version")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--size", type=int, default=640, help="side of the image in pixels")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds, on a busy machine")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    options = parser.parse_args()
    cases = [(r, t, p) for r in options.recipes for t in options.tasks for p in options.precisions]
    rows = [HEAD]
    print(HEAD)
    for case in cases:
        result = compare(case, options)
        rows.append(row(result))
        print(rows[-1], flush=True)
        print(json.dumps(result), file=sys.stderr, flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()

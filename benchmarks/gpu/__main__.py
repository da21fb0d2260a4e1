"""Check and measure Boxwright on one GPU: `python -m benchmarks.gpu --out FOLDER`, at most 520 seconds.

docs/benchmarks/gpu.md says what it answers. `--dry-run` runs all items tiny on the CPU, to test the benchmark itself.
The exit status is 1 if an item failed, and 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.plan import items
from benchmarks.gpu.results import write
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.gpu.worker import Item, Outcome, Worker

SECONDS = 520.0
_LEAST = 5.0
"""Seconds below which no further item begins."""


def main(arguments: list[str] | None = None) -> int:
    """Run all items, or those that `--only` selects."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results: JSON and summary.md")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"total time (default: {SECONDS:.0f})")
    parser.add_argument("--only", action="append", help="run only items with this text in their name; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="run everything tiny on the CPU")
    parser.add_argument("--list", action="store_true", help="print the items in order and exit")
    options = parser.parse_args(arguments)
    scale = TINY if options.dry_run else FULL
    texts = options.only or [""]
    todo = [item for item in items(scale) if any(text in item.name for text in texts)]
    if options.list:
        for item in todo:
            print(f"{item.group:9} {item.limit:4.0f} s  {item.name}")
        return 0
    if not todo:
        parser.error(f"--only {' '.join(texts)}: no item has this text in its name; --list prints all names")
    if not options.dry_run and not torch.cuda.is_available():
        print("PyTorch finds no GPU. To test the benchmark on the CPU, give --dry-run.", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    outcomes = run(todo, scale.device, options.out, command, seconds=options.seconds)
    return int(any(outcome.status not in ("ok", "skipped") for outcome in outcomes))


def run(todo: Sequence[Item], device: str, folder: Path, command: str, *, seconds: float = SECONDS) -> list[Outcome]:
    """Run items in order within a total time, and write the results after each."""
    worker, outcomes = Worker(device), list[Outcome]()
    end = time.perf_counter() + seconds
    try:
        for item in todo:
            left = end - time.perf_counter()
            if left >= _LEAST:
                outcome = worker.run(item, left)
            else:
                outcome = Outcome(group=item.group, item=item.name, status="skipped", error="no time left")
            outcomes.append(outcome)
            reason = outcome.error.strip().splitlines()[-1:]
            print(f"{outcome.status:8}{outcome.seconds:6.1f} s  {item.name}", *reason, flush=True)
            write(folder, outcomes, command, worker.facts)
    finally:
        worker.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(main())

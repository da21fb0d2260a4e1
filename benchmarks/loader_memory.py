"""Measure whether the memory of a training loader grows with steps, epochs and workers. Linux only.

    python benchmarks/loader_memory.py ../shared/data/coco_mini --workers 2 4

The measure is the proportional set size (PSS) of anonymous and shared memory, summed over the process and its workers.
PSS divides a shared page among its processes, so that no page is counted twice. File-backed pages (libraries and memory
maps) are excluded: their PSS depends on other processes, and the kernel can drop them.
"""

from __future__ import annotations

import argparse
import gc
import platform
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.loader import TrainingLoader


def memory(process: psutil.Process) -> float:
    """PSS of the anonymous and shared memory of a process, in MiB."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def tree_memory() -> tuple[float, float]:
    """Memory of this process and the sum over its child processes, in MiB."""
    process = psutil.Process()
    return memory(process), sum(memory(child) for child in process.children(recursive=True))


def main() -> None:
    """Run the loader with each number of workers and print the memory ten times per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with COCO images and annotations")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--short", type=int, default=400)
    parser.add_argument("--long", type=int, default=667)
    arguments = parser.parse_args()
    split = find_layout(arguments.data)["train"]
    dataset = IndexedDataset(split.annotations, split.images)
    print(f"Python {platform.python_version()}, torch {version('torch')}, {len(dataset)} images")
    for num_workers in arguments.workers:
        loader = TrainingLoader(
            dataset,
            augmentation=Augmentation(resize=Resize(arguments.short, arguments.long), scale_jitter=(0.8, 1.25)),
            batch_size=arguments.batch_size,
            seed=0,
            num_workers=num_workers,
        )
        print(
            f"\nworkers: {num_workers}, batch size: {arguments.batch_size}, steps per epoch: {loader.steps_per_epoch}"
        )
        print("| step | main, MiB | workers, MiB | total, MiB |\n| --- | --- | --- | --- |")
        batches = loader.batches()
        totals = []
        for step, _ in enumerate(islice(batches, arguments.steps), 1):
            # Single values vary by tens of MiB with the number of prefetched batches, so print the mean of ten.
            if step % 10 == 0:
                totals.append((step, *tree_memory()))
            if step % (arguments.steps // 10) == 0:
                main_mib, workers_mib = np.mean([total[1:] for total in totals[-10:]], axis=0)
                print(f"| {step} | {main_mib:.0f} | {workers_mib:.0f} | {main_mib + workers_mib:.0f} |", flush=True)
        batches.close()
        gc.collect()
        steps, mib = np.array([[step, main + workers] for step, main, workers in totals]).T
        later = steps > arguments.steps / 5
        slope = np.polyfit(steps[later], mib[later], 1)[0]
        print(f"slope after the first fifth: {slope * 1000:+.2f} MiB per 1,000 steps")


if __name__ == "__main__":
    main()

"""Measure the time and memory of loading a model of 170 MB in a new process.

python benchmarks/load_weights.py [--rounds 3]

The script writes untrained weights of mask_rcnn_r50_fpn_1x and loads them with `boxwright.load`. Memory is the increase
of the peak RSS, which includes the pages of the memory-mapped file.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write(path: Path) -> None:
    """Write a weights file of the recipe's model with 80 classes."""
    from boxwright.recipes import find_recipe
    from boxwright.training.experiment import build, to_json
    from boxwright.weights.ours import save_weights

    experiment = find_recipe("mask_rcnn_r50_fpn_1x")()
    categories = [{"id": category_id, "name": f"class {category_id}"} for category_id in range(1, 81)]
    detector = build(experiment.model, num_classes=len(categories))
    save_weights(path, detector.state_dict(), {"experiment": to_json(experiment), "categories": categories})


def peak() -> float:
    """Peak RSS of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(path: Path) -> None:
    """Load the weights once, with all modules already imported, and print the time and memory."""
    import torch

    from boxwright.predictor import load
    from boxwright.recipes import find_recipe

    find_recipe("mask_rcnn_r50_fpn_1x")()

    torch.set_num_threads(1)
    before = peak()
    start, start_processor = time.perf_counter(), time.process_time()
    predictor = load(path)
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    # Read every weight, so that memory-mapped pages that were not loaded so far are counted.
    total = sum(float(tensor.sum()) for tensor in predictor.detector.state_dict().values())
    assert total == total
    memory, size = peak() - before, path.stat().st_size / 1e6
    print(
        f"{seconds:.2f} s ({processor:.2f} s of processor time), {memory:.0f} MB memory, {size:.0f} MB file size, "
        f"memory / file size {memory / size:.2f}"
    )


def main() -> None:
    """Write a weights file and load it several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
        return
    if arguments.read:
        measure(arguments.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        # Written in another process, since a child process inherits the peak RSS of its parent.
        subprocess.run([sys.executable, __file__, "--write", path], check=True)
        for _ in range(arguments.rounds):
            subprocess.run([sys.executable, __file__, "--read", path], check=True)


if __name__ == "__main__":
    main()

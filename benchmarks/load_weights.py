"""How long, and how much memory, opening a model of 170 MB takes, in fresh processes.

python benchmarks/load_weights.py [--rounds 3]

Writes the weights of mask_rcnn_r50_fpn_1x, untrained, and opens them with `boxwright.load`. Memory is what the process
holds at its peak beyond what it held before, pages of the mapped file included.
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
    """A weights file of the recipe's model for COCO's 80 classes."""
    from boxwright.recipes import find_recipe
    from boxwright.training.experiment import build, to_json
    from boxwright.weights.ours import save_weights

    experiment = find_recipe("mask_rcnn_r50_fpn_1x")()
    categories = [{"id": number, "name": f"thing {number}"} for number in range(1, 81)]
    detector = build(experiment.model, num_classes=len(categories))
    save_weights(path, detector.state_dict(), {"experiment": to_json(experiment), "categories": categories})


def peak() -> float:
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(path: Path) -> None:
    """Print the time and memory of one opening, its imports done before."""
    import torch

    from boxwright.predictor import load
    from boxwright.recipes import find_recipe

    find_recipe("mask_rcnn_r50_fpn_1x")()

    torch.set_num_threads(1)
    before = peak()
    start, start_processor = time.perf_counter(), time.process_time()
    predictor = load(path)
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    # Every weight is looked at, so that what is only mapped so far counts too.
    total = sum(float(tensor.sum()) for tensor in predictor.detector.state_dict().values())
    assert total == total
    memory, size = peak() - before, path.stat().st_size / 1e6
    print(
        f"{seconds:.2f} s ({processor:.2f} s of processor time), {memory:.0f} MB for a file of {size:.0f} MB, "
        f"{memory / size:.2f} times its size"
    )


def main() -> None:
    """Write a file and open it a few times."""
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
        # In a process of its own, because a process begins with the peak of the one that starts it.
        subprocess.run([sys.executable, __file__, "--write", path], check=True)
        for _ in range(arguments.rounds):
            subprocess.run([sys.executable, __file__, "--read", path], check=True)


if __name__ == "__main__":
    main()

"""Measure the padding cost of multi-scale training, for different ways to split the scale range into canvases.

python -m benchmarks.padding --annotations instances_train2017.json --short 640 800 --long 1333
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from boxwright.data.buckets import Scale, assign_buckets, buckets_for, plan_scales
from boxwright.data.formats import read_index

CUTS = (32, 64, 96)


def padding(scales: list[Scale], sizes: np.ndarray) -> tuple[float, int]:
    """Ratio of canvas area to image area, averaged uniformly over all short sides, and the number of canvases used."""
    canvas_area, image_area, used = 0, 0, set()
    for scale in scales:
        canvases = np.array(buckets_for(scale.high, sizes))
        assigned = canvases[assign_buckets(scale.high.sizes(sizes), list(map(tuple, canvases.tolist())))]
        used.update(map(tuple, assigned.tolist()))
        short_sides = range(scale.low.short, scale.high.short + 1)
        canvas_area += int(assigned.prod(1).sum()) * len(short_sides)
        image_area += sum(int(scale.at(short).sizes(sizes).prod(1).sum()) for short in short_sides)
    return canvas_area / image_area, len(used)


def main() -> None:
    """Print a table with one row per way to split the range."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--annotations", type=Path, nargs="+", required=True)
    parser.add_argument("--short", type=int, nargs=2, default=(640, 800))
    parser.add_argument("--long", type=int, default=1333)
    arguments = parser.parse_args()
    sizes = np.concatenate([read_index(path).image_sizes for path in arguments.annotations]).astype(np.int64)
    low, high = ((short, arguments.long) for short in arguments.short)
    print(f"{len(sizes):,} images, short side {low[0]} to {high[0]}, long side at most {arguments.long}\n")
    print("| split at multiples of | intervals | canvases used | canvas area / image area |\n| --- | --- | --- | --- |")
    rows = {"no split": plan_scales((low, high), "range", cut=2 * high[0])}
    rows |= {str(cut): plan_scales((low, high), "range", cut=cut) for cut in reversed(CUTS)}
    rows[f"only {high[0]}"] = plan_scales((high,), "list")
    for name, scales in rows.items():
        ratio, num_canvases = padding(scales, sizes)
        print(f"| {name} | {len(scales)} | {num_canvases} | {ratio:.3f} |")


if __name__ == "__main__":
    main()

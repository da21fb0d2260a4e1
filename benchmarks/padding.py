"""How much padding a range of training sizes costs, by where it is cut into pieces with canvases of their own.

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
    """Padded over own area of the pictures, each short side as often as any other; and the canvases in use."""
    padded, own, used = 0, 0, set()
    for scale in scales:
        canvases = np.array(buckets_for(scale.high, sizes))
        homes = canvases[assign_buckets(scale.high.sizes(sizes), list(map(tuple, canvases.tolist())))]
        used.update(map(tuple, homes.tolist()))
        shorts = range(scale.low.short, scale.high.short + 1)
        padded += int(homes.prod(1).sum()) * len(shorts)
        own += sum(int(scale.at(short).sizes(sizes).prod(1).sum()) for short in shorts)
    return padded / own, len(used)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--annotations", type=Path, nargs="+", required=True)
    parser.add_argument("--short", type=int, nargs=2, default=(640, 800))
    parser.add_argument("--long", type=int, default=1333)
    arguments = parser.parse_args()
    sizes = np.concatenate([read_index(path).image_sizes for path in arguments.annotations]).astype(np.int64)
    low, high = ((short, arguments.long) for short in arguments.short)
    print(f"{len(sizes):,} pictures, short side {low[0]} to {high[0]}, long side at most {arguments.long}\n")
    print("| cut at multiples of | pieces | canvases in use | padded area / own area |\n| --- | --- | --- | --- |")
    rows = {"no cut": plan_scales((low, high), "range", cut=2 * high[0])}
    rows |= {str(cut): plan_scales((low, high), "range", cut=cut) for cut in reversed(CUTS)}
    rows[f"{high[0]} alone"] = plan_scales((high,), "list")
    for name, scales in rows.items():
        share, num_canvases = padding(scales, sizes)
        print(f"| {name} | {len(scales)} | {num_canvases} | {share:.3f} |")


if __name__ == "__main__":
    main()

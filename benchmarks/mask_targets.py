"""Which grid holds an object's mask well enough to learn from, and what it costs.

    python benchmarks/mask_targets.py ../shared/data/coco_mini ../shared/data/nuclei

For real objects and boxes around them as a region proposal network gives them, each candidate's 28 x 28 target is
compared with an oracle that sees the whole mask: of polygons, COCO's rasteriser (pycocotools) on the polygons moved
into the box and scaled to 28 x 28; of run lengths, RoIAlign (aligned, as many samples as a cell has pixels) on the
whole bitmap, from a half on, as Detectron2 does. Times are those of one core.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align

from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.masks.mask_grid import mask_grid
from boxwright.ops.mask_target import mask_target
from boxwright.structures import MaskGrids

TARGET_SIZE = 28
MIN_IOU = 0.5
SPREAD = 0.12
"""Standard deviation of a box's sides, in sides of the object's box."""
NUM_BOXES = 2
EXACT = 15
"""The rasteriser's canvas is this many times finer where a cell's centre alone is to decide."""


@dataclass(frozen=True)
class Candidate:
    """A form of grid."""

    size: int
    """Cells a side."""
    finer: int
    """How much finer polygons are drawn."""
    binary: bool
    """Whether cells are on or off, which would pack into bits, or hold the share covered."""

    @property
    def num_bytes(self) -> int:
        """Of one grid."""
        return self.size**2 // (8 if self.binary else 1)


CANDIDATES = [
    Candidate(28, 8, binary=False),
    Candidate(56, 1, binary=True),
    Candidate(56, 4, binary=False),
    Candidate(80, 4, binary=False),
    Candidate(112, 1, binary=True),
    Candidate(112, 2, binary=False),
    Candidate(112, 4, binary=False),
    Candidate(128, 4, binary=False),
    Candidate(224, 1, binary=True),
]


@dataclass(frozen=True)
class Case:
    """An object and a box that it is to be learnt in."""

    mask: Any
    image_size: tuple[int, int]
    box: np.ndarray
    oracle: np.ndarray


def cases(folder: Path, num_objects: int, rng: np.random.Generator) -> list[Case]:
    """Objects of the validation split, evenly over it, each with `NUM_BOXES` boxes."""
    dataset = IndexedDataset(*find_layout(folder)["val"])
    index = dataset.index
    rows = np.flatnonzero(index.has_mask)
    rows = rows[np.linspace(0, len(rows) - 1, min(num_objects, len(rows))).astype(int)]
    found = []
    for row in rows.tolist():
        image = int(np.searchsorted(index.object_offsets, row, side="right")) - 1
        height, width = index.image_sizes[image].tolist()
        mask = index.mask(row)
        target = polygon_oracle if isinstance(mask, list) else bitmap_oracle
        for _ in range(NUM_BOXES):
            box = jittered(index.boxes[row].astype(np.float64), (height, width), rng)
            found.append(Case(mask, (height, width), box, target(mask, (height, width), box)))
    return found


def jittered(box: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A box inside the picture whose IoU with the object's is at least `MIN_IOU`."""
    limits = np.array([image_size[1], image_size[0]] * 2)
    sides = np.tile(box[2:] - box[:2], 2)
    while True:
        other = (box + rng.normal(0, SPREAD, 4) * sides).clip(0, limits)
        inner = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(0).prod()
        union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).clip(0).prod() - inner
        if inner >= MIN_IOU * union:
            return other


def polygon_oracle(polygons: Any, _: tuple[int, int], box: np.ndarray, size: int = TARGET_SIZE) -> np.ndarray:
    """COCO's rasteriser on a canvas of the target's size."""
    scale = size / (box[2:] - box[:2])
    moved = [((polygon - box[:2]) * scale).ravel().tolist() for polygon in polygons]
    runs = coco_mask.merge(coco_mask.frPyObjects(moved, size, size))
    return coco_mask.decode(runs).astype(bool)


def centre_rule(polygons: Any, image_size: tuple[int, int], box: np.ndarray) -> np.ndarray:
    """Whether the centres of the target's cells lie inside, all but exactly."""
    fine = polygon_oracle(polygons, image_size, box, TARGET_SIZE * EXACT)
    return fine[EXACT // 2 :: EXACT, EXACT // 2 :: EXACT]


def bitmap_oracle(runs: bytes, image_size: tuple[int, int], box: np.ndarray) -> np.ndarray:
    """RoIAlign on the whole bitmap."""
    bitmap = coco_mask.decode({"size": list(image_size), "counts": runs})
    pixels = torch.from_numpy(bitmap.astype(np.float32))[None, None]
    boxes = [torch.from_numpy(box.astype(np.float32))[None]]
    return (roi_align(pixels, boxes, TARGET_SIZE, sampling_ratio=0, aligned=True)[0, 0] >= 0.5).numpy()


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Of two bitmaps; 1 where both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def measure(candidate: Candidate, all_cases: list[Case]) -> tuple[np.ndarray, float]:
    """The IoU with the oracle of each case, and the seconds that a grid took to make."""
    start = time.process_time()
    grids = [mask_grid(c.mask, c.image_size, size=candidate.size, finer=candidate.finer) for c in all_cases]
    seconds = (time.process_time() - start) / len(all_cases)
    blank = np.zeros((candidate.size, candidate.size), np.uint8), np.zeros(4, np.float32)
    bitmaps, frames = zip(*[blank if grid is None else grid for grid in grids], strict=True)
    bitmaps = torch.from_numpy(np.stack(bitmaps))[None]
    masks = MaskGrids(
        bitmaps=(bitmaps >= 128) * torch.tensor(255, dtype=torch.uint8) if candidate.binary else bitmaps,
        frames=torch.from_numpy(np.stack(frames))[None],
        valid=torch.tensor([[grid is not None for grid in grids]]),
    )
    boxes = torch.from_numpy(np.stack([case.box for case in all_cases]).astype(np.float32))[None]
    targets = mask_target(masks, boxes, torch.arange(len(grids))[None], masks.valid, output_size=TARGET_SIZE)
    pairs = zip(targets[0].numpy(), all_cases, strict=True)
    return np.array([iou(target, case.oracle) for target, case in pairs]), seconds


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path, help="folders of data sets, COCO's layout")
    parser.add_argument("--objects", type=int, default=2000, help="of each data set, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in options.data:
        found = cases(folder, options.objects, np.random.default_rng(0))
        print(f"\n{folder.name}: {len(found) // NUM_BOXES} objects, {NUM_BOXES} boxes each\n")
        print(
            "| grid | cells | bytes | us to make | mean IoU | 5th percentile |\n| --- | --- | --- | --- | --- | --- |"
        )
        for candidate in CANDIDATES:
            ious, seconds = measure(candidate, found)
            form = "on or off" if candidate.binary else f"share, from {candidate.finer} x {candidate.finer}"
            print(
                f"| {candidate.size} | {form} | {candidate.num_bytes} | {seconds * 1e6:.0f} | {ious.mean():.4f} "
                f"| {np.quantile(ious, 0.05):.3f} |"
            )
        polygons = [case for case in found if isinstance(case.mask, list)]
        if polygons:
            ious = np.array([iou(centre_rule(c.mask, c.image_size, c.box), c.oracle) for c in polygons])
            print(f"| the cells' centres, exactly | | | | {ious.mean():.4f} | {np.quantile(ious, 0.05):.3f} |")
    packages = ("numpy", "opencv-python-headless", "hotcoco", "pycocotools", "torch")
    print(f"\nPython {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))


if __name__ == "__main__":
    main()

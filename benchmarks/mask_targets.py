"""Compare grid formats for ground-truth masks: accuracy of the mask targets made from them, and cost.

    python benchmarks/mask_targets.py ../shared/data/coco_mini ../shared/data/nuclei

For annotated objects and boxes like RPN proposals, the 28 x 28 mask target of each grid format is compared with an
oracle that uses the original mask. For polygons, the oracle is COCO's rasteriser (pycocotools), applied to the polygons
in the coordinate frame of the box, scaled to 28 x 28. For run-length masks, it is RoIAlign on the full bitmap (aligned,
adaptive number of samples), thresholded at 0.5 as in Detectron2. Times are for one core.
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
"""Standard deviation of the box coordinates, relative to the width and height of the object's box."""
NUM_BOXES = 2
SUPERSAMPLING = 15
"""`cell_centre_target` rasterises at this multiple of the target size, to evaluate the mask at the centres of cells."""


@dataclass(frozen=True)
class Candidate:
    """A grid format."""

    size: int
    """Cells per side."""
    finer: int
    """Supersampling factor at which polygons are rasterised."""
    binary: bool
    """Whether a cell is 0 or 1, which could be stored as one bit, or holds the covered fraction in 255ths."""

    @property
    def num_bytes(self) -> int:
        """Size of one grid."""
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
    """An object, a proposal for it, and the oracle's mask target."""

    mask: Any
    image_size: tuple[int, int]
    box: np.ndarray
    oracle: np.ndarray


def cases(folder: Path, num_objects: int, rng: np.random.Generator) -> list[Case]:
    """Sample objects evenly from the validation split, each with `NUM_BOXES` boxes."""
    dataset = IndexedDataset(*find_layout(folder)["val"])
    index = dataset.index
    rows = np.flatnonzero(index.has_mask)
    rows = rows[np.linspace(0, len(rows) - 1, min(num_objects, len(rows))).astype(int)]
    sampled = []
    for row in rows.tolist():
        image = int(np.searchsorted(index.object_offsets, row, side="right")) - 1
        height, width = index.image_sizes[image].tolist()
        mask = index.mask(row)
        oracle = polygon_oracle if isinstance(mask, list) else bitmap_oracle
        for _ in range(NUM_BOXES):
            box = jittered(index.boxes[row].astype(np.float64), (height, width), rng)
            sampled.append(Case(mask, (height, width), box, oracle(mask, (height, width), box)))
    return sampled


def jittered(box: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random box inside the image whose IoU with `box` is at least `MIN_IOU`."""
    limits = np.array([image_size[1], image_size[0]] * 2)
    sizes = np.tile(box[2:] - box[:2], 2)
    while True:
        other = (box + rng.normal(0, SPREAD, 4) * sizes).clip(0, limits)
        intersection = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(0).prod()
        union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).clip(0).prod() - intersection
        if intersection >= MIN_IOU * union:
            return other


def polygon_oracle(polygons: Any, _: tuple[int, int], box: np.ndarray, size: int = TARGET_SIZE) -> np.ndarray:
    """[size, size] bool: the polygons inside the box, by COCO's rasteriser."""
    scale = size / (box[2:] - box[:2])
    moved = [((polygon - box[:2]) * scale).ravel().tolist() for polygon in polygons]
    rle = coco_mask.merge(coco_mask.frPyObjects(moved, size, size))
    return coco_mask.decode(rle).astype(bool)


def cell_centre_target(polygons: Any, image_size: tuple[int, int], box: np.ndarray) -> np.ndarray:
    """Mask target whose cells are 1 if their centre is inside the polygons, up to the supersampling resolution."""
    fine = polygon_oracle(polygons, image_size, box, TARGET_SIZE * SUPERSAMPLING)
    return fine[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]


def bitmap_oracle(counts: bytes, image_size: tuple[int, int], box: np.ndarray) -> np.ndarray:
    """Mask target of a run-length mask, by RoIAlign on the full bitmap."""
    bitmap = coco_mask.decode({"size": list(image_size), "counts": counts})
    pixels = torch.from_numpy(bitmap.astype(np.float32))[None, None]
    boxes = [torch.from_numpy(box.astype(np.float32))[None]]
    return (roi_align(pixels, boxes, TARGET_SIZE, sampling_ratio=0, aligned=True)[0, 0] >= 0.5).numpy()


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two bitmaps; 1 if both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def measure(candidate: Candidate, all_cases: list[Case]) -> tuple[np.ndarray, float]:
    """IoU with the oracle for each case, and the mean seconds to make a grid."""
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
    """Print a table for each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="dataset folders in COCO layout")
    parser.add_argument("--objects", type=int, default=2000, help="maximum number of objects per dataset")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in options.data:
        sampled = cases(folder, options.objects, np.random.default_rng(0))
        print(f"\n{folder.name}: {len(sampled) // NUM_BOXES} objects, {NUM_BOXES} boxes per object\n")
        print(
            "| grid size | cell values | bytes | us to make | mean IoU | 5th percentile |\n"
            "| --- | --- | --- | --- | --- | --- |"
        )
        for candidate in CANDIDATES:
            ious, seconds = measure(candidate, sampled)
            values = "binary" if candidate.binary else f"fraction, {candidate.finer} x {candidate.finer} supersampling"
            print(
                f"| {candidate.size} | {values} | {candidate.num_bytes} | {seconds * 1e6:.0f} | {ious.mean():.4f} "
                f"| {np.quantile(ious, 0.05):.3f} |"
            )
        polygon_cases = [case for case in sampled if isinstance(case.mask, list)]
        if polygon_cases:
            ious = np.array([iou(cell_centre_target(c.mask, c.image_size, c.box), c.oracle) for c in polygon_cases])
            print(f"| exact mask at cell centres | | | | {ious.mean():.4f} | {np.quantile(ious, 0.05):.3f} |")
    packages = ("numpy", "opencv-python-headless", "hotcoco", "pycocotools", "torch")
    print(f"\nPython {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))


if __name__ == "__main__":
    main()

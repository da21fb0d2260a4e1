"""Masks of detections to COCO's runs: ours beside torchvision's paste and pycocotools' encoder, in time and in truth.

    OMP_NUM_THREADS=1 python benchmarks/mask_paste.py --annotations coco/annotations/instances_val2017.json

Boxes and masks are those of annotated objects, drawn at random and scaled to a picture of 800 x 1333 each; a mask is
what a perfect network would give: the share of each of 28 x 28 cells that the object covers. Both sides take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from boxwright.evaluation.paste import paste_masks

PICTURE, LARGE_PICTURE = (800, 1333), (3000, 4000)
CELLS = 28


def objects(annotations: Path, num: int) -> list[tuple[np.ndarray, list[float]]]:
    """The mask [H, W] uint8 and the box (x, y, width, height) of `num` annotated objects, no crowd regions."""
    content = json.loads(annotations.read_bytes())
    images = {image["id"]: image for image in content["images"]}
    real = [entry for entry in content["annotations"] if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= 1]
    chosen = [real[index] for index in np.random.default_rng(0).permutation(len(real))[:num]]
    found = []
    for entry in chosen:
        image = images[entry["image_id"]]
        runs = entry["segmentation"]
        if isinstance(runs, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(runs, image["height"], image["width"]))
        elif isinstance(runs["counts"], list):
            runs = coco_mask.frPyObjects(runs, image["height"], image["width"])
        found.append((coco_mask.decode([runs])[:, :, 0], entry["bbox"]))
    return found


def on_grid(mask: np.ndarray, box: list[float]) -> Tensor:
    """[CELLS, CELLS] float32: the share of each cell of the box that the mask covers."""
    corners = torch.tensor([[0, box[0], box[1], box[0] + box[2], box[1] + box[3]]], dtype=torch.float32)
    return roi_align(torch.from_numpy(mask).float()[None, None], corners, CELLS, sampling_ratio=8, aligned=True)[0, 0]


def ours(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """COCO's runs by our operator."""
    return list(paste_masks(masks.numpy(), boxes.double().numpy(), np.tile(np.array([size]), (len(boxes), 1))).counts)


def theirs(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """COCO's runs by torchvision and pycocotools, as torchvision's reference scripts have it."""
    pasted = paste_masks_in_image(masks[:, None], boxes, size)[:, 0] > 0.5
    return [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"] for mask in pasted]


Side = Callable[[Tensor, Tensor, tuple[int, int]], list[bytes]]
SIDES: dict[str, Side] = {"Boxwright": ours, "torchvision + pycocotools": theirs}


def measure_time(
    chosen: list[tuple[np.ndarray, list[float]]], size: tuple[int, int], sides: dict[str, Side], rounds: int
) -> None:
    """All masks at once on one picture."""
    scales = [(size[1] / mask.shape[1], size[0] / mask.shape[0]) for mask, _ in chosen]
    masks = torch.stack([on_grid(mask, box) for mask, box in chosen])
    corners = [
        (x * right, y * down, (x + width) * right, (y + height) * down)
        for (_, (x, y, width, height)), (right, down) in zip(chosen, scales, strict=True)
    ]
    boxes = torch.tensor(corners, dtype=torch.float32)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    print(f"{len(boxes)} masks on {size[0]} x {size[1]}; boxes of {areas.median().sqrt():.0f} pixels a side ", end="")
    print(f"in the median, {areas.mean() / (size[0] * size[1]):.1%} of the picture on average")
    print("| milliseconds | of the clock | of the processor |\n| --- | --- | --- |")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            start, start_processor = time.perf_counter(), time.process_time()
            side(masks, boxes, size)
            times[name].append((time.perf_counter() - start, time.process_time() - start_processor))
    for name, values in times.items():
        columns = [[seconds * 1000 for seconds in column] for column in zip(*values[1:], strict=True)]
        cells = " | ".join(f"{statistics.median(part):.1f} ({min(part):.1f}-{max(part):.1f})" for part in columns)
        print(f"| {name} | {cells} |")
    tracemalloc.start()
    ours(masks, boxes, size)
    print(f"ours took {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB at most")
    tracemalloc.stop()


def measure_truth(chosen: list[tuple[np.ndarray, list[float]]]) -> None:
    """Each mask brought to its grid, pasted back, and compared with what it was."""
    overlaps: dict[tuple[str, str], list[float]] = {}
    for mask, (x, y, width, height) in chosen:
        grid = on_grid(mask, [x, y, width, height])
        boxes = torch.tensor([[x, y, x + width, y + height]])
        truth = [coco_mask.encode(np.asfortranarray(mask))]
        for kind, given in {"shares": grid, "shares rounded to 0 or 1": (grid >= 0.5).float()}.items():
            for name, side in SIDES.items():
                size = (mask.shape[0], mask.shape[1])
                pasted = [{"size": list(size), "counts": side(given[None], boxes, size)[0]}]
                overlaps.setdefault((kind, name), []).append(float(coco_mask.iou(pasted, truth, [0])[0, 0]))
    print("| a mask is given as | pasted by | all | small | others |\n| --- | --- | --- | --- | --- |")
    small = np.array([box[2] * box[3] < 32**2 for _, box in chosen])
    for (kind, name), values in overlaps.items():
        scores = np.array(values)
        cells = " | ".join(f"{part.mean():.4f}" for part in (scores, scores[small], scores[~small]))
        print(f"| {kind} | {name} | {cells} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO file with masks")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    hundred = objects(arguments.annotations, 100)
    measure_time(hundred, PICTURE, SIDES, arguments.rounds)
    measure_time(hundred, LARGE_PICTURE, {"Boxwright": ours}, arguments.rounds)  # theirs would take 4.8 GB
    measure_truth(objects(arguments.annotations, 1000))


if __name__ == "__main__":
    main()

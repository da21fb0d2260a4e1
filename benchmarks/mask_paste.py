"""Compare mask pasting and RLE encoding with torchvision + pycocotools, in speed and accuracy.

    OMP_NUM_THREADS=1 python benchmarks/mask_paste.py --annotations coco/annotations/instances_val2017.json

Boxes and masks are taken from random annotated objects and scaled to an image of 800 x 1333. The predicted mask is an
ideal one: for each of 28 x 28 cells, the fraction covered by the object. Both implementations run in alternation.
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

IMAGE_SIZE, LARGE_IMAGE_SIZE = (800, 1333), (3000, 4000)
GRID_SIZE = 28


def objects(annotations: Path, num: int) -> list[tuple[np.ndarray, list[float]]]:
    """Mask [H, W] uint8 and box (x, y, width, height) of `num` random annotated objects that are not crowd regions."""
    content = json.loads(annotations.read_bytes())
    images = {image["id"]: image for image in content["images"]}
    eligible = [entry for entry in content["annotations"] if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= 1]
    sampled = [eligible[index] for index in np.random.default_rng(0).permutation(len(eligible))[:num]]
    masks_and_boxes = []
    for entry in sampled:
        image = images[entry["image_id"]]
        rle = entry["segmentation"]
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, image["height"], image["width"]))
        elif isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, image["height"], image["width"])
        masks_and_boxes.append((coco_mask.decode([rle])[:, :, 0], entry["bbox"]))
    return masks_and_boxes


def mask_to_grid(mask: np.ndarray, box: list[float]) -> Tensor:
    """[GRID_SIZE, GRID_SIZE] float32: the fraction of each cell of the box that the mask covers."""
    corners = torch.tensor([[0, box[0], box[1], box[0] + box[2], box[1] + box[3]]], dtype=torch.float32)
    return roi_align(torch.from_numpy(mask).float()[None, None], corners, GRID_SIZE, sampling_ratio=8, aligned=True)[
        0, 0
    ]


def boxwright_rle(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """Compressed RLE of each mask by Boxwright's operator."""
    return list(paste_masks(masks.numpy(), boxes.double().numpy(), np.tile(np.array([size]), (len(boxes), 1))).counts)


def torchvision_rle(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """Compressed RLE of each mask by torchvision and pycocotools, as in torchvision's reference scripts."""
    pasted = paste_masks_in_image(masks[:, None], boxes, size)[:, 0] > 0.5
    return [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"] for mask in pasted]


Implementation = Callable[[Tensor, Tensor, tuple[int, int]], list[bytes]]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "Boxwright": boxwright_rle,
    "torchvision + pycocotools": torchvision_rle,
}


def measure_time(
    masks_and_boxes: list[tuple[np.ndarray, list[float]]],
    size: tuple[int, int],
    implementations: dict[str, Implementation],
    rounds: int,
) -> None:
    """Paste all masks into one image of `size` and print the times."""
    scales = [(size[1] / mask.shape[1], size[0] / mask.shape[0]) for mask, _ in masks_and_boxes]
    masks = torch.stack([mask_to_grid(mask, box) for mask, box in masks_and_boxes])
    corners = [
        (x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)
        for (_, (x, y, width, height)), (scale_x, scale_y) in zip(masks_and_boxes, scales, strict=True)
    ]
    boxes = torch.tensor(corners, dtype=torch.float32)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    print(
        f"{len(boxes)} masks, image {size[0]} x {size[1]}, median box side {areas.median().sqrt():.0f} pixels, ", end=""
    )
    print(f"mean box area {areas.mean() / (size[0] * size[1]):.1%} of the image")
    print("| | ms wall-clock | ms processor |\n| --- | --- | --- |")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for _ in range(rounds + 1):
        for name, implementation in implementations.items():
            start, start_processor = time.perf_counter(), time.process_time()
            implementation(masks, boxes, size)
            times[name].append((time.perf_counter() - start, time.process_time() - start_processor))
    for name, values in times.items():
        columns = [[seconds * 1000 for seconds in column] for column in zip(*values[1:], strict=True)]
        cells = " | ".join(f"{statistics.median(part):.1f} ({min(part):.1f}-{max(part):.1f})" for part in columns)
        print(f"| {name} | {cells} |")
    tracemalloc.start()
    boxwright_rle(masks, boxes, size)
    print(f"Boxwright's peak memory: {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB")
    tracemalloc.stop()


def measure_accuracy(masks_and_boxes: list[tuple[np.ndarray, list[float]]]) -> None:
    """Convert each mask to a grid, paste the grid back, and print the mean IoU with the original mask."""
    ious: dict[tuple[str, str], list[float]] = {}
    for mask, (x, y, width, height) in masks_and_boxes:
        grid = mask_to_grid(mask, [x, y, width, height])
        boxes = torch.tensor([[x, y, x + width, y + height]])
        target = [coco_mask.encode(np.asfortranarray(mask))]
        for grid_type, values in {"fractions": grid, "rounded to 0 or 1": (grid >= 0.5).float()}.items():
            for name, implementation in IMPLEMENTATIONS.items():
                size = (mask.shape[0], mask.shape[1])
                pasted = [{"size": list(size), "counts": implementation(values[None], boxes, size)[0]}]
                ious.setdefault((grid_type, name), []).append(float(coco_mask.iou(pasted, target, [0])[0, 0]))
    print("| cell values | pasted by | IoU, all | IoU, small | IoU, others |\n| --- | --- | --- | --- | --- |")
    small = np.array([box[2] * box[3] < 32**2 for _, box in masks_and_boxes])
    for (grid_type, name), values in ious.items():
        scores = np.array(values)
        cells = " | ".join(f"{part.mean():.4f}" for part in (scores, scores[small], scores[~small]))
        print(f"| {grid_type} | {name} | {cells} |")


def main() -> None:
    """Print the tables of times and accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO annotation file with masks")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    hundred = objects(arguments.annotations, 100)
    measure_time(hundred, IMAGE_SIZE, IMPLEMENTATIONS, arguments.rounds)
    # torchvision would need 4.8 GB here.
    measure_time(hundred, LARGE_IMAGE_SIZE, {"Boxwright": boxwright_rle}, arguments.rounds)
    measure_accuracy(objects(arguments.annotations, 1000))


if __name__ == "__main__":
    main()

"""Compare the speed of NMS, matching and multi-level RoIAlign with torchvision's; Soft-NMS with torchvision's hard NMS.

    python benchmarks/ops.py --out ops.json

Both implementations run in alternation within each round, so that other load on the machine affects them alike. Each
result is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou

from boxwright.assign.match import match
from boxwright.geometry.anchors import base_anchors, grid_anchors
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import multilevel_roi_align
from boxwright.ops.soft_nms import soft_nms
from boxwright.structures import Targets

CANVAS = (800, 1344)
STRIDES = [4, 8, 16, 32]
Case = tuple[Callable[[], object], Callable[[], object]]


def random_boxes(num_images: int, num_boxes: int, device: str) -> Tensor:
    """Boxes at random positions with log-uniform sides from 16 to 512 pixels."""
    height, width = CANVAS
    corner = torch.rand(num_images, num_boxes, 2) * torch.tensor([width * 0.8, height * 0.8])
    return torch.cat([corner, corner + 2 ** (4 + 5 * torch.rand(num_images, num_boxes, 2))], -1).to(device)


def clustered_boxes(num_images: int, num_boxes: int, device: str) -> Tensor:
    """Boxes like predictions of a trained detector: many around each of 50 objects."""
    objects = random_boxes(num_images, 50, "cpu").repeat(1, -(-num_boxes // 50), 1)[:, :num_boxes]
    sizes = (objects[..., 2:] - objects[..., :2]).repeat(1, 1, 2)
    return (objects + 0.15 * sizes * torch.randn_like(objects)).to(device)


def nms_case(
    boxes: Tensor, num_groups: int, share_valid: float, max_keep: int, threshold: float, *, soft: bool = False
) -> Case:
    """NMS within groups (levels or classes).

    torchvision receives only valid boxes, as in its models, and always runs hard NMS.
    """
    num_images, num_boxes, _ = boxes.shape
    device = boxes.device
    scores = torch.rand(num_images, num_boxes).to(device)
    groups = (torch.arange(num_boxes) % num_groups).expand(num_images, -1).contiguous().to(device)
    valid = (torch.rand(num_images, num_boxes) < share_valid).to(device)

    def ours() -> object:
        if soft:
            options: dict[str, Any] = {"decay": "linear", "sigma": 0.5, "min_score": 0.05}
            return soft_nms(boxes, scores, groups, valid, iou_threshold=threshold, max_keep=max_keep, **options)
        return nms(boxes, scores, groups, valid, iou_threshold=threshold, max_keep=max_keep)

    def theirs() -> object:
        return [
            batched_nms(boxes[image][keep], scores[image][keep], groups[image][keep], threshold)[:max_keep]
            for image, keep in enumerate(valid)
        ]

    return ours, theirs


def roi_align_case(device: str, num_images: int, num_boxes: int, output_size: int, backward: bool) -> Case:
    """RoIAlign on four levels with 256 channels. Boxwright runs unaligned, as torchvision's pooler does."""
    height, width = CANVAS
    contiguous = [torch.randn(num_images, 256, height // s, width // s, device=device) for s in STRIDES]
    # Each implementation receives the memory format of its models: channels last (Boxwright), contiguous (torchvision).
    features = [feature.to(memory_format=torch.channels_last).requires_grad_(backward) for feature in contiguous]
    contiguous = [feature.requires_grad_(backward) for feature in contiguous]
    boxes = random_boxes(num_images, num_boxes, device)
    valid = torch.ones(num_images, num_boxes, dtype=torch.bool, device=device)
    named = OrderedDict((str(index), feature) for index, feature in enumerate(contiguous))
    pooler = MultiScaleRoIAlign(list(named), output_size, 2)

    def ours() -> Tensor:
        return multilevel_roi_align(
            features, boxes, valid, strides=STRIDES, output_size=output_size, sampling_ratio=2, aligned=False
        )

    def theirs() -> Tensor:
        return pooler(named, list(boxes), [CANVAS] * num_images)

    def with_backward(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward().sum(), inputs)

    return (with_backward(ours, features), with_backward(theirs, contiguous)) if backward else (ours, theirs)


def matcher_case(device: str, num_objects: int) -> Case:
    """Matching of all RPN anchors (strides 4 to 64) to the objects of two images."""
    height, width = CANVAS
    strides = [*STRIDES, 64]
    base = [base_anchors([8.0 * stride], [0.5, 1.0, 2.0]) for stride in strides]
    anchors = torch.cat(grid_anchors([(-(-height // s), -(-width // s)) for s in strides], strides, base)).to(device)
    boxes = random_boxes(2, num_objects, device)
    ones = torch.ones(2, num_objects, dtype=torch.bool, device=device)
    targets = Targets(boxes=boxes, labels=ones.long(), valid=ones, crowd=~ones)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def ours() -> object:
        return match(anchors, targets, positive_iou=0.7, negative_iou=0.3, low_quality=0.0)

    def theirs() -> object:
        return [matcher(box_iou(objects, anchors)) for objects in boxes]

    return ours, theirs


def cases(device: str) -> dict[str, Case]:
    """Cases by name, with the shapes of Faster R-CNN for two images of 800 x 1344, in training and inference."""
    return {
        "NMS, RPN: 2 x 5 levels x 2000, keep 2000": nms_case(random_boxes(2, 10000, device), 5, 1.0, 2000, 0.7),
        "NMS, RPN: the same, 50 clusters": nms_case(clustered_boxes(2, 10000, device), 5, 1.0, 2000, 0.7),
        "NMS, box head: 2 x 1000 x 80 classes, 5% valid, keep 100": nms_case(
            clustered_boxes(2, 80000, device), 80, 0.05, 100, 0.5
        ),
        "Soft-NMS, box head: the same": nms_case(clustered_boxes(2, 80000, device), 80, 0.05, 100, 0.5, soft=True),
        "Soft-NMS, box head: the same, all valid": nms_case(
            clustered_boxes(2, 80000, device), 80, 1.0, 100, 0.5, soft=True
        ),
        "Matching: 268,569 anchors with 2 x 8 objects": matcher_case(device, 8),
        "Matching: the same with 2 x 100 objects": matcher_case(device, 100),
        "RoIAlign 7 x 7: 2 x 512 boxes, forward": roi_align_case(device, 2, 512, 7, backward=False),
        "RoIAlign 7 x 7: 2 x 512 boxes, forward + backward": roi_align_case(device, 2, 512, 7, backward=True),
        "RoIAlign 14 x 14: 2 x 128 boxes, forward + backward": roi_align_case(device, 2, 128, 14, backward=True),
    }


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, including the work on the device."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Time all cases, print a Markdown table and write all times to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)

    rows = {}
    print("| operation | Boxwright, ms | torchvision, ms | torchvision / Boxwright |\n| --- | --- | --- | --- |")
    for name, functions in cases(device).items():
        for function in functions:
            milliseconds(function, device)
        rounds = [[milliseconds(function, device) for function in functions] for _ in range(arguments.rounds)]
        ours, theirs = (list(times) for times in zip(*rounds, strict=True))
        rows[name] = {"ours_ms": ours, "torchvision_ms": theirs}
        cells = [f"{statistics.median(t):.1f} ({min(t):.1f}-{max(t):.1f})" for t in (ours, theirs)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {statistics.median(theirs) / statistics.median(ours):.2f} |")

    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
        "hardware": hardware,
    }
    print(versions)
    arguments.out.write_text(json.dumps({"versions": versions, "rounds": rows}, indent=2))


if __name__ == "__main__":
    main()

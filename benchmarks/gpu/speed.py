"""Time, memory, parts and one profiled call of whole detectors, and of torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchvision.models import detection

import boxwright.ops.roi_align as roi_align
from benchmarks.gpu.cases import NUM_CLASSES, Detecting, Training, make_batch, precision_of
from benchmarks.gpu.profile import profile_of
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import parts_of, peak_memory, seconds_of
from boxwright.precision import autocast
from boxwright.structures import to_device

Fragments = Iterator[dict[str, Any]]
"""What an item yields: parts of its result, each written as soon as it is there."""

_PEERS = {
    "mask_rcnn": detection.maskrcnn_resnet50_fpn,
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
}


def train(scale: Scale, family: str, batch_size: int, *, triton: bool = False) -> Fragments:
    """Training steps with all object slots of the scale; `triton` pools with the Triton RoIAlign."""
    with _triton_roi_align(triton), peak_memory(scale) as peak:
        training = Training(scale, family, batch_size)
        yield _row(scale, family, "train", batch_size, triton_roi_align=triton)
        yield {"seconds": seconds_of(scale, training.step)[0]}
        yield {"parts_s": parts_of(scale, training.detector, training.step, training.optimizer)}
        yield {"profile": profile_of(scale, training.step)}
    yield {"peak_bytes": peak}


def train_with_graphs(scale: Scale, family: str, batch_size: int) -> Fragments:
    """Training steps that are compiled and replayed as CUDA graphs."""
    with peak_memory(scale) as peak:
        training = Training(scale, family, batch_size, compile=scale.device == "cuda", graphs=scale.device == "cuda")
        yield _row(scale, family, "train, CUDA graphs", batch_size)
        for _ in range(3):  # compiles, captures, replays
            training.step()
        yield {"seconds": seconds_of(scale, training.step)[0]}
        yield {"profile": profile_of(scale, training.step)}
    yield {"peak_bytes": peak}


def detect(scale: Scale, family: str, batch_size: int) -> Fragments:
    """Detections of a batch that is on the device and stay there."""
    with peak_memory(scale) as peak:
        detecting = Detecting(scale, family, batch_size)
        yield _row(scale, family, "detect", batch_size)
        yield {"seconds": seconds_of(scale, detecting.step)[0]}
        yield {"parts_s": parts_of(scale, detecting.detector, detecting.step)}
        yield {"profile": profile_of(scale, detecting.step)}
    yield {"peak_bytes": peak}


def torchvision_train(scale: Scale, family: str, batch_size: int) -> Fragments:
    """Train torchvision's R-50-FPN detector on the same images and objects, under the same autocast, with SGD."""
    device = torch.device(scale.device)
    model: nn.Module = _PEERS[family](weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1)
    height, width = scale.canvas
    model.transform.min_size, model.transform.max_size = (height,), width
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    batch = to_device(make_batch(scale, family, batch_size), device)
    assert batch.targets is not None
    images = list(batch.images.float() / 255)
    targets = []
    for image in range(batch_size):
        real = batch.targets.valid[image].nonzero().squeeze(1)
        boxes = batch.targets.boxes[image, real]
        target = {"boxes": boxes, "labels": batch.targets.labels[image, real] + 1}
        if family == "mask_rcnn":
            target["masks"] = _box_masks(boxes, scale.canvas)
        targets.append(target)

    def step() -> None:
        with autocast(device, precision_of(scale)):
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with peak_memory(scale) as peak:
        yield _row(scale, family, "train, torchvision", batch_size)
        yield {"seconds": seconds_of(scale, step)[0]}
        yield {"profile": profile_of(scale, step)}
    yield {"peak_bytes": peak}


def _box_masks(boxes: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """[N, H, W] uint8 masks that fill their boxes."""
    y = torch.arange(canvas[0], device=boxes.device)[None, :, None]
    x = torch.arange(canvas[1], device=boxes.device)[None, None, :]
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)


def _row(scale: Scale, family: str, task: str, batch_size: int, **settings: Any) -> dict[str, Any]:
    return {
        "case": {
            "recipe": scale.recipe.format(family),
            "task": task,
            "batch": batch_size,
            "canvas": list(scale.canvas),
            "slots": scale.slots,
            "precision": precision_of(scale),
            **settings,
        }
    }


@contextmanager
def _triton_roi_align(on: bool) -> Iterator[None]:
    before = roi_align.TRITON
    roi_align.TRITON = on
    try:
        yield
    finally:
        roi_align.TRITON = before


def compile_training(scale: Scale, family: str, batch_size: int) -> Fragments:
    """Compile the losses as one graph: seconds of Dynamo, AOTAutograd and Inductor apart, then seconds per step."""
    from benchmarks.gpu.compiling import compile_losses  # slow to import

    training = Training(scale, family, batch_size)

    def work(losses: Callable[..., dict[str, torch.Tensor]]) -> torch.Tensor:
        with autocast(torch.device(scale.device), precision_of(scale)):
            total = torch.stack(list(losses(training.batch).values())).sum()
        total.backward()
        training.detector.zero_grad(set_to_none=True)
        return total.detach()

    eager: Any = training.detector.losses
    yield _row(scale, family, "losses and gradients, compiled", batch_size)
    expected = float(work(eager))
    yield {"eager_seconds": seconds_of(scale, lambda: work(eager))[0]}
    with peak_memory(scale) as peak:
        compiled = eager
        for fragment, function in compile_losses(scale, eager, work):
            yield fragment
            compiled = function
        yield {"loss": [expected, float(work(compiled))]}
        yield {"seconds": seconds_of(scale, lambda: work(compiled))[0]}
        yield {"profile": profile_of(scale, lambda: work(compiled))}
    yield {"peak_bytes": peak}

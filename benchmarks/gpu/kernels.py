"""Operators beside another form of the same operator: equality first, then time. Also the rate of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import boxwright.assign.match as matching
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import peak_memory, seconds_of
from benchmarks.ops import CANVAS, STRIDES, clustered_boxes, nms_case, random_boxes
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import pool_every_level
from boxwright.ops.roi_align_cpu import pool_own_level
from boxwright.structures import Targets


def matrix_rate(scale: Scale) -> Iterator[dict[str, Any]]:
    """Rate of the product of two large square matrices: bfloat16 on a GPU."""
    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    left, right = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=dtype) for _ in range(2))
    seconds = min(seconds_of(scale, partial(torch.mm, left, right))[0])
    yield {"matrix_tflops": {str(dtype).removeprefix("torch."): 2 * scale.matrix**3 / seconds / 1e12}}


def roi_align(scale: Scale) -> Iterator[dict[str, Any]]:
    """`pool_own_level` (Triton on a GPU) beside `pool_every_level`: values, gradients and time.

    Raises:
        AssertionError: They differ.
    """
    rows = []
    for num_boxes, size in ((8, 3),) if scale.device == "cpu" else ((512, 7), (128, 14)):
        channels, canvas = (4, (128, 160)) if scale.device == "cpu" else (256, CANVAS)
        features = [
            torch.randn(2, channels, canvas[0] // s, canvas[1] // s, device=scale.device, dtype=torch.bfloat16)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for s in STRIDES
        ]
        boxes = random_boxes(2, num_boxes, scale.device)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        level = ((area.sqrt() / 224).log2().floor().long() + 2).clamp(0, 3)
        level[:, -1] = len(STRIDES)  # an invalid slot
        arguments = (features, boxes, level, STRIDES, size, 2, True, False)
        pooled, plain = pool_own_level(*arguments), pool_every_level(*arguments)
        # Sums in float32 in another order, rounded to bfloat16 once; the plain gradient is rounded once too.
        # Sums that nearly cancel are compared relative to the largest value.
        torch.testing.assert_close(pooled, plain, rtol=2**-7, atol=2**-8 * float(plain.abs().max()))
        weight = torch.randn_like(pooled)
        gradients = [torch.autograd.grad(output, features, weight) for output in (pooled, plain)]
        for own, every in zip(*gradients, strict=True):
            torch.testing.assert_close(own, every, rtol=2**-6, atol=2**-7 * float(every.abs().max()))

        def forward(form: Callable[..., Tensor], arguments: Any = arguments) -> Tensor:
            with torch.no_grad():
                return form(*arguments)

        def both(form: Callable[..., Tensor], arguments: Any = arguments, weight: Tensor = weight) -> object:
            return torch.autograd.grad(form(*arguments), arguments[0], weight)

        for name, work in (("forward", forward), ("forward + backward", both)):
            calls = {"own level": partial(work, pool_own_level), "every level": partial(work, pool_every_level)}
            rows.append(_row(scale, f"RoIAlign {size} x {size}, 2 x {num_boxes} boxes, bfloat16, {name}", calls))
    yield {"operators": rows}


def suppression(scale: Scale) -> Iterator[dict[str, Any]]:
    """NMS keeps the boxes that it keeps on the CPU. Time of NMS and Soft-NMS beside torchvision's NMS.

    Raises:
        AssertionError: Another box survives.
    """
    boxes = clustered_boxes(2, 2000, "cpu")
    arguments = (boxes, torch.rand(2, 2000), torch.randint(5, (2, 2000)), torch.rand(2, 2000) < 0.9)
    expected = nms(*arguments, iou_threshold=0.7, max_keep=1000)
    kept = nms(*(tensor.to(scale.device) for tensor in arguments), iou_threshold=0.7, max_keep=1000)
    for one, other in zip(kept, expected, strict=True):
        assert torch.equal(one.cpu(), other), "NMS keeps other boxes than on the CPU"
    many = 20 if scale.device == "cpu" else 2000
    rpn, head = (clustered_boxes(2, count, scale.device) for count in (5 * many, 40 * many))
    cases = {
        f"NMS, 2 x 5 levels x {many}": nms_case(rpn, 5, 1.0, many, 0.7),
        f"NMS, 2 x {many // 2} boxes x 80 classes, 5% valid": nms_case(head, 80, 0.05, 100, 0.5),
        f"Soft-NMS, 2 x {many // 2} boxes x 80 classes, 5% valid": nms_case(head, 80, 0.05, 100, 0.5, soft=True),
    }
    rows = [_row(scale, name, {"boxwright": ours, "torchvision": other}) for name, (ours, other) in cases.items()]
    yield {"operators": rows}


def matcher(scale: Scale) -> Iterator[dict[str, Any]]:
    """The matcher with tiles of several sizes, untiled and compiled, and torchvision's, each with its peak memory.

    Whether the compiled form materialises the IoU matrix shows in its memory; whether it labels candidates as the tiles
    do shows in `equal`: the compiler may contract a product and a sum into one rounding.
    """
    sizes = ((2, 32), (scale.train_batches[-1], scale.slots)) if scale.device == "cuda" else ((2, 8),)
    for batch_size, num_objects in sizes:
        anchors = random_boxes(1, scale.anchors, scale.device)[0]
        boxes = random_boxes(batch_size, num_objects, scale.device)
        valid = torch.ones(batch_size, num_objects, dtype=torch.bool, device=scale.device)
        targets = Targets(boxes=boxes, labels=valid.long(), valid=valid, crowd=~valid)
        areas, object_areas = (matching.area(some) for some in (anchors[None], boxes))
        arguments = (anchors[None], areas, boxes, object_areas, torch.zeros_like(object_areas), 0.0, 0.7, 0.0)
        whole = scale.anchors * batch_size * num_objects
        torch._dynamo.reset()
        backend = "inductor" if scale.device == "cuda" else "eager"
        compiled = torch.compile(partial(matching.compare, tile=whole), fullgraph=True, dynamic=False, backend=backend)
        theirs = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        calls: dict[str, Callable[[], Any]] = {
            f"tiles of 2^{power}": partial(matching.compare, *arguments, 2**power) for power in (20, 22, 24, 26)
        }
        calls["match"] = partial(matching.match, anchors, targets, positive_iou=0.7, negative_iou=0.3, low_quality=0.0)
        calls["compiled, one tile"] = partial(compiled, *arguments)
        calls["torchvision"] = lambda boxes=boxes, theirs=theirs, anchors=anchors: [
            theirs(box_iou(objects, anchors)) for objects in boxes
        ]
        row = _row(scale, f"matcher, {scale.anchors:,} anchors, {batch_size} x {num_objects} objects", calls)
        row["peak_bytes"] = {}
        for name, call in calls.items():
            with peak_memory(scale) as peak:
                call()
            row["peak_bytes"][name] = peak.get("allocated")
        pairs = zip(compiled(*arguments), matching.compare(*arguments, matching.TILE), strict=True)
        row["equal"] = [torch.equal(one, other) for one, other in pairs]
        yield {"operators": [row]}


def _row(scale: Scale, name: str, calls: dict[str, Callable[[], object]]) -> dict[str, Any]:
    return {"name": name, "seconds": dict(zip(calls, seconds_of(scale, *calls.values()), strict=True))}

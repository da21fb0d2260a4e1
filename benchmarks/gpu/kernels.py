"""Operators beside another form of the same: what they compute, then what they cost; and the device's matrix rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from benchmarks.gpu.results import Result
from benchmarks.gpu.scale import Scale
from benchmarks.ops import CANVAS, STRIDES, clustered_boxes, nms_case, random_boxes
from boxwright.assign.match import match
from boxwright.benchmark.measure import alternate
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import pool_every_level
from boxwright.ops.roi_align_cpu import pool_own_level
from boxwright.structures import Targets

_CALLS = 10
_ROUNDS = 7


def matrix_rate(scale: Scale) -> Result:
    """Operations a second of the product of two large square matrices, the best of several: bfloat16 on a GPU."""
    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    left, right = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=dtype) for _ in range(2))
    rate = 2 * scale.matrix**3 / min(_times(scale, partial(torch.mm, left, right))[0])
    name = str(dtype).removeprefix("torch.")
    return Result(rates={name: rate}, detail=f"{rate / 1e12:.3g} TFLOP/s in {name}")


def roi_align(scale: Scale) -> Result:
    """The form that pools each box from its own level, on a GPU Triton's, beside the plain one over all levels.

    Raises:
        AssertionError: they do not agree.
    """
    rows = []
    few = scale.device == "cpu"
    for num_boxes, size in ((8, 3),) if few else ((512, 7), (128, 14)):
        channels, canvas = (4, (128, 160)) if few else (256, CANVAS)
        features = [
            torch.randn(2, channels, canvas[0] // s, canvas[1] // s, device=scale.device, dtype=torch.bfloat16)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for s in STRIDES
        ]
        boxes = random_boxes(2, num_boxes, scale.device)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        level = ((area.sqrt() / 224).log2().floor().long() + 2).clamp(0, 3)
        level[:, -1] = len(STRIDES)  # one that is not pooled
        arguments = (features, boxes, level, STRIDES, size, 2, True, False)
        own, every = pool_own_level(*arguments), pool_every_level(*arguments)
        # Sums in float32 of another order, rounded to bfloat16 once; the plain gradient is rounded once too.
        torch.testing.assert_close(own, every, rtol=2**-7, atol=1e-3)
        weight = torch.randn_like(own)
        gradients = [torch.autograd.grad(pooled, features, weight) for pooled in (own, every)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-6, atol=1e-2)
        name = f"RoIAlign {size} x {size}, 2 x {num_boxes} boxes, bfloat16"

        def forward(form: Callable[..., Tensor], given: tuple[Any, ...] = arguments) -> Tensor:
            with torch.no_grad():
                return form(*given)

        def both(
            form: Callable[..., Tensor],
            given: tuple[Any, ...] = arguments,
            maps: list[Tensor] = features,
            weight: Tensor = weight,
        ) -> object:
            return torch.autograd.grad(form(*given), maps, weight)

        for suffix, work in ((", forward", forward), (", forward + backward", both)):
            ours, other = (partial(work, form) for form in (pool_own_level, pool_every_level))
            rows.append(_row(scale, name + suffix, ours, other, "plain, every level"))
    return Result(kernels=rows, detail="values and gradients agree")


def suppression(scale: Scale) -> Result:
    """NMS beside the CPU's answer and torchvision's time, and Soft-NMS beside torchvision's hard NMS.

    Raises:
        AssertionError: a box survives here and not on the CPU.
    """
    boxes = clustered_boxes(2, 2000, "cpu")
    scores, groups = torch.rand(2, 2000), torch.randint(5, (2, 2000))
    given = (boxes, scores, groups, torch.rand(2, 2000) < 0.9)
    wanted = nms(*given, iou_threshold=0.7, max_keep=1000)
    found = nms(*(tensor.to(scale.device) for tensor in given), iou_threshold=0.7, max_keep=1000)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other), "NMS keeps other boxes than on the CPU"
    many = 20 if scale.device == "cpu" else 2000
    rpn, head = (clustered_boxes(2, count, scale.device) for count in (5 * many, 40 * many))
    cases = {
        f"NMS, 2 x 5 levels x {many}": nms_case(rpn, 5, 1.0, many, 0.7),
        f"NMS, 2 x {many // 2} boxes x 80 classes, 5% valid": nms_case(head, 80, 0.05, 100, 0.5),
        f"Soft-NMS, 2 x {many // 2} boxes x 80 classes, 5% valid": nms_case(head, 80, 0.05, 100, 0.5, soft=True),
    }
    rows = [_row(scale, name, *sides, "torchvision's NMS") for name, sides in cases.items()]
    return Result(kernels=rows, detail="NMS keeps the boxes that it keeps on the CPU")


def matcher(scale: Scale) -> Result:
    """Anchors of a picture to objects, beside torchvision's IoU and matcher, which go through the images one by one."""
    num_anchors, num_objects = (500, 8) if scale.device == "cpu" else (268569, 32)
    anchors = random_boxes(1, num_anchors, scale.device)[0]
    boxes = random_boxes(2, num_objects, scale.device)
    real = torch.ones(2, num_objects, dtype=torch.bool, device=scale.device)
    targets = Targets(boxes=boxes, labels=real.long(), valid=real, crowd=~real)
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def ours() -> object:
        return match(anchors, targets, positive_iou=0.7, negative_iou=0.3, low_quality=0.0)

    def other() -> object:
        return [theirs(box_iou(objects, anchors)) for objects in boxes]

    return Result(
        kernels=[_row(scale, f"matcher, {num_anchors} anchors, 2 x {num_objects}", ours, other, "torchvision")]
    )


class Call:
    """A call as a thing to time in turns with another."""

    name = "call"

    def __init__(self, call: Callable[[], object]) -> None:
        """Keep the call."""
        self._call = call

    def prepare(self, batch: object) -> None:
        """It has what it works on."""

    def infer(self, given: object) -> None:
        """Call it."""
        self._call()

    def train_step(self, given: object) -> None:
        """It does not train."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held elsewhere."""


def _times(scale: Scale, *calls: Callable[[], object]) -> list[list[float]]:
    """Seconds of calls that take turns, several calls in a row on a GPU."""
    on_gpu = scale.device == "cuda"
    turns = alternate(
        [Call(call) for call in calls],
        cast(Any, [None]),
        "infer",
        iterations=_ROUNDS if on_gpu else 1,
        warmup=1 if on_gpu else 0,
        steps_per_time=_CALLS if on_gpu else 1,
        device=torch.device(scale.device),
    )
    return [times.seconds for times in turns]


def _row(
    scale: Scale, name: str, ours: Callable[[], object], other: Callable[[], object], against: str
) -> dict[str, Any]:
    own, theirs = _times(scale, ours, other)
    return {"name": name, "ours": own, "other": theirs, "against": against}

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from boxwright.geometry.boxes import area, clip, decode, encode, intersection, iou

STDS = (0.1, 0.1, 0.2, 0.2)


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 600
    size = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 200 + 4
    return torch.cat([corner, corner + size], dim=-1)


def test_iou_equals_torchvision() -> None:
    a, b = random_boxes(2, 30), random_boxes(2, 50, seed=1)
    ours = iou(a, b)
    assert ours.shape == (2, 30, 50)
    for image in range(2):
        assert torch.equal(ours[image], box_iou(a[image], b[image]))


def test_iou_broadcasts_anchors_over_a_batch() -> None:
    a, b = random_boxes(2, 5), random_boxes(7, seed=1)
    assert torch.equal(iou(a, b)[1], iou(a[1], b))


@pytest.mark.parametrize("plus_one", [0.0, 1.0])
def test_area_and_iou_equal_pixel_counts(plus_one: float) -> None:
    # Boxes with integer corners cover pixels x1..x2 with plus_one=1, and x1..x2 - 1 with plus_one=0.
    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(0, 20, (12, 2, 2), generator=generator)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=-1)
    masks = torch.zeros(12, 32, 32, dtype=torch.float64)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1 : y2 + int(plus_one), x1 : x2 + int(plus_one)] = 1
    shared = torch.einsum("ayx,byx->ab", masks, masks)
    pixels = masks.sum((1, 2))
    boxes = boxes.double()
    assert torch.equal(area(boxes, plus_one), pixels)
    union = (pixels[:, None] + pixels[None] - shared).clamp(min=1e-9)
    torch.testing.assert_close(iou(boxes, boxes, plus_one), shared / union)
    assert torch.equal(intersection(boxes, boxes, plus_one), shared)


def test_boxes_of_zero_area_have_iou_0() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert iou(point, point).item() == 0.0


def test_encode_and_decode_equal_torchvision() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, anchors = random_boxes(100), random_boxes(100, seed=1)
    deltas = encode(boxes, anchors, STDS)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-4)
    wild = torch.randn(100, 4, generator=torch.Generator().manual_seed(2)) * 20
    torch.testing.assert_close(decode(wild, anchors, STDS), coder.decode_single(wild, anchors), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("plus_one", [0.0, 1.0])
def test_decode_inverts_encode(plus_one: float) -> None:
    boxes, anchors = random_boxes(100, dtype=torch.float64), random_boxes(100, seed=1, dtype=torch.float64)
    decoded = decode(encode(boxes, anchors, STDS, plus_one=plus_one), anchors, STDS, plus_one=plus_one)
    torch.testing.assert_close(decoded, boxes)


def test_plus_one_encoding_equals_a_calculation_by_hand() -> None:
    anchor = torch.tensor([[0.0, 0.0, 15.0, 31.0]], dtype=torch.float64)  # 16 x 32 pixels around (7.5, 15.5)
    box = torch.tensor([[8.0, 0.0, 39.0, 31.0]], dtype=torch.float64)  # 32 x 32 pixels around (23.5, 15.5)
    deltas = encode(box, anchor, (1, 1, 1, 1), plus_one=1)
    torch.testing.assert_close(deltas, torch.tensor([[1.0, 0.0, math.log(2), 0.0]], dtype=torch.float64))
    assert torch.equal(decode(torch.zeros(1, 4, dtype=torch.float64), anchor, STDS, plus_one=1), anchor)


def test_decode_clamps_large_scales_and_with_plus_one_small_scales() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    largest = decode(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), anchor, STDS)
    torch.testing.assert_close(largest[:, 2:] - largest[:, :2], torch.full((1, 2), 1000.0))
    smallest = decode(torch.tensor([[0.0, 0.0, -1e4, -1e4]]), anchor - torch.tensor([0, 0, 1, 1]), STDS, plus_one=1)
    torch.testing.assert_close(smallest[:, 2:] - smallest[:, :2] + 1, torch.full((1, 2), 0.256))


def test_clip_equals_torchvision() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 700.0, 700.0], [10.0, 20.0, 30.0, 40.0]])
    sizes = torch.tensor([[480, 640], [32, 16]])
    batch = clip(boxes.expand(2, 2, 4), sizes)
    for image in range(2):
        assert torch.equal(batch[image], clip_boxes_to_image(boxes, sizes[image].tolist()))
    assert torch.equal(clip(boxes, sizes[0]), batch[0])
    assert clip(boxes, sizes[0], plus_one=1)[0].tolist() == [0, 0, 639, 479]


def all_operations(deltas: Tensor, anchors: Tensor, targets: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    boxes = clip(decode(deltas, anchors, STDS), sizes)
    return iou(boxes, targets), encode(boxes, anchors, STDS), intersection(boxes, targets, plus_one=1)


def test_box_operations_compile_to_one_graph_and_run_on_fake_tensors() -> None:
    arguments = (torch.randn(2, 9, 4), random_boxes(9), random_boxes(2, 3), torch.tensor([[400, 500], [600, 700]]))
    compiled = torch.compile(all_operations, fullgraph=True, backend="aot_eager")(*arguments)
    for ours, theirs in zip(all_operations(*arguments), compiled, strict=True):
        torch.testing.assert_close(ours, theirs)
    with FakeTensorMode() as mode:
        shapes = [out.shape for out in all_operations(*(mode.from_tensor(argument) for argument in arguments))]
    assert shapes == [(2, 9, 3), (2, 9, 4), (2, 9, 3)]

from __future__ import annotations

import torch

from boxwright.geometry.affine import invert, transform_boxes


def matrices() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)


def test_invert_equals_torch_linalg_inv() -> None:
    bottom = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64).expand(3, 1, 3)
    inverse = torch.linalg.inv(torch.cat([matrices(), bottom], 1))
    torch.testing.assert_close(invert(matrices()), inverse[:, :2])


def test_transformed_boxes_enclose_all_four_corners() -> None:
    boxes = torch.tensor([[[1.0, 2.0, 5.0, 9.0], [0.0, 0.0, 3.0, 1.0]]], dtype=torch.float64).expand(3, 2, 4)
    x1, y1, x2, y2 = boxes.unbind(-1)
    corners = torch.stack([torch.stack([x, y, torch.ones_like(x)], -1) for x in (x1, x2) for y in (y1, y2)], -2)
    transformed = torch.einsum("bij,bnkj->bnki", matrices(), corners)
    expected = torch.cat([transformed.amin(2), transformed.amax(2)], -1)
    torch.testing.assert_close(transform_boxes(boxes, matrices()), expected)


def test_a_horizontal_flip_is_exact() -> None:
    flip = torch.tensor([[[-1.0, 0.0, 100.0], [0.0, 1.0, 0.0]]])
    box = torch.tensor([[[10.3, 20.0, 30.7, 40.0]]])
    assert torch.equal(transform_boxes(box, flip)[0, 0], torch.tensor([100 - 30.7, 20.0, 100 - 10.3, 40.0]))


def test_nan_boxes_do_not_affect_others_and_autocast_keeps_float32() -> None:
    boxes = torch.tensor([[[1.25, 2.0, 777.125, 4.0], [float("nan")] * 4]])
    with torch.autocast("cpu", torch.bfloat16):
        moved = transform_boxes(boxes, invert(torch.eye(2, 3)[None]))
    assert torch.equal(moved[0, 0], boxes[0, 0])

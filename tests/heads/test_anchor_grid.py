from __future__ import annotations

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from boxwright.geometry.conventions import MODERN, TORCHVISION
from boxwright.heads.anchor_grid import AnchorGrid, by_anchor

STRIDES, SIZES, RATIOS = (32, 64), ((32.0, 40.0), (64.0, 80.0)), (0.5, 1.0, 2.0)


def test_torchvision_anchors_are_spaced_by_canvas_size_and_modern_anchors_by_stride() -> None:
    # P6 has 13 rows for 800 pixels. torchvision spaces anchors by 800 // 13 = 61 pixels; the stride is 64.
    canvas, maps = (800, 832), [torch.zeros(1, 2, 25, 26), torch.zeros(1, 2, 13, 13)]
    theirs = AnchorGenerator(SIZES, (RATIOS,) * 2)(ImageList(torch.zeros(1, 3, *canvas), [canvas]), maps)[0]
    assert torch.equal(torch.cat(AnchorGrid(STRIDES, SIZES, RATIOS, TORCHVISION)(maps, canvas)), theirs)
    coarse = AnchorGrid(STRIDES, SIZES, RATIOS, MODERN)(maps, canvas)[1].view(13, 13, 6, 4)
    torch.testing.assert_close(coarse[1:, :, :, 1] - coarse[:-1, :, :, 1], torch.full((12, 13, 6), 64.0))


def test_by_anchor_has_the_order_of_the_anchors() -> None:
    anchors, values, height, width = 2, 3, 4, 5
    maps = torch.arange(2.0 * anchors * values * height * width).view(2, anchors * values, height, width)
    rows = by_anchor(maps, values).view(2, height, width, anchors, values)
    assert rows[1, 2, 3, 1].tolist() == maps[1, 3:6, 2, 3].tolist()


def test_anchors_are_not_in_the_state_dict() -> None:
    assert not AnchorGrid(STRIDES, SIZES, RATIOS, MODERN).state_dict()

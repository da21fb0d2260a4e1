from __future__ import annotations

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from boxwright.geometry.conventions import MODERN, TORCHVISION
from boxwright.heads.anchor_grid import AnchorGrid, by_anchor

STRIDES, SIZES, RATIOS = (32, 64), ((32.0, 40.0), (64.0, 80.0)), (0.5, 1.0, 2.0)


def test_torchvision_s_anchors_lie_by_the_canvas_and_ours_by_the_strides() -> None:
    # 800 pixels give 13 positions of P6, 61 pixels apart to torchvision, 64 in truth.
    canvas, maps = (800, 832), [torch.zeros(1, 2, 25, 26), torch.zeros(1, 2, 13, 13)]
    theirs = AnchorGenerator(SIZES, (RATIOS,) * 2)(ImageList(torch.zeros(1, 3, *canvas), [canvas]), maps)[0]
    assert torch.equal(torch.cat(AnchorGrid(STRIDES, SIZES, RATIOS, TORCHVISION)(maps, canvas)), theirs)
    coarse = AnchorGrid(STRIDES, SIZES, RATIOS, MODERN)(maps, canvas)[1].view(13, 13, 6, 4)
    assert torch.equal(coarse[1:, :, :, 1] - coarse[:-1, :, :, 1], torch.full((12, 13, 6), 64.0))


def test_values_stand_in_the_anchors_order() -> None:
    anchors, values, height, width = 2, 3, 4, 5
    maps = torch.arange(2.0 * anchors * values * height * width).view(2, anchors * values, height, width)
    rows = by_anchor(maps, values).view(2, height, width, anchors, values)
    assert rows[1, 2, 3, 1].tolist() == maps[1, 3:6, 2, 3].tolist()


def test_anchors_are_no_part_of_the_weights() -> None:
    assert not AnchorGrid(STRIDES, SIZES, RATIOS, MODERN).state_dict()

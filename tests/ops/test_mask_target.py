"""Mask targets agree with COCO's rasteriser and RoIAlign, and follow the placement of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.mask_targets import TARGET_SIZE, Candidate, cases, measure

from boxwright.data.collate import PlacedSample, collate
from boxwright.data.dataset import Sample
from boxwright.data.masks.mask_grid import FINER, GRID_SIZE
from boxwright.data.placement import Placement, place
from boxwright.geometry.affine import transform_boxes
from boxwright.ops.mask_target import mask_target
from boxwright.structures import MaskGrids

# NumPy 2 warns about arrays of pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BOXES = torch.tensor([[[8.0, 4.0, 44.0, 40.0], [12.0, 10.0, 30.0, 48.0], [5.0, 20.0, 41.5, 33.25]]])
MATCHED = torch.tensor([[0, 1, 1]])
VALID = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(("folder", "mean"), [("coco_mini", 0.99), ("nuclei", 0.998)])
def test_targets_of_public_data_sets_equal_targets_of_the_full_mask(data_dir: Path, folder: str, mean: float) -> None:
    ious, _ = measure(
        Candidate(GRID_SIZE, FINER, binary=False), cases(data_dir / folder, 2000, np.random.default_rng(0))
    )
    assert len(ious) > 3000
    assert ious.mean() >= mean


def sample() -> Sample:
    """An image of height 60 and width 50 with two objects: a star of two polygons, and a bitmap."""
    star = np.array([[10, 5], [28, 18], [42, 9], [33, 25], [40, 41], [22, 30]], np.float32)
    bitmap = np.random.default_rng(3).random((60, 50)) < 0.5
    bitmap[:, :6] = bitmap[:12] = False
    return Sample(
        image=np.zeros((60, 50, 3), np.uint8),
        image_id=1,
        file_name="a.png",
        boxes=np.array([[10, 5, 42, 41], [6, 12, 50, 60]], np.float32),
        labels=np.zeros(2, np.int64),
        crowd=np.zeros(2, bool),
        object_ids=np.arange(2),
        masks=[[star, star[:3] + [4, 30]], bitmap],
    )


def placed_target(placement: Placement, boxes: torch.Tensor) -> torch.Tensor:
    """Mask targets of boxes in pixels of the file, after placing image and boxes."""
    targets = collate([PlacedSample(sample(), placement, 0)], 1, (160, 160), 8, masks=True).targets
    assert targets.valid.sum() == 2
    placed_boxes = transform_boxes(boxes, torch.from_numpy(placement.matrix)[None])
    return mask_target(targets.masks, placed_boxes, MATCHED, VALID, output_size=TARGET_SIZE)


@pytest.mark.parametrize(
    ("placement", "flipped"),
    [
        (place((60, 50), (120, 100)), False),
        (place((60, 50), (90, 125)), False),
        (place((60, 50), (60, 50), flipped=True), True),
        (place((60, 50), (72, 60), flipped=True, window=(0, 3, 50, 57)), True),
        (place((60, 50), (120, 100), window=(6, 12, 80, 80)), False),
    ],
    ids=["scaled", "stretched", "flipped", "flipped and cropped", "cropped"],
)
def test_targets_do_not_depend_on_the_placement(placement: Placement, flipped: bool) -> None:
    expected = placed_target(place((60, 50), (60, 50)), BOXES)
    actual = placed_target(placement, BOXES)
    assert expected.any((2, 3)).all()
    assert not expected.all((2, 3)).any()
    # Cells whose centre is on an edge may differ by rounding.
    assert (actual == (expected.flip(3) if flipped else expected)).float().mean() > 0.999


def test_a_box_with_the_size_of_the_target_gives_the_pixels_of_the_bitmap() -> None:
    bitmap = sample().masks[1]
    masks = collate([PlacedSample(sample(), place((60, 50), (60, 50)), 0)], 1, (64, 64), 8, masks=True).targets.masks
    boxes = torch.tensor([[[14.0, 20.0, 42.0, 48.0]]])
    target = mask_target(masks, boxes, torch.ones(1, 1, dtype=torch.int64), VALID[:, :1], output_size=28)
    np.testing.assert_array_equal(target[0, 0], bitmap[20:48, 14:42])


def test_cells_outside_the_mask_frame_are_false() -> None:
    masks = MaskGrids(
        bitmaps=torch.full((1, 2, 8, 8), 255, dtype=torch.uint8),
        frames=torch.tensor([[[10.0, 10.0, 20.0, 30.0], [0.0, 0.0, 4.0, 4.0]]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    boxes = torch.tensor([[[10.0, 10.0, 20.0, 30.0], [20.0, 30.0, 60.0, 60.0], [0.0, 10.0, 20.0, 30.0]]])
    target = mask_target(masks, boxes, torch.zeros(1, 3, dtype=torch.int64), VALID, output_size=4)
    assert target[0, 0].all()
    assert not target[0, 1].any()
    assert target[0, 2].tolist() == [[False, False, True, True]] * 4


def test_contents_of_invalid_slots_are_ignored() -> None:
    masks = MaskGrids(
        bitmaps=torch.full((1, 8, 8, 8), 200, dtype=torch.uint8),
        frames=torch.full((1, 8, 4), torch.nan),
        valid=torch.zeros(1, 8, dtype=torch.bool),
    )
    boxes = torch.full((1, 3, 4), torch.inf)
    assert not mask_target(masks, boxes, MATCHED, torch.zeros_like(VALID), output_size=28).any()


def test_plus_one_extends_boxes_by_a_pixel() -> None:
    masks = collate([PlacedSample(sample(), place((60, 50), (60, 50)), 0)], 1, (64, 64), 8, masks=True).targets.masks
    wider = BOXES + torch.tensor([0.0, 0.0, 1.0, 1.0])
    actual = mask_target(masks, BOXES, MATCHED, VALID, output_size=28, plus_one=1.0)
    assert torch.equal(actual, mask_target(masks, wider, MATCHED, VALID, output_size=28))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(actual, mask_target(masks, wider, MATCHED, VALID, output_size=28))

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from boxwright.geometry.anchors import base_anchors, grid_anchors, octave_sizes

SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)


# 100 x 140 is not divisible by the strides, so that torchvision's strides are not powers of two.
@pytest.mark.parametrize(("height", "width"), [(128, 192), (100, 140)])
def test_grid_anchors_equal_torchvision(height: int, width: int) -> None:
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
    theirs = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * 5)(
        ImageList(torch.zeros(1, 3, height, width), [(height, width)]), [torch.zeros(1, 1, *shape) for shape in shapes]
    )[0]
    strides = [(height // rows, width // columns) for rows, columns in shapes]
    ours = grid_anchors(shapes, strides, [base_anchors([size], RATIOS, "torchvision") for size in SIZES])
    assert torch.equal(torch.cat(ours), theirs)


def test_several_sizes_per_level_equal_torchvision() -> None:
    theirs = AnchorGenerator(((32, 40, 50),), (RATIOS,)).cell_anchors[0]
    assert torch.equal(base_anchors((32, 40, 50), RATIOS, "torchvision"), theirs)


def test_unrounded_anchors_keep_area_and_ratio() -> None:
    boxes = base_anchors((32, 48), RATIOS)
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(-1)
    torch.testing.assert_close((width * height).view(3, 2), torch.tensor([32.0**2, 48.0**2]).expand(3, 2))
    torch.testing.assert_close((height / width).view(3, 2), torch.tensor(RATIOS)[:, None].expand(3, 2))
    assert torch.equal(boxes[:, :2], -boxes[:, 2:])


def test_detectron_rounding_equals_a_calculation_by_hand() -> None:
    # P2: 45.25 x 22.63, 32 x 32 and 22.63 x 45.25 pixels, centred on (1.5, 1.5).
    boxes = base_anchors([32], RATIOS, "detectron", stride=4)
    assert boxes.tolist() == [[-21, -9, 24, 12], [-14, -14, 17, 17], [-9, -21, 12, 24]]


def test_cell_rounding_equals_the_published_anchors_of_faster_rcnn() -> None:
    """The table in the original Faster R-CNN code, whose pixel coordinates start at 1, and one anchor by hand."""
    published = [
        [-83, -39, 100, 56], [-175, -87, 192, 104], [-359, -183, 376, 200],
        [-55, -55, 72, 72], [-119, -119, 136, 136], [-247, -247, 264, 264],
        [-35, -79, 52, 96], [-79, -167, 96, 184], [-167, -343, 184, 360],
    ]  # fmt: skip
    assert base_anchors([128, 256, 512], RATIOS, "cell", stride=16).add(1).tolist() == published
    # A 4 x 4 cell at ratio 0.5 is rounded to 6 x 3 and scaled by 8 to 48 x 24 pixels, including the last pixel.
    assert base_anchors([32], [0.5], "cell", stride=4).tolist() == [[-22, -10, 25, 13]]


def test_detectron_rounding_requires_a_stride() -> None:
    with pytest.raises(ValueError, match="stride"):
        base_anchors([32], RATIOS, "detectron")


def test_the_anchor_varies_fastest_then_x_then_y() -> None:
    base = base_anchors([32], RATIOS)
    (level,) = grid_anchors([(2, 3)], [16], [base])
    assert torch.equal(level[:3], base)
    assert torch.equal(level[3:6], base + torch.tensor([16, 0, 16, 0]))
    assert torch.equal(level[9:12], base + torch.tensor([0, 16, 0, 16]))


def test_grid_anchors_compile_to_one_graph_and_run_on_fake_tensors() -> None:
    base = [base_anchors([32], RATIOS), base_anchors([64], RATIOS)]
    shapes, strides = [(4, 6), (2, 3)], [8, 16]
    compiled = torch.compile(grid_anchors, fullgraph=True, backend="aot_eager")(shapes, strides, base)
    for ours, theirs in zip(grid_anchors(shapes, strides, base), compiled, strict=True):
        assert torch.equal(ours, theirs)
    with FakeTensorMode() as mode:
        fake = grid_anchors(shapes, strides, [mode.from_tensor(boxes) for boxes in base])
    assert [level.shape for level in fake] == [(72, 4), (18, 4)]


def test_octave_sizes_are_even_in_log_scale() -> None:
    assert octave_sizes(32, 3) == pytest.approx([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)])
    assert octave_sizes(32, 3, "torchvision") == [32, 40, 50]
    assert octave_sizes(64, 1) == [64]

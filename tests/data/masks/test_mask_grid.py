"""Mask grids agree with COCO's rasteriser for polygons, bitmaps and run lengths."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.masks.mask_grid import GRID_SIZE, mask_grid

# NumPy 2 warns about arrays of pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (120, 160)
SQUARE = np.array([[20, 30], [60, 30], [60, 90], [20, 90]], np.float32)
TRIANGLE = np.array([[50.5, 40], [100.25, 100], [40, 80.75]], np.float32)


def runs_of(bitmap: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))["counts"]


def covered_area(grid: tuple[np.ndarray, np.ndarray]) -> float:
    bitmap, (x1, y1, x2, y2) = grid
    return float(bitmap.mean() / 255 * (x2 - x1) * (y2 - y1))


def test_the_frame_of_a_polygon_is_its_bounding_box() -> None:
    bitmap, frame = mask_grid([SQUARE], SIZE)
    assert bitmap.shape == (GRID_SIZE, GRID_SIZE)
    assert bitmap.dtype == np.uint8
    assert frame.tolist() == [20, 30, 60, 90]
    assert (bitmap == 255).all()


def test_several_polygons_are_merged_to_their_union() -> None:
    """Expected area: square (2400) plus triangle (shoelace formula), minus their overlap (from a fine raster)."""
    edges = np.roll(TRIANGLE, -1, 0)
    triangle = abs(float((TRIANGLE[:, 0] * edges[:, 1] - TRIANGLE[:, 1] * edges[:, 0]).sum())) / 2
    fine = [
        coco_mask.decode(coco_mask.frPyObjects([(polygon * 8).ravel().tolist()], 960, 1280)[0]).astype(bool)
        for polygon in (SQUARE, TRIANGLE)
    ]
    overlap = (fine[0] & fine[1]).sum() / 64
    assert overlap > 100
    assert covered_area(mask_grid([SQUARE, TRIANGLE], SIZE)) == pytest.approx(2400 + triangle - overlap, rel=0.01)


@pytest.mark.parametrize("num_pixels", [3, 10, GRID_SIZE])
def test_small_bitmaps_are_copied_pixel_by_pixel(num_pixels: int) -> None:
    bitmap = np.zeros((200, 150), bool)
    block = np.random.default_rng(0).random((num_pixels, num_pixels)) < 0.6
    block[0, 0] = block[-1, -1] = True
    bitmap[40 : 40 + num_pixels, 7 : 7 + num_pixels] = block
    grid, frame = mask_grid(bitmap, bitmap.shape)
    assert frame.tolist() == [7, 40, 7 + GRID_SIZE, 40 + GRID_SIZE]
    np.testing.assert_array_equal(grid[:num_pixels, :num_pixels], 255 * block)
    assert grid[num_pixels:].sum() == grid[:, num_pixels:].sum() == 0


def test_large_bitmaps_are_averaged() -> None:
    bitmap = np.zeros((400, 500), bool)
    bitmap[50:350, 100:110] = True
    bitmap[50:60, 100:480] = True
    grid, frame = mask_grid(bitmap, bitmap.shape)
    assert frame.tolist() == [100, 50, 480, 350]
    assert covered_area((grid, frame)) == pytest.approx(bitmap.sum(), rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_give_the_grid_of_their_bitmap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 300, 2).tolist()
    bitmap = np.zeros((height, width), bool)
    top, left = rng.integers(0, height), rng.integers(0, width)
    part = bitmap[top : top + 150, left : left + 150]
    part[:] = rng.random(part.shape) < 0.5
    part[0, 0] = True
    from_runs, from_bitmap = (mask_grid(mask, bitmap.shape) for mask in (runs_of(bitmap), bitmap))
    for actual, expected in zip(from_runs, from_bitmap, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_run_lengths_that_reach_all_edges_have_the_image_as_frame() -> None:
    size = (160, 240)
    for mask in (np.ones(size, bool), np.pad(np.zeros((158, 238), bool), 1, constant_values=True)):
        _, frame = mask_grid(runs_of(mask), size)
        assert frame.tolist() == [0, 0, 240, 160]


@pytest.mark.parametrize(
    "mask",
    [
        None,
        [],
        [SQUARE[:2]],
        [np.full((4, 2), 7.0)],
        [SQUARE + 500],
        np.zeros(SIZE, bool),
        runs_of(np.zeros(SIZE, bool)),
    ],
)
def test_an_empty_mask_has_no_grid(mask: object) -> None:
    assert mask_grid(mask, SIZE) is None


def test_a_polygon_far_beyond_the_image_is_clipped_and_fast() -> None:
    start = time.monotonic()
    bitmap, frame = mask_grid([np.array([[-1e30, 20], [1e30, 20], [1e30, 50], [-1e30, 50]])], SIZE)
    assert time.monotonic() - start < 1
    assert frame.tolist() == [0, 20, 160, 50]
    assert (bitmap == 255).all()


def test_a_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected the shape .* got \(3, 4\)"):
        mask_grid(np.ones((3, 4), bool), SIZE)
    with pytest.raises(ValueError, match=r"expected runs of 120 x 160 = 19200 pixels in total .*, got 12"):
        mask_grid(runs_of(np.ones((3, 4), bool)), SIZE)


@pytest.mark.parametrize(("folder", "num_checked"), [("coco_mini", 200), ("nuclei", 200)])
def test_real_masks_keep_their_area(data_dir: Path, folder: str, num_checked: int) -> None:
    dataset = IndexedDataset(*find_layout(data_dir / folder)["val"])
    index = dataset.index
    assert dataset.num_masks == index.has_mask.sum() > num_checked
    rows = np.flatnonzero(index.has_mask)
    images = np.searchsorted(index.object_offsets, rows, side="right") - 1
    ratios = []
    for row, image in list(zip(rows.tolist(), images.tolist(), strict=True))[:num_checked]:
        height, width = index.image_sizes[image].tolist()
        mask = index.mask(row)
        if isinstance(mask, bytes):
            area = float(coco_mask.area({"size": [height, width], "counts": mask}))
        else:  # COCO's `area` is the area of the polygons, within a pixel
            area = float(index.areas[row])
        ratios.append(covered_area(mask_grid(mask, (height, width))) / area)
    assert np.median(np.abs(np.array(ratios) - 1)) < 0.005

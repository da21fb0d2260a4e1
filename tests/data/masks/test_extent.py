"""Extreme points of a mask have the bounding box of the mask under any affine map."""

from __future__ import annotations

import numpy as np
import pytest

from boxwright.data.masks.extent import extreme_points
from boxwright.data.masks.rle import compress


def corners_of(bitmap: np.ndarray) -> np.ndarray:
    """All four corners of all pixels."""
    rows, columns = np.nonzero(bitmap)
    return np.concatenate([np.column_stack([columns + x, rows + y]) for x in (0, 1) for y in (0, 1)])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("form", ["bitmap", "runs"])
def test_points_of_pixels_have_the_bounding_box_of_all_pixel_corners(seed: int, form: str) -> None:
    rng = np.random.default_rng(seed)
    bitmap = rng.random((rng.integers(1, 30), rng.integers(1, 30))) < rng.choice([0.02, 0.5, 1])
    bitmap.flat[rng.integers(bitmap.size)] = True
    flat = bitmap.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0] * (1 + bool(flat[0])), ends, [flat.size]]))
    points = extreme_points(bitmap if form == "bitmap" else compress(runs), bitmap.shape)
    assert len(points) <= 4 * bitmap.shape[1]
    linear = rng.normal(size=(2, 2))
    mapped, expected = points @ linear.T, corners_of(bitmap) @ linear.T
    np.testing.assert_allclose(mapped.min(0), expected.min(0))
    np.testing.assert_allclose(mapped.max(0), expected.max(0))


def test_points_of_polygons_are_their_vertices_without_lines() -> None:
    polygons = [np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7.5, 8], [5, 9]]), np.array([[0, 0], [1, 0], [0, 1]])]
    np.testing.assert_array_equal(extreme_points(polygons, (9, 9)), [[5, 6], [7.5, 8], [5, 9], [0, 0], [1, 0], [0, 1]])


@pytest.mark.parametrize("mask", [None, [], [np.zeros((2, 2))], np.zeros((9, 9), bool), compress([81])])
def test_empty_masks_have_no_points(mask: object) -> None:
    assert extreme_points(mask, (9, 9)).shape == (0, 2)


def test_a_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected the shape \(9, 9\) of the image, got \(3, 4\)"):
        extreme_points(np.ones((3, 4), bool), (9, 9))
    with pytest.raises(ValueError, match=r"expected runs of 9 x 9 = 81 pixels in total .*, got 12"):
        extreme_points(compress([12]), (9, 9))

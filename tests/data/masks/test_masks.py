"""`Masks` decodes run lengths to the original pixels."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from boxwright.data.masks import Masks


def encoded(pixels: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"]


@pytest.mark.parametrize("seed", range(8))
def test_pixels_and_regions_equal_the_encoded_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    pixels = rng.random((height, width)) < (0, 0.02, 0.5, 1)[seed % 4]
    masks = Masks.of([encoded(pixels)], (height, width))
    np.testing.assert_array_equal(masks[0], pixels)
    x, y, region = masks.region(0)
    rebuilt = np.zeros_like(pixels)
    rebuilt[y : y + region.shape[0], x : x + region.shape[1]] = region
    np.testing.assert_array_equal(rebuilt, pixels)
    if pixels.any():
        assert region[0].any()
        assert region[-1].any()
        assert region[:, 0].any()
        assert region[:, -1].any()
    else:
        assert region.shape == (0, 0)


def test_select_keeps_the_size_of_each_mask() -> None:
    first, second = np.eye(4, dtype=bool), np.ones((2, 3), bool)
    masks = Masks.of([encoded(first), encoded(second)], [(4, 4), (2, 3)])
    assert [mask.shape for mask in masks] == [(4, 4), (2, 3)]
    assert masks.select(np.array([1])).to_coco() == [{"size": [2, 3], "counts": encoded(second).decode()}]
    np.testing.assert_array_equal(masks.select(np.array([True, False]))[0], first)
    assert len(Masks.of([], (4, 4)).select(np.zeros(0, bool))) == 0

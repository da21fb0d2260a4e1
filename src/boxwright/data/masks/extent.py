"""Extreme points of object masks, from which their bounding box under any affine map is computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Mask
from boxwright.data.masks.rle import crop_columns


def extreme_points(mask: Mask, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Points of a mask that have the same convex hull as the mask.

    Under any affine map, the bounding box of these points is the bounding box of the mask.

    Args:
        mask: Mask in any form that a `Sample` may contain.
        image_size: (height, width) of the image.

    Returns:
        [K, 2] float64 (x, y) in continuous pixel coordinates: vertices of polygons or corners of pixels. K is 0 for an
        empty mask.

    Raises:
        ValueError: The mask does not have the size of the image.
    """
    if mask is None:
        return np.zeros((0, 2))
    if isinstance(mask, bytes):
        pixels, left, top = crop_columns(mask, image_size)
    elif isinstance(mask, np.ndarray):
        if mask.shape != image_size:
            raise ValueError(f"expected the shape {image_size} of the image, got {mask.shape}")
        pixels, left, top = mask.astype(np.uint8), 0, 0
    else:
        polygons = [np.asarray(polygon, np.float64) for polygon in mask if len(polygon) >= 3]
        return np.concatenate(polygons) if polygons else np.zeros((0, 2))
    columns = np.flatnonzero(pixels.any(0))
    first = pixels[:, columns].argmax(0)
    last = len(pixels) - pixels[::-1, columns].argmax(0)
    x, y = np.concatenate([columns, columns]) + left, np.concatenate([first, last]) + top
    return np.concatenate([np.column_stack([x, y]), np.column_stack([x + 1, y])]).astype(np.float64)

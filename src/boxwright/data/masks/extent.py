"""The extent of object masks: where their outermost points lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Mask
from boxwright.data.masks.rle import crop_columns


def extreme_points(mask: Mask, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Points with the convex hull of a mask. The smallest box around them, under any affine map, is that of the mask.

    Args:
        mask: In any form that a `Sample` may hold.
        image_size: (height, width) of the image.

    Returns:
        [K, 2] float64 (x, y) in continuous pixel coordinates: vertices of polygons, corners of pixels; K is 0 if the
        mask covers nothing.

    Raises:
        ValueError: The mask is not of the image's size.
    """
    if mask is None:
        return np.zeros((0, 2))
    if isinstance(mask, bytes):
        pixels, left, top = crop_columns(mask, image_size)
    elif isinstance(mask, np.ndarray):
        if mask.shape != image_size:
            raise ValueError(f"its shape is {mask.shape}, that of the picture {image_size}: make both the same")
        pixels, left, top = mask.astype(np.uint8), 0, 0
    else:
        polygons = [np.asarray(polygon, np.float64) for polygon in mask if len(polygon) >= 3]
        return np.concatenate(polygons) if polygons else np.zeros((0, 2))
    columns = np.flatnonzero(pixels.any(0))
    first = pixels[:, columns].argmax(0)
    last = len(pixels) - pixels[::-1, columns].argmax(0)
    x, y = np.concatenate([columns, columns]) + left, np.concatenate([first, last]) + top
    return np.concatenate([np.column_stack([x, y]), np.column_stack([x + 1, y])]).astype(np.float64)

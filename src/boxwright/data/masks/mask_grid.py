"""Object masks as grids of one size, so that the shapes in a batch do not depend on the sizes of images.

A grid has M x M cells. Each cell stores the fraction of its area that the object covers. The frame is the box that the
grid spans in the image. Scaling and translating an image move the frame, a horizontal flip mirrors the grid, and any
other affine map resamples the grid on a new frame. `docs/benchmarks/mask_targets.md` measures which M, and which cell
values (covered fraction or binary), are closest to COCO's rasteriser at the resolution of mask targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Mask
from boxwright.data.masks.extent import extreme_points
from boxwright.data.masks.rle import crop_columns

GRID_SIZE = 128
"""Default number of cells per side, M."""
FINER = 4
"""Supersampling factor: polygons are drawn at this multiple of the grid's resolution, then averaged over the cells."""
# COCO's rasteriser walks along every edge pixel by pixel, which takes hours for a vertex at 1e9. So vertices are
# clipped to this many grid sides from the grid.
_MAX_DISTANCE = 16.0

Grid = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""[M, M] uint8, covered fraction of each cell times 255, and [4] float32, the frame as xyxy in pixels of the file."""


def mask_grid(mask: Mask, image_size: tuple[int, int], *, size: int = GRID_SIZE, finer: int = FINER) -> Grid | None:
    """Convert the mask of an object to a grid.

    The frame of polygons is their bounding box, clipped to the image; several polygons are merged to their union. A
    bitmap or run lengths whose covered region has at most M pixels per side are copied pixel by pixel, without loss.
    Larger regions are averaged over the cells.

    Args:
        mask: Mask in pixels of the file, in any form that a `Sample` may contain.
        image_size: (height, width) of the file.
        size: M.
        finer: See `FINER`.

    Returns:
        The grid, or None for an empty mask.

    Raises:
        ValueError: The mask does not have the size of the image, or the run lengths are invalid.
    """
    if mask is None:
        return None
    if isinstance(mask, bytes):
        return _pixel_grid(*crop_columns(mask, image_size), size)
    if isinstance(mask, np.ndarray):
        if mask.shape != image_size:
            raise ValueError(f"expected the shape {image_size} of the image, got {mask.shape}")
        return _pixel_grid(mask.astype(np.uint8), 0, 0, size)
    return _polygon_grid(mask, image_size, size, finer)


def warp_grid(grid: Grid, matrix: NDArray[np.floating], *, finer: int = FINER) -> Grid:
    """Apply an affine map to a grid: resample it on the bounding box of the mapped object.

    Args:
        grid: Grid of a mask that is not empty.
        matrix: [2, 3], from continuous pixel coordinates of the file to continuous pixel coordinates of the canvas.
        finer: Supersampling factor of the new grid, see `FINER`.

    Returns:
        The grid. Its frame is in pixels of the canvas, and is not clipped.
    """
    bitmap, frame = grid
    size = len(bitmap)
    low, high = frame[:2].astype(np.float64), frame[2:].astype(np.float64)
    linear, offset = matrix[:, :2].astype(np.float64), matrix[:, 2].astype(np.float64)
    # From cells of the grid to pixels of the canvas.
    cell_linear, cell_offset = linear * ((high - low) / size), linear @ low + offset
    points = extreme_points(bitmap > 0, (size, size)) @ cell_linear.T + cell_offset
    new_low, new_high = points.min(0), points.max(0)
    fine = size * finer
    scale = fine / (new_high - new_low)
    to_fine, start = cell_linear * scale[:, None], (cell_offset - new_low) * scale
    # In OpenCV's coordinates the centre of the first cell is 0, not 0.5.
    start = start + to_fine.sum(1) / 2 - 0.5
    warped = cv2.warpAffine(bitmap, np.column_stack([to_fine, start]), (fine, fine), flags=cv2.INTER_LINEAR)
    return _average(np.asarray(warped, np.uint8), size), np.concatenate([new_low, new_high]).astype(np.float32)


def _polygon_grid(
    polygons: Sequence[NDArray[np.floating]], image_size: tuple[int, int], size: int, finer: int
) -> Grid | None:
    polygons = [polygon for polygon in polygons if len(polygon) >= 3]
    if not polygons:
        return None
    points = np.concatenate(polygons).astype(np.float64)
    low, high = points.min(0).clip(min=0), points.max(0).clip(max=image_size[::-1])
    if not (low < high).all():
        return None
    fine = size * finer
    scaled = [
        ((polygon - low) * (fine / (high - low))).clip(-_MAX_DISTANCE * fine, _MAX_DISTANCE * fine)
        for polygon in polygons
    ]
    import hotcoco.mask  # imported here, so that training without masks does not need hotcoco

    runs = hotcoco.mask.frPyObjects([polygon.ravel().tolist() for polygon in scaled], fine, fine)
    # hotcoco decodes in column-major order, so the transpose is contiguous and OpenCV reads it without a copy.
    columns = hotcoco.mask.decode(hotcoco.mask.merge(runs)).T
    bitmap = np.ascontiguousarray(_average(255 * columns, size).T)
    return (bitmap, np.concatenate([low, high]).astype(np.float32)) if bitmap.any() else None


def _pixel_grid(pixels: NDArray[np.uint8], left: int, top: int, size: int) -> Grid | None:
    """Grid of uint8 pixels, 0 or 1. The first pixel is at (left, top) in the file."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return None
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = pixels.shape
    bitmap = np.zeros((max(height, size), max(width, size)), np.uint8)
    bitmap[:height, :width] = 255 * pixels
    corner = np.array([left + columns[0], top + rows[0]])
    frame = np.concatenate([corner, corner + bitmap.shape[::-1]]).astype(np.float32)
    return _average(bitmap, size), frame


def _average(bitmap: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(bitmap, (size, size), interpolation=cv2.INTER_AREA), np.uint8)

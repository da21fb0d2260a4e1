"""Placement of an image on its canvas by one affine map, which is applied to pixels, boxes and masks.

Boxes and matrices are in continuous pixel coordinates: the pixel in row 0 and column 0 spans 0..1. Sizes are (height,
width). n objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch

from boxwright.data.dataset import Mask
from boxwright.data.masks.extent import extreme_points
from boxwright.data.masks.mask_grid import Grid, warp_grid
from boxwright.geometry.affine import transform_boxes

MIN_VISIBLE = 0.1
"""An object is dropped if a crop leaves less than this fraction of the area of its box."""
_TOLERANCE = 0.01
"""Displacements below this many pixels count as rounding errors; a float32 matrix displaces 65,535 pixels by 0.004."""
_MAX_WARPED_SIDE = 2**15 - 2
"""Maximum side that OpenCV 4 can warp."""


class ResizeSteps(NamedTuple):
    """A placement as a resize of the whole image, an optional flip, and a crop to a window."""

    size: tuple[int, int]
    """(height, width) of the whole image after the resize."""
    flipped: bool
    """Whether the image is flipped horizontally after the resize."""
    top: int
    """First row of the window."""
    left: int
    """First column of the window, counted after the flip."""


@dataclass(frozen=True)
class Placement:
    """Placement of an image on its canvas; create one with `place` or `place_affine`.

    `matrix` maps pixels, boxes and masks to the canvas; its inverse maps detections back to the file.
    """

    original: tuple[int, int]
    """(height, width) of the image in its file."""
    size: tuple[int, int]
    """(height, width) of the visible part of the canvas, which starts at the upper left corner."""
    matrix: np.ndarray
    """float32 [2, 3], from continuous pixel coordinates of the file to continuous pixel coordinates of the canvas."""
    resize_steps: ResizeSteps | None
    """The same map as a resize, flip and crop, which is faster than a warp; None if these steps cannot express it."""

    @property
    def flipped(self) -> bool:
        """Whether the map mirrors the image."""
        (a, b, _), (d, e, _) = self.matrix.tolist()
        return a * e - b * d < 0

    @property
    def keeps_boxes(self) -> bool:
        """Whether axis-aligned boxes stay axis-aligned: no shear, and only rotations by multiples of 90 degrees."""
        if self.resize_steps is not None:
            return True
        (a, b, _), (d, e, _) = self.matrix.tolist()
        height, width = self.original
        diagonal, other = max(abs(a) * width, abs(e) * height), max(abs(b) * height, abs(d) * width)
        return min(diagonal, other) < _TOLERANCE

    @property
    def cropped(self) -> bool:
        """Whether a part of the image is outside the visible part of the canvas."""
        if self.resize_steps is not None:
            return self.size != self.resize_steps.size
        height, width = self.original
        return any(
            min(0, x * width) + min(0, y * height) + offset < -_TOLERANCE
            or max(0, x * width) + max(0, y * height) + offset > limit + _TOLERANCE
            for (x, y, offset), limit in zip(self.matrix.tolist(), self.size[::-1], strict=True)
        )


def place(
    original: tuple[int, int],
    resized: tuple[int, int],
    *,
    flipped: bool = False,
    window: tuple[int, int, int, int] | None = None,
) -> Placement:
    """Resize an image, optionally flip it horizontally, and crop it.

    Args:
        original: (height, width) of the image in its file.
        resized: (height, width) after the resize.
        flipped: Whether to flip the resized image horizontally.
        window: Crop as (top, left, height, width), in pixels after resize and flip; None for no crop.
    """
    top, left, height, width = window or (0, 0, *resized)
    scale_y, scale_x = resized[0] / original[0], resized[1] / original[1]
    row_x = [-scale_x, 0.0, resized[1] - left] if flipped else [scale_x, 0.0, -left]
    matrix = np.array([row_x, [0.0, scale_y, -top]], dtype=np.float32)
    return Placement(original, (height, width), matrix, ResizeSteps(resized, flipped, top, left))


def place_affine(original: tuple[int, int], matrix: np.ndarray, size: tuple[int, int]) -> Placement:
    """Place an image by any affine map: scale, rotation, shear and translation.

    Args:
        original: (height, width) of the image in its file.
        matrix: [2, 3], from continuous pixel coordinates of the file to continuous pixel coordinates of the canvas. For
            example, `[[0, -1, height], [1, 0, 0]]` is a rotation by 90 degrees clockwise.
        size: (height, width) of the visible part of the canvas, at least 1.

    Raises:
        ValueError: `size` is below 1, or the matrix is not 2 x 3, not finite, or maps the image to a line.
    """
    if min(size) < 1:
        raise ValueError(f"size: expected height and width of at least 1, got {tuple(size)}")
    values = np.asarray(matrix, np.float32)
    if values.shape != (2, 3) or not np.isfinite(values).all():
        raise ValueError(f"matrix: expected 2 x 3 finite numbers, got {np.asarray(matrix).tolist()}")
    if abs(np.linalg.det(values[:, :2].astype(np.float64))) * original[0] * original[1] < _TOLERANCE:
        raise ValueError(f"matrix: expected an invertible map, got {values.tolist()}, which maps the image to a line")
    return Placement(original, size, values, _resize_steps(original, values, size))


def place_image(image: np.ndarray, placement: Placement, canvas: np.ndarray) -> None:
    """Write the visible pixels of an image to the upper left corner of a canvas.

    Interpolation is bilinear without antialiasing, as in mmdetection 0.5.

    Args:
        image: uint8 [H, W, 3], of size `placement.original`.
        placement: Placement of the image.
        canvas: uint8 [height, width, 3], at least of size `placement.size`. Pixels outside that size are unchanged.
            Pixels inside it that the image does not cover become black.
    """
    height, width = placement.size
    visible, steps = canvas[:height, :width], placement.resize_steps
    if steps is None:
        visible[:] = _warp(image, placement.matrix, placement.size)
        return
    resized = steps.size[::-1]
    if placement.size == steps.size:
        # OpenCV writes directly to the canvas. A resize takes a fifth of the time of a warp. Flipping after the resize
        # makes the flipped image the exact mirror image of the unflipped one.
        cv2.resize(image, resized, dst=visible, interpolation=cv2.INTER_LINEAR)
        if steps.flipped:
            cv2.flip(visible, 1, dst=visible)
        return
    # Resizing the whole image and cropping it is faster than a warp to the window, except for extreme scale jitter.
    whole = cv2.resize(image, resized, interpolation=cv2.INTER_LINEAR)
    top, left = steps.top, steps.left
    if steps.flipped:
        left = resized[0] - left - width
        cv2.flip(whole[top : top + height, left : left + width], 1, dst=visible)
    else:
        visible[:] = whole[top : top + height, left : left + width]


def place_boxes(
    boxes: np.ndarray,
    placement: Placement,
    min_visible: float = MIN_VISIBLE,
    masks: Sequence[Mask] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Map boxes to the canvas, and clip them to its visible part.

    A mapped box is the bounding box of the four mapped corners. Under rotation and shear this box is larger than the
    object. So an object with a mask gets the bounding box of its mapped mask, which is never larger.

    Args:
        boxes: float32 [n, 4] xyxy in pixels of the file.
        placement: Placement of the image.
        min_visible: Minimum fraction of the area of a box that must be visible if the placement crops the image.
        masks: Masks of the n objects, or None. Unused if the placement keeps boxes axis-aligned.

    Returns:
        float32 [n, 4] xyxy in pixels of the canvas, and bool [n], whether to keep the object: False if the clipped box
        has no area, or if a crop leaves less than `min_visible` of the box.

    Raises:
        ValueError: A mask does not have the size of the image.
    """
    height, width = placement.size
    full = transform_boxes(torch.tensor(boxes)[None], torch.tensor(placement.matrix)[None])[0].numpy()
    if masks is not None and not placement.keeps_boxes:
        full = np.array([_tight_box(box, mask, placement) for box, mask in zip(full, masks, strict=True)], np.float32)
        full = full.reshape(-1, 4)
    visible = full.clip(0, np.array([width, height, width, height], np.float32))
    area = _areas(visible)
    min_area = min_visible * _areas(full) if placement.cropped else 0.0
    return visible, (area > 0) & (area >= min_area)


def place_mask(grid: Grid, placement: Placement) -> Grid:
    """Map a mask grid to the canvas; its frame is not clipped.

    Scaling and translation only move the frame. A horizontal flip also mirrors the grid. Any other map resamples the
    grid on a new frame.
    """
    (a, b, _), (_, e, _) = placement.matrix.tolist()
    if not placement.keeps_boxes or abs(a) < abs(b) or e < 0:
        return warp_grid(grid, placement.matrix)
    bitmap, frame = grid
    placed = transform_boxes(torch.tensor(frame)[None, None], torch.tensor(placement.matrix)[None])[0, 0].numpy()
    return bitmap[:, ::-1] if placement.flipped else bitmap, placed


def _resize_steps(original: tuple[int, int], matrix: np.ndarray, size: tuple[int, int]) -> ResizeSteps | None:
    (a, b, c), (d, e, f) = matrix.tolist()
    height, width = original
    resized = round(e * height), round(abs(a) * width)
    top, left = -f, (resized[1] - c if a < 0 else -c)
    start = round(top), round(left)
    shear = b * height, d * width
    rounding = e * height - resized[0], abs(a) * width - resized[1], top - start[0], left - start[1]
    exact = max(map(abs, shear + rounding)) < _TOLERANCE
    inside = all(first >= 0 and first + side <= whole for first, side, whole in zip(start, size, resized, strict=True))
    return ResizeSteps(resized, a < 0, *start) if exact and inside and min(resized) > 0 else None


def _warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Apply an affine map to an image. Returns uint8 [*size, 3]."""
    height, width = image.shape[:2]
    linear, offset = matrix[:, :2].astype(np.float64), matrix[:, 2].astype(np.float64)
    if max(height, width) > _MAX_WARPED_SIDE:
        shrunk = min(width, _MAX_WARPED_SIDE), min(height, _MAX_WARPED_SIDE)
        image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
        linear = linear * (width / shrunk[0], height / shrunk[1])
    # In OpenCV's coordinates the centre of the first pixel is 0, not 0.5.
    offset = offset + linear.sum(1) / 2 - 0.5
    return cv2.warpAffine(image, np.column_stack([linear, offset]), size[::-1], flags=cv2.INTER_LINEAR)


def _tight_box(loose: np.ndarray, mask: Mask, placement: Placement) -> np.ndarray:
    """Bounding box of a mapped mask, clipped to the loose box; the loose box if the mask is empty or outside it."""
    points = extreme_points(mask, placement.original)
    if not len(points):
        return loose
    mapped = points @ placement.matrix[:, :2].T.astype(np.float64) + placement.matrix[:, 2]
    low, high = mapped.min(0).clip(min=loose[:2]), mapped.max(0).clip(max=loose[2:])
    return np.concatenate([low, high]) if (low < high).all() else loose


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

"""Where an image lies on its canvas: one affine map that pixels, boxes and masks follow.

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
"""An object is dropped if a crop leaves less than this share of the area of its box."""
_TOLERANCE = 0.01
"""Displacements under this many pixels are rounding: float32 matrices displace a side of 65,535 pixels by 0.004."""
_MAX_WARPED_SIDE = 2**15 - 2
"""OpenCV 4 cannot warp longer sides."""


class ResizeSteps(NamedTuple):
    """A placement as a resize of the whole image, an optional flip, and a window of the result."""

    size: tuple[int, int]
    """(height, width) of the whole image after the resize."""
    flipped: bool
    """Whether left and right are swapped after the resize."""
    top: int
    """First row of the window."""
    left: int
    """First column of the window, in the flipped image."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies on its canvas. Pixels, boxes and masks follow `matrix`, detections its inverse.

    Made by `place` and `place_affine`.
    """

    original: tuple[int, int]
    """(height, width) of the image in its file."""
    size: tuple[int, int]
    """(height, width) of the part of the canvas, from the upper left on, that shows the image."""
    matrix: np.ndarray
    """float32 [2, 3], from continuous pixel coordinates of the file to those of the canvas."""

    resize_steps: ResizeSteps | None
    """The same map as a resize, flip and window, which is faster; None if the matrix does anything else."""

    @property
    def flipped(self) -> bool:
        """Whether the map mirrors the image."""
        (a, b, _), (d, e, _) = self.matrix.tolist()
        return a * e - b * d < 0

    @property
    def keeps_boxes(self) -> bool:
        """Whether upright boxes stay upright: no rotation but by quarter turns, and no shear."""
        if self.resize_steps is not None:
            return True
        (a, b, _), (d, e, _) = self.matrix.tolist()
        height, width = self.original
        diagonal, other = max(abs(a) * width, abs(e) * height), max(abs(b) * height, abs(d) * width)
        return min(diagonal, other) < _TOLERANCE

    @property
    def cropped(self) -> bool:
        """Whether any part of the image is off the visible canvas."""
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
    """Resize an image, optionally swap left and right, and keep a window (top, left, height, width); None keeps all."""
    top, left, height, width = window or (0, 0, *resized)
    scale_y, scale_x = resized[0] / original[0], resized[1] / original[1]
    row_x = [-scale_x, 0.0, resized[1] - left] if flipped else [scale_x, 0.0, -left]
    matrix = np.array([row_x, [0.0, scale_y, -top]], dtype=np.float32)
    return Placement(original, (height, width), matrix, ResizeSteps(resized, flipped, top, left))


def place_affine(original: tuple[int, int], matrix: np.ndarray, size: tuple[int, int]) -> Placement:
    """Place an image by any affine map: scale, rotation, shear and translation.

    Args:
        original: (height, width) of the image in its file.
        matrix: [2, 3], from continuous pixel coordinates of the file to those of the canvas, such as
            `[[0, -1, height], [1, 0, 0]]` for a quarter turn clockwise.
        size: (height, width) of the result.

    Raises:
        ValueError: The matrix is not 2 x 3, not finite, or maps the image to a line.
    """
    values = np.asarray(matrix, np.float32)
    if values.shape != (2, 3) or not np.isfinite(values).all():
        raise ValueError(f"matrix: expected 2 x 3 finite numbers, got {np.asarray(matrix).tolist()}")
    if abs(np.linalg.det(values[:, :2].astype(np.float64))) * original[0] * original[1] < _TOLERANCE:
        raise ValueError(f"matrix: expected an invertible map, got {values.tolist()}, which maps the image to a line")
    return Placement(original, size, values, _resize_steps(original, values, size))


def place_image(image: np.ndarray, placement: Placement, canvas: np.ndarray) -> None:
    """Write the visible pixels into the upper left of a canvas: bilinear, not antialiased, as in mmdetection 0.5.

    Args:
        image: uint8 [H, W, 3] of the placement's original size.
        placement: The map.
        canvas: uint8 [height, width, 3], at least of the placement's size. Pixels beyond that size are left unchanged;
            pixels within it that the image does not cover become black.
    """
    height, width = placement.size
    visible, steps = canvas[:height, :width], placement.resize_steps
    if steps is None:
        visible[:] = _warp(image, placement.matrix, placement.size)
        return
    resized = steps.size[::-1]
    if placement.size == steps.size:
        # OpenCV writes directly into the canvas. A resize takes a fifth of the time of a warp, and flipping the result
        # in place keeps a flipped image the exact mirror image of the plain one.
        cv2.resize(image, resized, dst=visible, interpolation=cv2.INTER_LINEAR)
        if steps.flipped:
            cv2.flip(visible, 1, dst=visible)
        return
    # Resizing the whole image for a window of it is faster than a warp into the window at all but extreme jitter.
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
    """Boxes on the canvas, clipped to its visible part.

    A mapped box is the smallest upright box around the four mapped corners. Under rotation and shear that box is loose,
    so an object with a mask gets the smallest box around its mapped mask instead (never larger than the loose one).

    Args:
        boxes: float32 [n, 4] xyxy in pixels of the file.
        placement: Where the image lies.
        min_visible: Where the image is cropped, the least share of a box's area that must stay visible.
        masks: The n objects' masks, or None; not used where upright boxes stay upright.

    Returns:
        float32 [n, 4] xyxy in pixels of the canvas, and bool [n]: False if the clipped box has no area, or if a crop
        leaves too little of the box.

    Raises:
        ValueError: A mask is not of the image's size.
    """
    height, width = placement.size
    full = transform_boxes(torch.tensor(boxes)[None], torch.tensor(placement.matrix)[None])[0].numpy()
    if masks is not None and not placement.keeps_boxes:
        full = np.array([_tight_box(box, mask, placement) for box, mask in zip(full, masks, strict=True)], np.float32)
        full = full.reshape(-1, 4)
    visible = full.clip(0, np.array([width, height, width, height], np.float32))
    area = _areas(visible)
    least = min_visible * _areas(full) if placement.cropped else 0.0
    return visible, (area > 0) & (area >= least)


def place_mask(grid: Grid, placement: Placement) -> Grid:
    """A mask's grid on the canvas; its frame is not clipped.

    Scaling and translation move the frame, a horizontal flip also mirrors the grid. Any other map resamples the grid on
    a new frame.
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
    """An image under an affine map, uint8 [*size, 3]."""
    height, width = image.shape[:2]
    linear, offset = matrix[:, :2].astype(np.float64), matrix[:, 2].astype(np.float64)
    if max(height, width) > _MAX_WARPED_SIDE:
        shrunk = min(width, _MAX_WARPED_SIDE), min(height, _MAX_WARPED_SIDE)
        image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
        linear = linear * (width / shrunk[0], height / shrunk[1])
    # OpenCV's coordinates are those of pixel centres: the centre of the first pixel is 0, not 0.5.
    offset = offset + linear.sum(1) / 2 - 0.5
    return cv2.warpAffine(image, np.column_stack([linear, offset]), size[::-1], flags=cv2.INTER_LINEAR)


def _tight_box(loose: np.ndarray, mask: Mask, placement: Placement) -> np.ndarray:
    """The smallest box around a mapped mask, within the loose box; the loose box if they do not meet."""
    points = extreme_points(mask, placement.original)
    if not len(points):
        return loose
    mapped = points @ placement.matrix[:, :2].T.astype(np.float64) + placement.matrix[:, 2]
    low, high = mapped.min(0).clip(min=loose[:2]), mapped.max(0).clip(max=loose[2:])
    return np.concatenate([low, high]) if (low < high).all() else loose


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

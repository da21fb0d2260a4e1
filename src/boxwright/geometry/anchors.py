"""Anchor generation: boxes of fixed sizes and aspect ratios at every cell of every feature level.

Shapes: L levels, H x W cells per level, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boxwright.geometry.conventions import AnchorRounding


def base_anchors(
    sizes: Sequence[float], ratios: Sequence[float], rounding: AnchorRounding = "none", *, stride: int | None = None
) -> Tensor:
    """Anchors of the first cell of a level.

    Args:
        sizes: side lengths of the square anchors, in pixels.
        ratios: aspect ratios, height / width. Anchors of the same size have the same area at all ratios.
        rounding: how coordinates are rounded to whole pixels.

            - "none": anchors are centred on (0, 0) and not rounded.
            - "torchvision": anchors are centred on (0, 0), then rounded.
            - "detectron": as in mmdetection 0.5. x2 and y2 are the last pixel inside (width x2 - x1 + 1). Anchors are
              centred on the middle of the cell, (stride - 1) / 2, then rounded.
            - "cell": as in Detectron. Like "detectron", but the width and height are rounded for an anchor of the
              cell's size and then scaled to `sizes`.
        stride: stride of the level; required by "detectron" and "cell", otherwise unused.

    Returns:
        [A, 4] float32 xyxy with A = len(ratios) * len(sizes); the size varies fastest.

    Raises:
        ValueError: `rounding` is "detectron" or "cell" and `stride` is None.
    """
    # Computed in float32 throughout, since the rounding of halves in torchvision and mmdetection depends on it.
    height_ratios = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    sides = torch.tensor(sizes, dtype=torch.float32)[None, :]
    widths = (1 / height_ratios * sides).flatten()
    heights = (height_ratios * sides).flatten()
    if rounding in ("detectron", "cell"):
        if stride is None:
            raise ValueError(f'base_anchors: rounding="{rounding}" requires the stride of the level. Pass stride=...')
        if rounding == "cell":
            cell_ratios = torch.tensor(ratios, dtype=torch.float64)[:, None]
            cell_widths = (stride / cell_ratios.sqrt()).round()
            scales = torch.tensor(sizes, dtype=torch.float64)[None, :] / stride
            widths = (cell_widths * scales).flatten()
            heights = ((cell_widths * cell_ratios).round() * scales).flatten()
        centre = 0.5 * (stride - 1)
        half_widths, half_heights = 0.5 * (widths - 1), 0.5 * (heights - 1)
        corners = [centre - half_widths, centre - half_heights, centre + half_widths, centre + half_heights]
        boxes = torch.stack(corners, dim=1)
        return boxes.float() if rounding == "cell" else boxes.round()
    boxes = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return boxes.round() if rounding == "torchvision" else boxes


def octave_sizes(size: float, num_sizes: int, rounding: AnchorRounding = "none") -> list[float]:
    """Anchor sizes of one octave, `size * 2**(i / num_sizes)`, as in RetinaNet (arXiv 1708.02002, section 4).

    Args:
        size: smallest size, in pixels.
        num_sizes: number of sizes per octave.
        rounding: "torchvision" truncates the sizes to whole pixels, as its RetinaNet does; other values keep them.
    """
    sizes = [size * 2 ** (index / num_sizes) for index in range(num_sizes)]
    return [float(int(side)) for side in sizes] if rounding == "torchvision" else sizes


def grid_anchors(
    feature_shapes: Sequence[tuple[int, int]], strides: Sequence[int | tuple[int, int]], base: Sequence[Tensor]
) -> list[Tensor]:
    """Anchors of all cells of all levels: the base anchors, shifted by the stride from cell to cell.

    Args:
        feature_shapes: L pairs (H, W), the size of each feature map.
        strides: L strides in pixels, or L pairs (vertical, horizontal). The two differ in torchvision, whose stride is
            image size // feature size.
        base: L tensors [A, 4] from `base_anchors`.

    Returns:
        L tensors [H * W * A, 4] xyxy, with the device and dtype of `base`. The anchor varies fastest, then x, then y.
    """
    levels = []
    for (height, width), stride, boxes in zip(feature_shapes, strides, base, strict=True):
        stride_y, stride_x = stride if isinstance(stride, tuple) else (stride, stride)
        y = torch.arange(height, device=boxes.device, dtype=boxes.dtype)[:, None].expand(height, width) * stride_y
        x = torch.arange(width, device=boxes.device, dtype=boxes.dtype)[None, :].expand(height, width) * stride_x
        shifts = torch.stack([x, y, x, y], dim=-1)
        levels.append((shifts[:, :, None, :] + boxes).reshape(-1, 4))
    return levels

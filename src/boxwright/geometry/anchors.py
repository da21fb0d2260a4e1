"""Anchors: reference boxes of fixed sizes and aspect ratios, laid on every cell of every feature level.

A anchors a cell, H x W cells a level, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boxwright.geometry.conventions import AnchorRounding


def base_anchors(
    sizes: Sequence[float], ratios: Sequence[float], rounding: AnchorRounding = "none", *, stride: int | None = None
) -> Tensor:
    """The anchors of a level's first cell.

    Args:
        sizes: side lengths of the square anchors of one level, in pixels.
        ratios: height / width; an anchor keeps the area of its size.
        rounding: "none" centres anchors on (0, 0); "torchvision" rounds those to whole pixels; "detectron" is the 2018
            toolbox's: last pixel inclusive (x2 - x1 + 1 wide), centred on the cell's middle pixel, then rounded. "cell"
            is Detectron's own: placed like these, but rounded are the sides at the cell's size, which are then scaled.
        stride: the level's stride, which "detectron" and "cell" need and the others do not use.

    Returns:
        [A, 4] float32 xyxy, A = len(ratios) * len(sizes), sizes fastest.

    Raises:
        ValueError: if rounding is "detectron" or "cell" and there is no stride.
    """
    # float32 from the start: torchvision's and the toolbox's roundings of halves depend on it.
    height_ratios = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    side = torch.tensor(sizes, dtype=torch.float32)[None, :]
    widths = (1 / height_ratios * side).flatten()
    heights = (height_ratios * side).flatten()
    if rounding in ("detectron", "cell"):
        if stride is None:
            raise ValueError(f'anchors with rounding "{rounding}" need the stride of their level')
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
    """Evenly spaced sizes in log scale, from `size` up to, and without, twice that (RetinaNet, section 4).

    Args:
        size: the smallest, in pixels.
        num_sizes: how many.
        rounding: "torchvision" cuts them down to whole pixels, as its RetinaNet does; the others do not.
    """
    sizes = [size * 2 ** (index / num_sizes) for index in range(num_sizes)]
    return [float(int(side)) for side in sizes] if rounding == "torchvision" else sizes


def grid_anchors(
    feature_shapes: Sequence[tuple[int, int]], strides: Sequence[int | tuple[int, int]], base: Sequence[Tensor]
) -> list[Tensor]:
    """Anchors of all cells of all levels: cell (i, j) holds the base anchors moved by (j, i) strides.

    Args:
        feature_shapes: L x (H, W), cells of each level.
        strides: L strides in pixels, or L x (vertical, horizontal) where they differ: torchvision's stride is
            image size // feature size, which is not the network's own where the size does not divide.
        base: L x [A, 4], from `base_anchors`.

    Returns:
        L x [H * W * A, 4] xyxy, on the device and in the dtype of `base`; A fastest, then x, then y.
    """
    levels = []
    for (height, width), stride, boxes in zip(feature_shapes, strides, base, strict=True):
        stride_y, stride_x = stride if isinstance(stride, tuple) else (stride, stride)
        y = torch.arange(height, device=boxes.device, dtype=boxes.dtype)[:, None].expand(height, width) * stride_y
        x = torch.arange(width, device=boxes.device, dtype=boxes.dtype)[None, :].expand(height, width) * stride_x
        shifts = torch.stack([x, y, x, y], dim=-1)
        levels.append((shifts[:, :, None, :] + boxes).reshape(-1, 4))
    return levels

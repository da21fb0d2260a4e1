"""Affine maps of the plane as 2x3 matrices: (x, y) goes to matrix @ (x, y, 1).

Sums of products instead of matmul, which autocast would run in bfloat16 and thereby move boxes by pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def invert(matrices: Tensor) -> Tensor:
    """The maps that undo `matrices`.

    Args:
        matrices: [..., 2, 3], not singular.

    Returns:
        [..., 2, 3]; not finite where a map is singular.
    """
    (a, b, c), (d, e, f) = (row.unbind(-1) for row in matrices.unbind(-2))
    determinant = a * e - b * d
    first = torch.stack([e, -b, b * f - c * e], dim=-1)
    second = torch.stack([-d, a, c * d - a * f], dim=-1)
    return torch.stack([first, second], dim=-2) / determinant[..., None, None]


def transform_boxes(boxes: Tensor, matrices: Tensor) -> Tensor:
    """The smallest axis-aligned boxes around mapped boxes.

    Args:
        boxes: [B, N, 4] xyxy.
        matrices: [B, 2, 3].

    Returns:
        [B, N, 4] xyxy with x1 <= x2 and y1 <= y2 where the boxes had them.
    """
    linear, offset = matrices[:, None, :, :2], matrices[:, None, :, 2]
    # Each output coordinate is a sum of one term in x and one in y, so its extremes are sums of the terms' extremes.
    first, second = linear * boxes[..., None, :2], linear * boxes[..., None, 2:]
    lower = torch.minimum(first, second).sum(-1) + offset
    upper = torch.maximum(first, second).sum(-1) + offset
    return torch.cat([lower, upper], dim=-1)

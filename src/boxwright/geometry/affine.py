"""2D affine transforms as 2x3 matrices: (x, y) is mapped to matrix @ (x, y, 1).

The functions use elementwise products and sums instead of matmul: autocast would run a matmul in bfloat16, whose
rounding errors shift boxes by a pixel or more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def invert(matrices: Tensor) -> Tensor:
    """Inverse transforms.

    Args:
        matrices: [..., 2, 3].

    Returns:
        [..., 2, 3]; inf or NaN where the matrix is singular.
    """
    (a, b, c), (d, e, f) = (row.unbind(-1) for row in matrices.unbind(-2))
    determinant = a * e - b * d
    first = torch.stack([e, -b, b * f - c * e], dim=-1)
    second = torch.stack([-d, a, c * d - a * f], dim=-1)
    return torch.stack([first, second], dim=-2) / determinant[..., None, None]


def transform_boxes(boxes: Tensor, matrices: Tensor) -> Tensor:
    """Transform boxes and return the smallest axis-aligned boxes that enclose the results.

    Args:
        boxes: [B, N, 4] xyxy.
        matrices: [B, 2, 3].

    Returns:
        [B, N, 4] xyxy with x1 <= x2 and y1 <= y2. Boxes with NaN stay NaN.
    """
    linear, offset = matrices[:, None, :, :2], matrices[:, None, :, 2]
    # Each output coordinate is the sum of a term in x and a term in y, so that its minimum is the sum of their minima.
    first, second = linear * boxes[..., None, :2], linear * boxes[..., None, 2:]
    lower = torch.minimum(first, second).sum(-1) + offset
    upper = torch.maximum(first, second).sum(-1) + offset
    return torch.cat([lower, upper], dim=-1)

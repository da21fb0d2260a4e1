"""Gather neighbourhoods of selected positions of a feature pyramid, to compute a convolution only at these positions.

B images, S positions, L levels, C channels, K = 2 * radius + 1, M patches of P x P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_patches(
    features: Sequence[Tensor], level: Tensor, position: Tensor, *, radius: int
) -> tuple[Tensor, Tensor]:
    """Cut K x K patches out of the feature maps.

    Args:
        features: L of [B, C, H_l, W_l], all of one dtype.
        level: [B, S] int64, index into `features`.
        position: [B, S] int64, flat index y * W_l + x of the centre in its level.
        radius: number of features on each side of the centre.

    Returns:
        patches: [B, S, C, K, K] in channels-last memory format; 0 outside the map, as with zero padding.
        inside: [B, S, K, K] bool, whether a feature is inside the map.
    """
    offsets = torch.arange(-radius, radius + 1, device=level.device)
    image = torch.arange(level.shape[0], device=level.device)[:, None, None, None]
    patches: Tensor | None = None
    inside = torch.zeros((*level.shape, len(offsets), len(offsets)), dtype=torch.bool, device=level.device)
    for index, feature in enumerate(features):
        height, width = feature.shape[-2:]
        middle = position.clamp(max=height * width - 1)  # Positions of other levels may exceed the size of this level.
        rows = torch.div(middle, width, rounding_mode="floor")[..., None] + offsets
        columns = (middle % width)[..., None] + offsets
        here = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
        here &= (level == index)[..., None, None]
        indices = rows.clamp(0, height - 1)[..., :, None] * width + columns.clamp(0, width - 1)[..., None, :]
        values = F.embedding(image * (height * width) + indices, feature.permute(0, 2, 3, 1).flatten(0, 2))
        level_patches = torch.where(here[..., None], values, 0.0)
        patches = level_patches if patches is None else patches + level_patches
        inside |= here
    assert patches is not None, "a pyramid has levels"
    return patches.permute(0, 1, 4, 2, 3), inside


def convolve_patches(patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Equals `F.conv2d(patches, weight, bias)` without padding, with stride 1 and one group.

    If the kernel covers the whole patch, a matrix product is used: its gradient takes a tenth of the time on a CPU.

    Args:
        patches: [M, C, P, P].
        weight: [outputs, C, K, K].
        bias: [outputs] or None.

    Returns:
        [M, outputs, P - K + 1, P - K + 1].
    """
    if patches.shape[-2:] != weight.shape[-2:]:
        return F.conv2d(patches, weight, bias)
    rows, kernels = (tensor.permute(0, 2, 3, 1).flatten(1) for tensor in (patches, weight))
    return F.linear(rows, kernels, bias)[:, :, None, None]

"""The anchors of a feature pyramid, and the order in which heads predict for them.

B images, L levels, A anchors per position, N anchors of all levels together.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from boxwright.geometry.anchors import base_anchors, grid_anchors
from boxwright.geometry.conventions import Conventions

DELTA_STDS = (1.0, 1.0, 1.0, 1.0)
"""Standard deviations of the box deltas of anchors: 1, so the deltas are not rescaled."""


class AnchorGrid(nn.Module):
    """Generates the anchors of a feature pyramid."""

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        conventions: Conventions,
    ) -> None:
        """Compute the anchors at the first position of each level.

        Args:
            strides: stride of each level in pixels of the canvas, finest first.
            sizes: for each of the L levels, the sides of its square anchors in pixels.
            ratios: aspect ratios (height / width). Each size has one anchor per ratio, all of the same area.
            conventions: box geometry that the weights were (or will be) trained with.
        """
        super().__init__()
        self.strides = tuple(strides)
        self.strides_from_canvas = conventions.anchor_strides_from_canvas
        for level, (stride, sides) in enumerate(zip(strides, sizes, strict=True)):
            base = base_anchors(sides, ratios, conventions.anchor_rounding, stride=stride)
            self.register_buffer(f"base_{level}", base, persistent=False)

    def forward(self, features: Sequence[Tensor], canvas: tuple[int, int]) -> list[Tensor]:
        """Generate the anchors at every position of the feature maps.

        Args:
            features: L of [B, C, H_l, W_l], finest first; only their shapes are used.
            canvas: (height, width) of the canvas that the features were computed from, in pixels.

        Returns:
            L x [H_l * W_l * A, 4] float32 xyxy in pixels of the canvas; A varies fastest, then x, then y.
        """
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        strides: list[tuple[int, int]] = [(stride, stride) for stride in self.strides]
        if self.strides_from_canvas:
            strides = [(canvas[0] // height, canvas[1] // width) for height, width in shapes]
        return grid_anchors(shapes, strides, [getattr(self, f"base_{level}") for level in range(len(shapes))])


def by_anchor(maps: Tensor, values: int) -> Tensor:
    """Reorder one level's head output, [B, A * values, H, W], like the anchors: [B, H * W * A, values]."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, values)

"""What heads that predict at anchors share: the anchors, and their order.

B images, L levels, A anchors a position, N anchors of all levels together.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from boxwright.geometry.anchors import base_anchors, grid_anchors
from boxwright.geometry.conventions import Conventions

DELTA_STDS = (1.0, 1.0, 1.0, 1.0)
"""Boxes are told from anchors by plain deltas, divided by nothing."""


class AnchorGrid(nn.Module):
    """The anchors of a pyramid."""

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        conventions: Conventions,
    ) -> None:
        """Lay out the first position of each level.

        Args:
            strides: pixels of the canvas a feature position stands for, one a level, finest first.
            sizes: L x the sides of a level's square anchors, in pixels.
            ratios: height over width; every size has an anchor of each, of the same area.
            conventions: the geometry that the weights were or will be trained with.
        """
        super().__init__()
        self.strides = tuple(strides)
        self.strides_from_canvas = conventions.anchor_strides_from_canvas
        for level, (stride, sides) in enumerate(zip(strides, sizes, strict=True)):
            base = base_anchors(sides, ratios, conventions.anchor_rounding, stride=stride)
            self.register_buffer(f"base_{level}", base, persistent=False)

    def forward(self, features: Sequence[Tensor], canvas: tuple[int, int]) -> list[Tensor]:
        """The anchors of feature maps.

        Args:
            features: L of [B, C, H_l, W_l], finest first; their shapes alone matter.
            canvas: (height, width) in pixels that the features were computed from.

        Returns:
            L x [H_l * W_l * A, 4] float32 xyxy in pixels of the canvas; A fastest, then x, then y.
        """
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        strides: list[tuple[int, int]] = [(stride, stride) for stride in self.strides]
        if self.strides_from_canvas:
            strides = [(canvas[0] // height, canvas[1] // width) for height, width in shapes]
        return grid_anchors(shapes, strides, [getattr(self, f"base_{level}") for level in range(len(shapes))])


def by_anchor(maps: Tensor, values: int) -> Tensor:
    """[B, A * values, H, W] of a level -> [B, H * W * A, values], in the anchors' order."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, values)

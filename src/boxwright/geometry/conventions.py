"""What code bases do differently with boxes, in one small value, so that a peer's weights give a peer's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnchorRounding = Literal["none", "torchvision", "detectron", "cell"]


@dataclass(frozen=True)
class Conventions:
    """Details of box geometry that weights are trained with and cannot be changed afterwards."""

    plus_one: float = 0.0
    """What widths and heights add: 0 for continuous boxes, 1 where x2 and y2 name the last pixel inside."""
    anchor_rounding: AnchorRounding = "none"
    """How base anchors become whole pixels; see `base_anchors`."""
    anchor_strides_from_canvas: bool = False
    """Whether anchors lie canvas size // feature size apart, not a stride: 61 instead of 64 for P6 of 800 pixels."""
    roi_align_aligned: bool = True
    """Whether RoIAlign subtracts the half pixel that puts a feature at the centre of its cell."""
    roi_align_plus_one: bool = True
    """Whether RoIAlign, too, adds `plus_one` to a box's end, and takes boxes narrower than a cell as they are."""
    proposal_clip_multiple: int = 1
    """In testing, proposals are cut at the sides of their picture rounded up to a multiple of this: 32 in Detectron,
    which takes its padding for picture there."""
    level_epsilon: float = 1e-6
    """Added when a box's size is turned into a pyramid level, so that powers of two do not fall one level down."""


MODERN = Conventions()
"""What Boxwright trains with: continuous boxes, unrounded anchors, aligned RoIAlign."""

TORCHVISION = Conventions(anchor_rounding="torchvision", anchor_strides_from_canvas=True, roi_align_aligned=False)
"""torchvision's detection models."""

DETECTRON = Conventions(plus_one=1.0, anchor_rounding="detectron", roi_align_aligned=False)
"""The 2018 toolbox."""

CAFFE2 = Conventions(plus_one=1.0, anchor_rounding="cell", roi_align_aligned=False, roi_align_plus_one=False)
"""maskrcnn-benchmark, and Detectron itself but for `proposal_clip_multiple`."""

"""Conventions of box geometry that differ between code bases.

With the conventions of a peer, weights trained with the peer give the peer's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnchorRounding = Literal["none", "torchvision", "detectron", "cell"]


@dataclass(frozen=True)
class Conventions:
    """Details of box geometry. A detector must be used with the conventions that it was trained with."""

    plus_one: float = 0.0
    """Added to widths and heights: 0 for continuous coordinates, 1 if x2 and y2 are the last pixel inside the box."""
    anchor_rounding: AnchorRounding = "none"
    """Rounding of base anchors to whole pixels; see `base_anchors`."""
    anchor_strides_from_canvas: bool = False
    """Whether the distance between neighbouring anchors is canvas size // feature size instead of the stride of the
    level. For P6 and a canvas size of 800, the two are 61 and 64 pixels."""
    roi_align_aligned: bool = True
    """Whether RoIAlign shifts boxes by -0.5 feature cells, so that feature values are at the centres of their cells."""
    roi_align_plus_one: bool = True
    """Whether RoIAlign also adds `plus_one` to x2 and y2, and pools boxes smaller than one cell without enlarging them.
    If False, `plus_one` only affects the FPN level assignment."""
    proposal_clip_multiple: int = 1
    """At test time, proposals are clipped to the image size rounded up to a multiple of this value. It is 32 in
    Detectron, which clips to the padded image."""
    level_epsilon: float = 1e-6
    """Added to the level before it is rounded down in FPN's level assignment, so that rounding errors do not move a box
    whose size is a power of two to the next lower level."""


MODERN = Conventions()
"""Boxwright's default: continuous coordinates, unrounded anchors, aligned RoIAlign."""

TORCHVISION = Conventions(anchor_rounding="torchvision", anchor_strides_from_canvas=True, roi_align_aligned=False)
"""torchvision's detection models."""

DETECTRON = Conventions(plus_one=1.0, anchor_rounding="detectron", roi_align_aligned=False)
"""mmdetection 0.5 (2018)."""

CAFFE2 = Conventions(plus_one=1.0, anchor_rounding="cell", roi_align_aligned=False, roi_align_plus_one=False)
"""maskrcnn-benchmark. Detectron also needs `proposal_clip_multiple=32`."""

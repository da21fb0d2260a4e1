"""Turn scored boxes into detections: score threshold, NMS within each class, maximum number of detections.

B images, N scored boxes, D detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from boxwright.ops.nms import nms
from boxwright.ops.soft_nms import soft_nms
from boxwright.structures import Detections, take_slots


# eq=False keeps the hash of the object: PyTorch 2.9 to 2.11 hash an instance that is created in a compiled graph before
# its fields are set.
@dataclass(frozen=True, kw_only=True, eq=False)
class Suppression:
    """Score threshold and NMS that turn scored boxes into detections."""

    score_threshold: float
    """Score threshold: detections with a score of at most this, also after Soft-NMS, are discarded."""
    iou_threshold: float
    """NMS IoU threshold, applied within each class. With "gaussian" any overlap lowers the score."""
    max_detections: int
    """Maximum number of detections per image."""
    method: Literal["hard", "linear", "gaussian"] = "hard"
    """NMS method: "hard" removes overlapping boxes, "linear" and "gaussian" lower their scores (see `ops.soft_nms`)."""
    sigma: float = 0.5
    """Gaussian Soft-NMS sigma: the larger, the less overlapping boxes lose of their scores."""
    plus_one: float = 0.0
    """1 for the box geometry of mmdetection 0.5 (2018), else 0."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> Detections:
        """Apply the score threshold and NMS, and keep the best detections.

        Args:
            boxes: [B, N, 4] xyxy; invalid slots may have any value.
            scores: [B, N] in 0..1.
            labels: [B, N] int64.
            valid: [B, N] bool, slots that hold a box.

        Returns:
            Detections in D = min(`max_detections`, N) slots.
        """
        kept, scores, is_kept = self.keep(boxes, scores, labels, valid)
        return Detections(boxes=take_slots(boxes, kept), scores=scores, labels=take_slots(labels, kept), valid=is_kept)

    def keep(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the boxes that become detections; the arguments are the same as in `__call__`.

        Returns:
            indices: [B, D] int64, slots of the detections, best first; 0 in unused slots.
            scores: [B, D] scores of the detections after Soft-NMS.
            kept: [B, D] bool, entries of `indices` that are in use.
        """
        candidates = valid & (scores > self.score_threshold)
        max_keep = min(self.max_detections, scores.shape[1])
        if self.method != "hard":
            return soft_nms(
                boxes,
                scores,
                labels,
                candidates,
                decay=self.method,
                iou_threshold=self.iou_threshold,
                sigma=self.sigma,
                min_score=self.score_threshold,
                max_keep=max_keep,
                plus_one=self.plus_one,
            )
        indices, kept = nms(
            boxes,
            scores,
            labels,
            candidates,
            iou_threshold=self.iou_threshold,
            max_keep=max_keep,
            plus_one=self.plus_one,
        )
        return indices, take_slots(scores, indices), kept

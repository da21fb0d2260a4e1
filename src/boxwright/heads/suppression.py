"""From scored boxes to detections: of those of a class that overlap, the best counts.

B images, N scored boxes, D detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from boxwright.ops.nms import nms
from boxwright.ops.soft_nms import soft_nms
from boxwright.structures import Detections, take_slots


# Without `eq`, the hash is that of the object: PyTorch 2.9 to 2.11 hash an instance that is built in a compiled graph
# before its fields are set.
@dataclass(frozen=True, kw_only=True, eq=False)
class Suppression:
    """How scored boxes become detections."""

    score_threshold: float
    """Detections must score more, after Soft-NMS has lowered them, too."""
    iou_threshold: float
    """Boxes of a class that overlap more than this compete; "gaussian" takes any overlap."""
    max_detections: int
    """Detections an image."""
    method: Literal["hard", "linear", "gaussian"] = "hard"
    """"hard": of two that compete, the worse goes. The others lower its score: Soft-NMS, see `ops.soft_nms`."""
    sigma: float = 0.5
    """How gently "gaussian" lowers."""
    plus_one: float = 0.0
    """1 for the 2018 geometry."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> Detections:
        """Threshold, suppress within each class, keep the best.

        Args:
            boxes: [B, N, 4] xyxy; invalid slots may hold anything.
            scores: [B, N] in 0..1.
            labels: [B, N] int64.
            valid: [B, N] bool, the slots that take part.

        Returns:
            Detections in D = min(`max_detections`, N) slots.
        """
        kept, scores, found = self.keep(boxes, scores, labels, valid)
        return Detections(boxes=take_slots(boxes, kept), scores=scores, labels=take_slots(labels, kept), valid=found)

    def keep(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which boxes become detections; the arguments are those of a call.

        Returns:
            indices: [B, D] int64, the slots that are kept, best first, then zeros.
            scores: [B, D] what they score then.
            kept: [B, D] bool, the slots of `indices` that are in use.
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

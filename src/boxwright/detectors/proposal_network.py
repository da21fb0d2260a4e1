"""RPN as a stand-alone detector: class-agnostic boxes, evaluated by recall."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.detectors.detector import Detector, PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.rpn_head import RPNConfig, RPNHead
from boxwright.structures import Batch, Detections


class ProposalNetwork(Detector):
    """A backbone and a region proposal network."""

    class_agnostic = True

    def __init__(self, *, backbone: Backbone, rpn: RPNHead, pixel_stats: PixelStats) -> None:
        super().__init__()
        self.num_classes = 1
        self.max_detections = rpn.config.test_num_proposals
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.rpn = rpn

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`rpn_objectness` and `rpn_box`; see `RPNHead.losses`."""
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        return self.rpn.losses(features, (batch.images.shape[2], batch.images.shape[3]), batch, batch.targets)

    def detect(self, batch: Batch) -> Detections:
        """The RPN's test-time proposals as detections of class 0, scored by objectness."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals = self.rpn.propose(
            features, (batch.images.shape[2], batch.images.shape[3]), batch.image_sizes, training=False
        )
        return Detections(
            boxes=proposals.boxes,
            scores=proposals.scores,
            labels=torch.zeros_like(proposals.valid, dtype=torch.int64),
            valid=proposals.valid,
        )


def proposal_network(
    *,
    backbone: Backbone,
    num_classes: int = 1,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    rpn_head: Callable[..., RPNHead] = RPNHead,
) -> ProposalNetwork:
    """Build an RPN as a stand-alone detector.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of classes of the data set. It is ignored: the RPN treats all classes as one.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        rpn: hyperparameters of the head.
        rpn_head: RPN head factory, called with (channels, strides, rpn, conventions).
    """
    head = rpn_head(backbone.channels[0], backbone.strides, rpn, conventions)
    return ProposalNetwork(backbone=backbone, rpn=head, pixel_stats=pixel_stats)

"""The two-stage detectors: proposals first, then what they hold."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.detectors.detector import PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.heads.rpn_head import RPNConfig, RPNHead
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections, Proposals, Targets


class RCNN(nn.Module):
    """A backbone, a region proposal network (or proposals that come with the batch) and a box head."""

    def __init__(self, *, backbone: Backbone, rpn: RPNHead | None, box_head: BoxHead, pixel_stats: PixelStats) -> None:
        super().__init__()
        self.num_classes = box_head.num_classes
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.rpn = rpn
        self.box_head = box_head

    @property
    def suppression(self) -> Suppression:
        """How its scored boxes become detections."""
        return self.box_head.suppression

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of both stages; see `RPNHead.losses` and `BoxHead.losses`."""
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals, losses = self._proposals(features, batch, batch.targets)
        sampled = self.box_head.sample(proposals, batch.targets, batch.seeds, features)
        return {**losses, **self.box_head.losses(features, sampled, batch.targets)}

    def detect(self, batch: Batch) -> Detections:
        """The box head's detections on the proposals of testing."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals, _ = self._proposals(features, batch, None)
        return self.box_head.detect(features, proposals, batch.image_sizes)

    def _proposals(
        self, features: Sequence[Tensor], batch: Batch, targets: Targets | None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """The first stage: proposals and, where there are targets to learn from, its losses."""
        if self.rpn is None:
            assert batch.proposals is not None, "a detector without an RPN needs proposals in its batch"
            return batch.proposals, {}
        output = self.rpn(features, batch.images.shape[-2:])
        proposals = self.rpn.proposals(output, batch.image_sizes, training=targets is not None)
        return proposals, {} if targets is None else self.rpn.losses(output, batch, targets)


def faster_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(),
) -> RCNN:
    """Build a Faster R-CNN (Ren et al., 2015) on a feature pyramid.

    Args:
        backbone: gives a pyramid whose levels have equal channels.
        num_classes: object classes, background not counted.
        pixel_stats: what the backbone expects of pixels.
        conventions: the geometry that the weights were or will be trained with.
        rpn: the numbers of the first stage.
        box: the numbers of the second stage.
    """
    channels, strides = backbone.channels[0], backbone.strides
    return RCNN(
        backbone=backbone,
        rpn=RPNHead(channels, strides, rpn, conventions),
        box_head=BoxHead(channels, strides, num_classes, box, conventions),
        pixel_stats=pixel_stats,
    )

"""Two-stage detectors: an RPN (or a file) proposes boxes, then a box head classifies and refines them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.detectors.detector import Detector, PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.heads.mask_head import MaskConfig, MaskHead
from boxwright.heads.rpn_head import RPNConfig, RPNHead
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections, Proposals, Targets


class RCNN(Detector):
    """A backbone, a region proposal network (or proposals from the batch), a box head and, optionally, a mask head."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        rpn: RPNHead | None,
        box_head: BoxHead,
        mask_head: MaskHead | None = None,
        pixel_stats: PixelStats,
    ) -> None:
        super().__init__()
        self.num_classes = box_head.num_classes
        self.max_detections = box_head.config.max_detections
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.rpn = rpn
        self.box_head = box_head
        self.mask_head = mask_head
        self.needs_masks = mask_head is not None
        self.needs_proposals = rpn is None

    @property
    def suppression(self) -> Suppression:  # type: ignore[override]  # follows a box head that was replaced
        """NMS of the box head."""
        return self.box_head.suppression

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of all heads; see `RPNHead.losses`, `BoxHead.losses` and `MaskHead.losses`."""
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals, losses = self._proposals(features, batch, batch.targets)
        sampled = self.box_head.sample(proposals, batch.targets, batch.seeds, features)
        losses |= self.box_head.losses(features, sampled, batch.targets)
        if self.mask_head is not None:
            max_positives = self.box_head.config.max_positives
            losses |= self.mask_head.losses(features, sampled, batch.targets, max_positives=max_positives)
        return losses

    def detect(self, batch: Batch) -> Detections:
        """The box head's detections, with masks if there is a mask head."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals, _ = self._proposals(features, batch, None)
        detections = self.box_head.detect(features, proposals, batch.image_sizes)
        return detections if self.mask_head is None else self.mask_head.detect(features, detections)

    def _proposals(
        self, features: Sequence[Tensor], batch: Batch, targets: Targets | None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals and the RPN's losses; there are no losses without targets or without an RPN."""
        if self.rpn is None:
            assert batch.proposals is not None, "a detector without an RPN needs batch.proposals"
            return batch.proposals, {}
        canvas = (batch.images.shape[2], batch.images.shape[3])
        proposals = self.rpn.propose(features, canvas, batch.image_sizes, training=targets is not None)
        return proposals, {} if targets is None else self.rpn.losses(features, canvas, batch, targets)


def fast_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    box: BoxConfig = BoxConfig(),
    box_head: Callable[..., BoxHead] = BoxHead,
) -> RCNN:
    """Build a Fast R-CNN (Girshick, 2015) on a feature pyramid. The batch must contain the proposals.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        box: hyperparameters of the box head.
        box_head: box head factory, called with (channels, strides, num_classes, box, conventions).
    """
    channels, strides = backbone.channels[0], backbone.strides
    head = box_head(channels, strides, num_classes, box, conventions)
    return RCNN(backbone=backbone, rpn=None, box_head=head, pixel_stats=pixel_stats)


def faster_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(),
    rpn_head: Callable[..., RPNHead] = RPNHead,
    box_head: Callable[..., BoxHead] = BoxHead,
) -> RCNN:
    """Build a Faster R-CNN (Ren et al., 2015) on a feature pyramid.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the box head.
        rpn_head: RPN head factory, called with (channels, strides, rpn, conventions).
        box_head: box head factory, called with (channels, strides, num_classes, box, conventions).
    """
    channels, strides = backbone.channels[0], backbone.strides
    return RCNN(
        backbone=backbone,
        rpn=rpn_head(channels, strides, rpn, conventions),
        box_head=box_head(channels, strides, num_classes, box, conventions),
        pixel_stats=pixel_stats,
    )


def mask_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(),
    mask: MaskConfig = MaskConfig(),
    rpn_head: Callable[..., RPNHead] = RPNHead,
    box_head: Callable[..., BoxHead] = BoxHead,
    mask_head: Callable[..., MaskHead] = MaskHead,
) -> RCNN:
    """Build a Mask R-CNN (He et al., 2017) on a feature pyramid.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the box head.
        mask: hyperparameters of the mask head.
        rpn_head: RPN head factory, called with (channels, strides, rpn, conventions).
        box_head: box head factory, called with (channels, strides, num_classes, box, conventions).
        mask_head: mask head factory, called with (channels, strides, num_classes, mask, conventions).
    """
    channels, strides = backbone.channels[0], backbone.strides
    return RCNN(
        backbone=backbone,
        rpn=rpn_head(channels, strides, rpn, conventions),
        box_head=box_head(channels, strides, num_classes, box, conventions),
        mask_head=mask_head(channels, strides, num_classes, mask, conventions),
        pixel_stats=pixel_stats,
    )


def fast_mask_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    box: BoxConfig = BoxConfig(),
    mask: MaskConfig = MaskConfig(),
    box_head: Callable[..., BoxHead] = BoxHead,
    mask_head: Callable[..., MaskHead] = MaskHead,
) -> RCNN:
    """Build a Mask R-CNN without an RPN. The batch must contain the proposals, as for Fast R-CNN.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        box: hyperparameters of the box head.
        mask: hyperparameters of the mask head.
        box_head: box head factory, called with (channels, strides, num_classes, box, conventions).
        mask_head: mask head factory, called with (channels, strides, num_classes, mask, conventions).
    """
    channels, strides = backbone.channels[0], backbone.strides
    return RCNN(
        backbone=backbone,
        rpn=None,
        box_head=box_head(channels, strides, num_classes, box, conventions),
        mask_head=mask_head(channels, strides, num_classes, mask, conventions),
        pixel_stats=pixel_stats,
    )

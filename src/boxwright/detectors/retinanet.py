"""RetinaNet: a one-stage detector that classifies and refines every anchor."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.detectors.detector import Detector, PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.retina_head import RetinaConfig, RetinaHead
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections


class RetinaNet(Detector):
    """A backbone and a head that is shared by all feature levels."""

    def __init__(self, *, backbone: Backbone, head: RetinaHead, pixel_stats: PixelStats) -> None:
        super().__init__()
        self.num_classes = head.num_classes
        self.max_detections = head.config.max_detections
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.head = head

    @property
    def suppression(self) -> Suppression:  # type: ignore[override]  # follows a head that was replaced
        """NMS of the head."""
        return self.head.suppression

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`retina_class` and `retina_box`; see `RetinaHead.losses`."""
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        return self.head.losses(self.head(features, batch.images.shape[-2:]), batch.targets)

    def detect(self, batch: Batch) -> Detections:
        """The head's detections; see `RetinaHead.detect`."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        return self.head.detect(self.head(features, batch.images.shape[-2:]), batch.image_sizes)


def retinanet(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    retina: RetinaConfig = RetinaConfig(),
    retina_head: Callable[..., RetinaHead] = RetinaHead,
) -> RetinaNet:
    """Build a RetinaNet (Lin et al., 2017) on a feature pyramid.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels (P3 to P7 in the paper).
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        retina: hyperparameters of the head.
        retina_head: head factory, called with (channels, strides, num_classes, retina, conventions).
    """
    head = retina_head(backbone.channels[0], backbone.strides, num_classes, retina, conventions)
    return RetinaNet(backbone=backbone, head=head, pixel_stats=pixel_stats)

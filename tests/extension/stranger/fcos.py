"""FCOS as an outside package would add it: its own head, assigner and recipe, and no edit inside Boxwright.

B images, L levels, N locations of all levels, G object slots, C classes, D detections.

Source: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection (2019), with center sampling and GIoU loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.buckets import Resize
from boxwright.detectors.detector import Detector, PixelNormalizer
from boxwright.geometry.boxes import clip
from boxwright.heads.class_rows import ClassRows
from boxwright.heads.suppression import Suppression
from boxwright.losses import binary_cross_entropy, giou_loss, sigmoid_focal_loss, weighted_mean
from boxwright.structures import Batch, Detections, Targets, take_slots
from boxwright.training.experiment import SGD, Experiment


@dataclass(frozen=True, kw_only=True)
class FCOSConfig:
    """Settings of an FCOS head; the defaults are the paper's."""

    num_convs: int = 4
    """3x3 convolutions in each branch."""
    finest_limit: float = 64.0
    """The finest level takes objects whose largest distance to a side is at most this, in pixels; the limit doubles
    from level to level."""
    center_radius: float = 1.5
    """Positive locations lie within this many strides of the center of their object."""
    score_threshold: float = 0.05
    """Minimum score of a detection."""
    pre_nms_per_level: int = 1000
    """Candidates per level that enter NMS."""
    nms_iou: float = 0.6
    """NMS IoU threshold."""
    max_detections: int = 100
    """Detections per image."""


class FCOSOutput(NamedTuple):
    """The predictions at every location, levels concatenated, finest first."""

    logits: Tensor
    """[B, N, C] class logits."""
    distances: Tensor
    """[B, N, 4] distances to the left, top, right and bottom side, in pixels of the canvas."""
    centerness: Tensor
    """[B, N] logits."""
    points: Tensor
    """[N, 2] locations (x, y), in pixels of the canvas."""
    strides: Tensor
    """[N] stride of the level of each location."""
    level_lengths: tuple[int, ...]
    """Locations of each level."""


class Assignment(NamedTuple):
    """The targets of every location."""

    labels: Tensor
    """[B, N] int64, C for background."""
    boxes: Tensor
    """[B, N, 4] xyxy of the matched object; a unit box around the location for background."""
    positive: Tensor
    """[B, N] bool."""
    counted: Tensor
    """[B, N] bool, False inside crowd regions."""


def assign(output: FCOSOutput, targets: Targets, config: FCOSConfig, num_classes: int) -> Assignment:
    """Match each location to the smallest object whose center region holds it and whose size fits its level."""
    real = targets.valid[..., None]
    boxes = torch.where(real, targets.boxes, 0.0)
    x, y = output.points[:, None].unbind(-1)
    x1, y1, x2, y2 = boxes[:, None].unbind(-1)
    sides = torch.stack([x - x1, y - y1, x2 - x, y2 - y], -1)
    inside = (sides > 0).all(-1)
    radius = config.center_radius * output.strides[:, None]
    central = ((x - (x1 + x2) / 2).abs() <= radius) & ((y - (y1 + y2) / 2).abs() <= radius)
    largest = sides.amax(-1)
    level = torch.cat([torch.full((n,), i, device=x.device) for i, n in enumerate(output.level_lengths)])[:, None]
    upper = config.finest_limit * 2.0**level
    lower = torch.where(level > 0, upper / 2, 0.0)
    upper = torch.where(level < len(output.level_lengths) - 1, upper, torch.inf)
    fits = inside & central & (largest > lower) & (largest <= upper)
    fits &= (targets.valid & ~targets.crowd)[:, None]
    area = ((x2 - x1) * (y2 - y1)).expand(fits.shape)
    smallest, matched = torch.where(fits, area, torch.inf).min(-1)
    positive = smallest.isfinite()
    labels = torch.where(positive, take_slots(targets.labels, matched), num_classes)
    unit = torch.cat([output.points - 0.5, output.points + 0.5], -1)
    matched_boxes = torch.where(positive[..., None], take_slots(boxes, matched), unit)
    in_crowd = (inside & (targets.valid & targets.crowd)[:, None]).any(-1)
    return Assignment(labels, matched_boxes, positive, positive | ~in_crowd)


class FCOSHead(nn.Module):
    """Two branches of 3x3 convolutions with GroupNorm, shared by all levels: classes, and distances with centerness."""

    def __init__(
        self, channels: int, strides: Sequence[int], num_classes: int, config: FCOSConfig = FCOSConfig()
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.class_branch = _branch(channels, config.num_convs)
        self.box_branch = _branch(channels, config.num_convs)
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.class_logits.bias, -4.6)  # a prior of 0.01, as in RetinaNet

    class_rows = MappingProxyType({"class_logits": ClassRows()})

    def forward(self, features: Sequence[Tensor]) -> FCOSOutput:
        """Predict at every location of L feature maps [B, channels, H_l, W_l]."""
        logits, distances, centerness, points, strides = [], [], [], [], []
        for feature, stride, scale in zip(features, self.strides, self.scales, strict=True):
            height, width = feature.shape[-2:]
            boxes = self.box_branch(feature)
            logits.append(self.class_logits(self.class_branch(feature)).flatten(2).mT.float())
            distances.append((self.distances(boxes).flatten(2).mT.float() * scale).exp() * stride)
            centerness.append(self.centerness(boxes).flatten(1).float())
            y, x = (torch.arange(n, device=feature.device, dtype=torch.float32) + 0.5 for n in (height, width))
            points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) * stride)
            strides.append(torch.full((height * width,), float(stride), device=feature.device))
        return FCOSOutput(
            logits=torch.cat(logits, 1),
            distances=torch.cat(distances, 1),
            centerness=torch.cat(centerness, 1),
            points=torch.cat(points),
            strides=torch.cat(strides),
            level_lengths=tuple(len(level) for level in points),
        )

    def losses(self, output: FCOSOutput, targets: Targets) -> dict[str, Tensor]:
        """Focal loss of classes, GIoU loss of boxes weighted by centerness, and cross-entropy of centerness."""
        labels, boxes, positive, counted = assign(output, targets, self.config, self.num_classes)
        x, y = output.points.unbind(-1)
        x1, y1, x2, y2 = boxes.unbind(-1)
        horizontal = torch.stack([x - x1, x2 - x], -1)
        vertical = torch.stack([y - y1, y2 - y], -1)
        ratios = (side.amin(-1) / side.amax(-1) for side in (horizontal, vertical))
        centerness = torch.where(positive, torch.stack(list(ratios)).prod(0).clamp(min=0).sqrt(), 0.0)
        box_loss = giou_loss(self.boxes(output), boxes, positive)
        class_loss = sigmoid_focal_loss(output.logits, labels, counted)
        return {
            "fcos_class": weighted_mean(class_loss, counted, over=positive),
            "fcos_box": weighted_mean(box_loss, centerness),
            "fcos_centerness": weighted_mean(binary_cross_entropy(output.centerness, centerness, positive), positive),
        }

    @staticmethod
    def boxes(output: FCOSOutput) -> Tensor:
        """[B, N, 4] xyxy of all predicted boxes."""
        left_top, right_bottom = output.distances.split(2, -1)
        return torch.cat([output.points - left_top, output.points + right_bottom], -1)

    @torch.no_grad()
    def detect(self, output: FCOSOutput, image_sizes: Tensor) -> Detections:
        """The best candidates of each level, then NMS within each class."""
        scores = (output.logits.sigmoid() * output.centerness.sigmoid()[..., None]).sqrt()
        best, labels, candidates, start = [], [], [], 0
        for level in scores.split(output.level_lengths, 1):
            rows = level.flatten(1)
            top, index = rows.topk(min(self.config.pre_nms_per_level, rows.shape[1]))
            best.append(top)
            labels.append(index % self.num_classes)
            candidates.append(index // self.num_classes + start)
            start += level.shape[1]
        boxes = clip(take_slots(self.boxes(output), torch.cat(candidates, 1)), image_sizes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        return self.suppression(boxes, torch.cat(best, 1), torch.cat(labels, 1), valid)

    @property
    def suppression(self) -> Suppression:
        """How scored boxes become detections."""
        return Suppression(
            score_threshold=self.config.score_threshold,
            iou_threshold=self.config.nms_iou,
            max_detections=self.config.max_detections,
        )


def _branch(channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(8, channels), nn.ReLU()]
    return nn.Sequential(*layers)


class FCOS(Detector):
    """A backbone and an FCOS head."""

    def __init__(self, *, backbone: Backbone, head: FCOSHead, pixel_stats: PixelStats) -> None:
        super().__init__()
        self.num_classes = head.num_classes
        self.max_detections = head.config.max_detections
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.head = head

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `FCOSHead.losses`."""
        assert batch.targets is not None, "losses need targets"
        return self.head.losses(self.head(self._features(batch)), batch.targets)

    def detect(self, batch: Batch) -> Detections:
        """See `FCOSHead.detect`."""
        return self.head.detect(self.head(self._features(batch)), batch.image_sizes)

    @property
    def suppression(self) -> Suppression:
        """How scored boxes become detections."""
        return self.head.suppression

    def _features(self, batch: Batch) -> list[Tensor]:
        return self.backbone(self.normalize(batch.images, batch.image_sizes))


def fcos(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    config: FCOSConfig = FCOSConfig(),
) -> FCOS:
    """Build an FCOS detector on a feature pyramid."""
    head = FCOSHead(backbone.channels[0], backbone.strides, num_classes, config)
    return FCOS(backbone=backbone, head=head, pixel_stats=pixel_stats)


def fcos_r18_fpn_small() -> Experiment:
    """FCOS on a ResNet-18 of few channels, for small images."""
    backbone = partial(resnet_fpn, depth=18, norm="gn", frozen_stages=0, channels=32)
    return Experiment(
        model=partial(fcos, backbone=backbone, config=FCOSConfig(num_convs=1, score_threshold=0.001)),
        resize=Resize(64, 64),
        optimizer=SGD(lr=0.01),
        epochs=1,
        batch_size=2,
    )

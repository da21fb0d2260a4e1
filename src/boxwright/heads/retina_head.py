"""RetinaNet head: predicts class logits and box deltas for every anchor, and is trained on all anchors (focal loss).

B images, L levels, A anchors per position, N anchors of all levels together, C classes, G object slots, D detections.

Source: Lin et al., Focal Loss for Dense Object Detection (2017), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from boxwright.assign.match import IGNORED, POSITIVE, match
from boxwright.checks import check_choice, check_counts, check_numbers
from boxwright.geometry import boxes as box_geometry
from boxwright.geometry.anchors import octave_sizes
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.anchor_grid import DELTA_STDS, AnchorGrid, by_anchor
from boxwright.heads.box_loss import BoxLoss, box_regression_loss, check_box_loss
from boxwright.heads.class_rows import ClassRows
from boxwright.heads.suppression import Suppression
from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.norm import make_norm
from boxwright.layers.stock import is_stock
from boxwright.losses import at_least_float32, sigmoid_focal_loss, weighted_mean
from boxwright.structures import Detections, Targets, take_slots


@dataclass(frozen=True, kw_only=True)
class RetinaConfig:
    """Hyperparameters of a RetinaNet head; the defaults follow mmdetection 0.5 (2018)."""

    num_convs: int = 4
    """Number of 3x3 convolutions before the output layer, in each of the two branches."""
    norm: Literal["gn"] | None = None
    """Normalisation layer after each convolution; None for no normalisation."""
    anchor_scale: float = 4.0
    """Side of the smallest anchor of a level, in multiples of the stride of the level."""
    scales_per_octave: int = 3
    """Number of anchor sizes per level, evenly spaced on a log scale up to the smallest size of the next level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor aspect ratios (height / width) for each size."""
    positive_iou: float = 0.5
    """IoU threshold for positives: an anchor with at least this IoU with an object is positive."""
    negative_iou: float = 0.4
    """IoU threshold for negatives: an anchor with less than this IoU with every object is negative. Anchors between the
    two thresholds are ignored."""
    low_quality: float | None = 0.0
    """Low-quality matches: the best anchors of each object are also positive if their IoU is at least this. None
    disables low-quality matches."""
    prior: float = 0.01
    """Prior probability of every class at every anchor before training. A low prior keeps the many negatives from
    dominating the loss of the first steps."""
    focal_alpha: float = 0.25
    """Focal loss alpha: weight of positive classes; negative classes have weight 1 - alpha."""
    focal_gamma: float = 2.0
    """Focusing parameter gamma: how strongly well-classified anchors are down-weighted."""
    box_loss: BoxLoss = "smooth_l1"
    """Box regression loss: "smooth_l1" on box deltas, or "giou", "diou", "ciou" or a function on decoded boxes."""
    smooth_l1_beta: float = 0.11
    """Smooth L1 beta: the absolute error at which the loss changes from quadratic to linear; 0 for plain L1."""
    class_loss_weight: float = 1.0
    """Weight of the classification loss."""
    box_loss_weight: float = 1.0
    """Weight of the box loss. IoU losses are smaller than smooth L1 and usually get a higher weight."""
    pre_nms_per_level: int = 1000
    """Number of highest-scoring (anchor, class) pairs per level that are passed to NMS."""
    score_threshold: float = 0.05
    """Score threshold: detections with a score of at most this are discarded."""
    nms_iou: float = 0.5
    """NMS IoU threshold, applied within each class."""
    max_detections: int = 100
    """Maximum number of detections per image."""
    clip_first: bool = True
    """Whether boxes are clipped to the image before NMS. If False, boxes are clipped after NMS (Detectron2), and boxes
    that are then empty are discarded without replacement."""
    drop_empty: bool = False
    """Whether boxes without area are discarded before NMS (mmdetection 3.x). Clipping leaves no area of boxes outside
    the image."""

    def __post_init__(self) -> None:
        check_counts(self, "num_convs", "scales_per_octave", least=0)
        check_counts(self, "pre_nms_per_level", "max_detections")
        check_numbers(self, "positive_iou", "negative_iou", "low_quality", "focal_alpha", least=0, most=1)
        check_numbers(self, "score_threshold", "nms_iou", least=0, most=1)
        check_numbers(self, "anchor_scale", "ratios", least=0, above=True)
        check_numbers(self, "focal_gamma", "smooth_l1_beta", least=0)
        if not 0 < self.prior < 1:
            raise ValueError(f"prior: expected a number above 0 and below 1, such as 0.01, got {self.prior!r}")
        check_choice("norm", self.norm, (None, "gn"))
        # Anchor sizes a hundredth of an octave apart have nearly the same IoU with any object.
        if not 1 <= self.scales_per_octave <= 100:
            raise ValueError(f"scales_per_octave: expected 1 to 100, such as 3, got {self.scales_per_octave}")
        check_box_loss(self.box_loss)
        check_numbers(self, "class_loss_weight", "box_loss_weight", least=0)


class RetinaOutput(NamedTuple):
    """Output of the head for every anchor."""

    logits: tuple[Tensor, ...]
    """L x [B, N_l, C] in the dtype of the computation, finest level first; not concatenated because they are large."""
    deltas: Tensor
    """[B, N, 4] float32 box deltas relative to the anchors, levels concatenated."""
    anchors: Tensor
    """[N, 4] float32, xyxy in pixels of the canvas."""
    level_lengths: tuple[int, ...]
    """Number of anchors of each of the L levels; they sum to N."""


class RetinaHead(nn.Module):
    """Two branches of 3x3 convolutions, shared by all levels, with their losses and detections."""

    class_rows = MappingProxyType({"class_logits": ClassRows()})
    output_stds = MappingProxyType({"class_logits": 0.4, "box_deltas": 0.1})

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        config: RetinaConfig = RetinaConfig(),
        conventions: Conventions = MODERN,
    ) -> None:
        """Build the head.

        Args:
            channels: number of channels of every feature level.
            strides: stride of each level in pixels of the canvas, finest first.
            num_classes: C, without background.
            config: hyperparameters of the head.
            conventions: box geometry that the weights were (or will be) trained with.
        """
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.conventions = conventions
        sizes = [
            octave_sizes(config.anchor_scale * stride, config.scales_per_octave, conventions.anchor_rounding)
            for stride in strides
        ]
        self.anchors = AnchorGrid(strides, sizes, config.ratios, conventions)
        num_anchors = config.scales_per_octave * len(config.ratios)
        self.class_convs = _Branch(channels, config)
        self.class_logits = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.box_convs = _Branch(channels, config)
        self.box_deltas = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        assert self.class_logits.bias is not None
        nn.init.constant_(self.class_logits.bias, math.log(config.prior / (1 - config.prior)))

    def forward(self, features: Sequence[Tensor], canvas: tuple[int, int]) -> RetinaOutput:
        """Classify and refine every anchor.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            canvas: (height, width) of the canvas that the features were computed from, in pixels.
        """
        logits = [by_anchor(self.class_logits(self.class_convs(x)), self.num_classes) for x in features]
        deltas = [at_least_float32(by_anchor(self.box_deltas(self.box_convs(x)), 4)) for x in features]
        return RetinaOutput(
            logits=tuple(logits),
            deltas=torch.cat(deltas, 1),
            anchors=torch.cat(self.anchors(features, canvas)),
            level_lengths=tuple(level.shape[1] for level in logits),
        )

    def losses(self, output: RetinaOutput, targets: Targets) -> dict[str, Tensor]:
        """Focal loss of the classes and box regression loss, both divided by the number of positives in the batch.

        Args:
            output: output of the head.
            targets: ground truth of the batch.

        Returns:
            Scalars `retina_class` and `retina_box`. Without objects, every anchor is background and `retina_box` is 0.
        """
        config, plus_one = self.config, self.conventions.plus_one
        matches = match(
            output.anchors,
            targets,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            low_quality=config.low_quality,
            plus_one=plus_one,
        )
        positive, counts = matches.labels == POSITIVE, matches.labels != IGNORED
        labels = torch.where(positive, take_slots(targets.labels, matches.matched), self.num_classes)
        class_loss = [
            sigmoid_focal_loss(logits, level_labels, valid, alpha=config.focal_alpha, gamma=config.focal_gamma)
            for logits, level_labels, valid in zip(
                output.logits, *(rows.split(output.level_lengths, 1) for rows in (labels, counts)), strict=True
            )
        ]
        box_loss = box_regression_loss(
            config.box_loss,
            output.deltas,
            output.anchors,
            take_slots(targets.boxes, matches.matched),
            positive,
            stds=DELTA_STDS,
            smooth_l1_beta=config.smooth_l1_beta,
            plus_one=plus_one,
        )
        class_mean = weighted_mean(torch.cat(class_loss, 1), counts, over=positive)
        return {
            "retina_class": config.class_loss_weight * class_mean,
            "retina_box": config.box_loss_weight * weighted_mean(box_loss, positive),
        }

    @torch.no_grad()
    def detect(self, output: RetinaOutput, image_sizes: Tensor) -> Detections:
        """Select the best scores of each level, then apply NMS within each class over all levels.

        Args:
            output: output of the head.
            image_sizes: [B, 2] (height, width), to which boxes are clipped.

        Returns:
            Detections in D = `max_detections` slots, or fewer if there are fewer candidates.
        """
        config, plus_one = self.config, self.conventions.plus_one
        logits, indices, labels, start = [], [], [], 0
        for level, length in zip(output.logits, output.level_lengths, strict=True):
            # The k best (anchor, class) scores belong to the k anchors with the best maximum scores. Sorting N maxima
            # is much cheaper than sorting N * C scores.
            best_class = level.amax(2)
            best_class = torch.where(best_class.isfinite(), best_class, -torch.inf)
            anchors = best_class.topk(min(config.pre_nms_per_level, length)).indices
            finite = take_slots(best_class, anchors).isfinite()[..., None]
            rows = torch.where(finite, take_slots(level, anchors), -torch.inf).flatten(1)
            best, places = rows.topk(min(config.pre_nms_per_level, rows.shape[1]))
            logits.append(at_least_float32(best))
            indices.append(anchors.gather(1, places // self.num_classes) + start)
            labels.append(places % self.num_classes)
            start += length
        scores, candidates, classes = torch.cat(logits, 1).sigmoid(), torch.cat(indices, 1), torch.cat(labels, 1)
        boxes = box_geometry.decode(
            take_slots(output.deltas, candidates), output.anchors[candidates], DELTA_STDS, plus_one=plus_one
        )
        if config.clip_first:
            boxes = box_geometry.clip(boxes, image_sizes, plus_one=plus_one)
        kept = torch.ones_like(classes, dtype=torch.bool)
        if config.drop_empty:
            kept = _has_area(boxes, plus_one)
        detections = self.suppression(boxes, scores, classes, kept)
        if config.clip_first:
            return detections
        boxes = box_geometry.clip(detections.boxes, image_sizes, plus_one=plus_one)
        return replace(detections, boxes=boxes, valid=detections.valid & _has_area(boxes, plus_one))

    @property
    def suppression(self) -> Suppression:
        """Score threshold and NMS that turn scored boxes into detections."""
        return Suppression(
            score_threshold=self.config.score_threshold,
            iou_threshold=self.config.nms_iou,
            max_detections=self.config.max_detections,
            plus_one=self.conventions.plus_one,
        )


def _has_area(boxes: Tensor, plus_one: float) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] + plus_one > 0).all(-1)


class _Branch(nn.Sequential):
    """3x3 convolutions, each followed by an optional normalisation layer and a ReLU."""

    def __init__(self, channels: int, config: RetinaConfig) -> None:
        layers: list[nn.Module] = []
        for _ in range(config.num_convs):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=config.norm is None))
            if config.norm is not None:
                layers.append(make_norm(config.norm, channels))
            layers.append(nn.ReLU())
        super().__init__(*layers)
        self._has_norms = config.norm is not None

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        step = 3 if self._has_norms else 2
        for first in range(0, len(self), step):
            conv, norm, relu = self[first], self[first + 1] if self._has_norms else None, self[first + step - 1]
            if is_stock(relu, nn.ReLU):
                x = conv_norm(conv, norm, x, relu=True)
            else:
                x = relu(conv_norm(conv, norm, x))
        return x

"""Cascade R-CNN: a sequence of box heads in which each head refines the boxes of the previous one.

The IoU threshold for positives rises from stage to stage.

B images, P proposals, S sampled boxes, C classes.

Source: Cai & Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.checks import check_choice, check_number, check_numbers
from boxwright.detectors.detector import Detector, PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.heads.box_sample import FIRST_OBJECT_SOURCE, SampledBoxes
from boxwright.heads.mask_head import MaskConfig, MaskHead
from boxwright.heads.rpn_head import RPNConfig, RPNHead
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections, Proposals

Stds = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Hyperparameters that differ between the stages, and how the stages are combined.

    The first stage is configured by `BoxConfig`. The tuples here have one entry for each later stage. The defaults
    follow mmdetection 0.5 (2018).
    """

    positive_ious: tuple[float, ...] = (0.6, 0.7)
    """IoU threshold for positives of each later stage: a box with at least this IoU with an object is positive."""
    stds: tuple[Stds, ...] = ((0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    """Standard deviations (x, y, width, height) by which each later stage divides its box deltas. They fall from stage
    to stage, because the boxes get closer to their objects."""
    loss_weights: tuple[float, ...] = (0.5, 0.25)
    """Loss weight of each later stage; the first stage has weight 1."""
    mean_of: Literal["logits", "probabilities"] = "logits"
    """How the class scores of the stages are averaged: "logits" averages the class logits and applies softmax to the
    mean (mmdetection), "probabilities" averages the class probabilities (Detectron2)."""
    mask_in_all_stages: bool = True
    """Whether every stage has a mask head; their mask probabilities are averaged (mmdetection). If False, only the
    first stage has one: it is trained on the first stage's boxes and applied to the last stage's detections
    (Detectron2)."""

    def __post_init__(self) -> None:
        if not len(self.positive_ious) == len(self.stds) == len(self.loss_weights):
            raise ValueError(
                "cascade: positive_ious, stds and loss_weights must have the same length, got "
                f"{len(self.positive_ious)}, {len(self.stds)} and {len(self.loss_weights)}"
            )
        check_numbers(self, "positive_ious", least=0, most=1)
        check_numbers(self, "loss_weights", least=0)
        for stds in self.stds:
            for std in stds:
                check_number("stds", std, 0, above=True)
        check_choice("mean_of", self.mean_of, ("logits", "probabilities"))


class CascadeRCNN(Detector):
    """A backbone, a region proposal network, one box head per stage and, optionally, mask heads."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        rpn: RPNHead,
        box_heads: Sequence[BoxHead],
        mask_heads: Sequence[MaskHead] = (),
        loss_weights: Sequence[float],
        mean_of: Literal["logits", "probabilities"] = "logits",
        pixel_stats: PixelStats,
    ) -> None:
        """Assemble the detector from its parts.

        Args:
            backbone: feature pyramid whose levels all have the same number of channels.
            rpn: proposes the boxes of the first stage.
            box_heads: one per stage; all except the last must be class-agnostic.
            mask_heads: one per stage, or one for the first stage, or none.
            loss_weights: one per stage.
            mean_of: see `CascadeConfig`.
            pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        """
        super().__init__()
        self.num_classes = box_heads[0].num_classes
        self.max_detections = box_heads[-1].config.max_detections
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.rpn = rpn
        self.box_heads = nn.ModuleList(box_heads)
        self.mask_heads = nn.ModuleList(mask_heads)
        self.loss_weights = tuple(loss_weights)
        self.mean_of = mean_of
        self.needs_masks = len(self.mask_heads) > 0

    @property
    def suppression(self) -> Suppression:  # type: ignore[override]  # follows a box head that was replaced
        """NMS of the last stage's box head."""
        return self._stages[-1].suppression

    @property
    def _stages(self) -> list[BoxHead]:
        return cast(list[BoxHead], list(self.box_heads))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The RPN's losses and the weighted losses of each stage, whose names end with the stage number (from 1).

        As in mmdetection 0.5 (2018), a stage refines its sampled boxes, and the next stage draws a new sample from the
        refined boxes and the ground truth; refined ground-truth boxes are dropped. Detectron2 instead adds ground truth
        before the first stage only, refines it too, and uses the same boxes in all stages. Detectron2 also weights all
        stages equally and scales the gradients that they send to the features by 1 / number of stages.
        """
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        canvas = (batch.images.shape[2], batch.images.shape[3])
        losses = self.rpn.losses(features, canvas, batch, batch.targets)
        proposals = self.rpn.propose(features, canvas, batch.image_sizes, training=True)
        stages = self._stages
        for stage, (head, weight) in enumerate(zip(stages, self.loss_weights, strict=True)):
            sampled = head.sample(proposals, batch.targets, batch.seeds, features, stage)
            logits, deltas = head(features, sampled.boxes, sampled.valid)
            stage_losses = head.losses_of(logits, deltas, sampled, batch.targets)
            if stage < len(self.mask_heads):
                max_positives = head.config.max_positives
                mask_head = cast(MaskHead, self.mask_heads[stage])
                stage_losses |= mask_head.losses(features, sampled, batch.targets, max_positives=max_positives)
            losses |= {f"{name}_{stage + 1}": weight * loss for name, loss in stage_losses.items()}
            if stage + 1 < len(stages):
                proposals = refined_proposals(head, sampled, deltas, batch.image_sizes)
        return losses

    def detect(self, batch: Batch) -> Detections:
        """Boxes of the last stage; class scores are averaged over the stages, masks over the mask heads."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals = self.rpn.propose(
            features, (batch.images.shape[2], batch.images.shape[3]), batch.image_sizes, training=False
        )
        boxes = torch.where(proposals.valid[..., None], proposals.boxes, 0.0)
        stages = self._stages
        stage_scores = []
        for head in stages:
            logits, deltas = head(features, boxes, proposals.valid)
            stage_scores.append(logits if self.mean_of == "logits" else logits.softmax(-1))
            refined = head.refine(boxes, deltas, batch.image_sizes)
            boxes = refined[:, :, 0]
        mean = torch.stack(stage_scores).mean(0)
        probabilities = mean.softmax(-1) if self.mean_of == "logits" else mean
        detections = stages[-1].best_detections(probabilities, refined, proposals.valid)
        return self._with_masks(features, detections) if self.needs_masks else detections

    def _with_masks(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        heads = cast(list[MaskHead], list(self.mask_heads))
        masks = torch.stack([cast(Tensor, head.detect(features, detections).masks) for head in heads])
        return replace(detections, masks=masks.mean(0))


@torch.no_grad()
def refined_proposals(head: BoxHead, sampled: SampledBoxes, deltas: Tensor, image_sizes: Tensor) -> Proposals:
    """Proposals for the next stage: this stage's sampled boxes after refinement, without the ground-truth boxes.

    Args:
        head: class-agnostic box head of this stage.
        sampled: the S sampled boxes of this stage.
        deltas: [B, S, 1, 4] box deltas that `head` predicted for `sampled`.
        image_sizes: [B, 2] (height, width).

    Returns:
        Proposals in S slots. They keep the `sources` of the sampled boxes; their order and scores carry no information.
    """
    return Proposals(
        boxes=head.refine(sampled.boxes, deltas, image_sizes)[:, :, 0],
        scores=torch.zeros_like(sampled.boxes[..., 0]),
        valid=sampled.valid & (sampled.sources < FIRST_OBJECT_SOURCE),
        sources=sampled.sources,
    )


def cascade_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(class_agnostic=True),
    cascade: CascadeConfig = CascadeConfig(),
    rpn_head: Callable[..., RPNHead] = RPNHead,
    box_head: Callable[..., BoxHead] = BoxHead,
) -> CascadeRCNN:
    """Build a Cascade R-CNN on a feature pyramid.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the first stage, and of the later stages except for those in `cascade`.
        cascade: hyperparameters that differ in the later stages, and how the stages are combined.
        rpn_head: RPN head factory, called with (channels, strides, rpn, conventions).
        box_head: box head factory, called for each stage with (channels, strides, num_classes, hyperparameters,
            conventions).

    Raises:
        ValueError: `box` is not class-agnostic, so there is no single box to pass on to the next stage.
    """
    channels, strides = backbone.channels[0], backbone.strides
    return CascadeRCNN(
        backbone=backbone,
        rpn=rpn_head(channels, strides, rpn, conventions),
        box_heads=[
            box_head(channels, strides, num_classes, config, conventions) for config in _stage_configs(box, cascade)
        ],
        loss_weights=(1.0, *cascade.loss_weights),
        mean_of=cascade.mean_of,
        pixel_stats=pixel_stats,
    )


def cascade_mask_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    pixel_stats: PixelStats = PYTORCH,
    conventions: Conventions = MODERN,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(class_agnostic=True),
    cascade: CascadeConfig = CascadeConfig(),
    mask: MaskConfig = MaskConfig(),
    rpn_head: Callable[..., RPNHead] = RPNHead,
    box_head: Callable[..., BoxHead] = BoxHead,
    mask_head: Callable[..., MaskHead] = MaskHead,
) -> CascadeRCNN:
    """Build a Cascade Mask R-CNN on a feature pyramid: `cascade_rcnn` with mask heads in all stages or in the first.

    Source: Cai & Vasconcelos, Cascade R-CNN: High Quality Object Detection and Instance Segmentation (2019); two of
    the three variants in the paper.

    Args:
        backbone: feature pyramid whose levels all have the same number of channels.
        num_classes: number of object classes, without background.
        pixel_stats: pixel mean, standard deviation and colour order that the backbone was trained with.
        conventions: box geometry that the weights were (or will be) trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the first stage, and of the later stages except for those in `cascade`.
        cascade: hyperparameters that differ in the later stages, and how the stages are combined.
        mask: hyperparameters of each mask head.
        rpn_head: RPN head factory, called with (channels, strides, rpn, conventions).
        box_head: box head factory, called for each stage with (channels, strides, num_classes, hyperparameters,
            conventions).
        mask_head: mask head factory, called for each mask head with (channels, strides, num_classes, mask,
            conventions).

    Raises:
        ValueError: `box` is not class-agnostic.
    """
    channels, strides = backbone.channels[0], backbone.strides
    stages = _stage_configs(box, cascade)
    num_mask_heads = len(stages) if cascade.mask_in_all_stages else 1
    return CascadeRCNN(
        backbone=backbone,
        rpn=rpn_head(channels, strides, rpn, conventions),
        box_heads=[box_head(channels, strides, num_classes, config, conventions) for config in stages],
        mask_heads=[mask_head(channels, strides, num_classes, mask, conventions) for _ in range(num_mask_heads)],
        loss_weights=(1.0, *cascade.loss_weights),
        mean_of=cascade.mean_of,
        pixel_stats=pixel_stats,
    )


def _stage_configs(box: BoxConfig, cascade: CascadeConfig) -> list[BoxConfig]:
    if cascade.positive_ious and not box.class_agnostic:
        raise ValueError(
            "box.class_agnostic: expected true for a cascade, got false. Use --set box.class_agnostic=true."
        )
    later = zip(cascade.positive_ious, cascade.stds, strict=True)
    return [box, *(replace(box, positive_iou=iou, stds=stds) for iou, stds in later)]

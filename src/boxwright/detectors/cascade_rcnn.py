"""Cascade R-CNN: box heads one after another, each refining the boxes of the one before and asking for more overlap.

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
    """What differs from stage to stage, and how the stages are joined; the defaults are the 2018 toolbox's.

    The first stage is the box head as it stands, so that the numbers are of the stages behind it.
    """

    positive_ious: tuple[float, ...] = (0.6, 0.7)
    """A box with at least this IoU with an object is positive in the stage."""
    stds: tuple[Stds, ...] = ((0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    """Box deltas of the stage are divided by these: the boxes of a later stage are nearer to their objects."""
    loss_weights: tuple[float, ...] = (0.5, 0.25)
    """What the stage's losses are multiplied by; the first stage's by 1."""
    mean_of: Literal["logits", "probabilities"] = "logits"
    """What is averaged over the stages to score a box: class logits, then made probabilities (the 2018 toolbox and its
    successors), or the probabilities themselves (Detectron2)."""
    mask_in_all_stages: bool = True
    """Whether each stage has a mask head, whose probabilities are averaged (the 2018 toolbox and its successors), or
    the first alone, which learns from the first stage's boxes and looks at the last one's (Detectron2)."""

    def __post_init__(self) -> None:
        if not len(self.positive_ious) == len(self.stds) == len(self.loss_weights):
            raise ValueError(f"{self}: give as many positive_ious as stds and loss_weights, one a stage but the first")
        check_numbers(self, "positive_ious", least=0, most=1)
        check_numbers(self, "loss_weights", least=0)
        for stds in self.stds:
            for std in stds:
                check_number("stds", std, 0, above=True)
        check_choice("mean_of", self.mean_of, ("logits", "probabilities"))


class CascadeRCNN(Detector):
    """A backbone, a region proposal network and a box head a stage, maybe mask heads too."""

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
        """Put the parts together.

        Args:
            backbone: gives a pyramid whose levels have equal channels.
            rpn: where the first stage's boxes come from.
            box_heads: one a stage, class-agnostic but for the last.
            mask_heads: one a stage, or one for the first, or none.
            loss_weights: one a stage.
            mean_of: see `CascadeConfig`.
            pixel_stats: what the backbone expects of pixels.
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
        """The RPN's losses and, with the stage's number behind their names, each stage's, weighted.

        As in the 2018 toolbox, the boxes that a stage looked at are refined by it, and the next one samples anew among
        them and the ground truth; the refined ground truth itself is dropped. detectron2 instead adds ground truth
        before the first stage alone, refines it too, and looks at the same boxes in all stages. It weighs the
        stages alike, and the gradients that they send to the features by one over their number.
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
            own = head.losses_of(logits, deltas, sampled, batch.targets)
            if stage < len(self.mask_heads):
                max_positives = head.config.max_positives
                mask_head = cast(MaskHead, self.mask_heads[stage])
                own |= mask_head.losses(features, sampled, batch.targets, max_positives=max_positives)
            losses |= {f"{name}_{stage + 1}": weight * loss for name, loss in own.items()}
            if stage + 1 < len(stages):
                proposals = refined_proposals(head, sampled, deltas, batch.image_sizes)
        return losses

    def detect(self, batch: Batch) -> Detections:
        """The last stage's boxes, scored by all stages; their masks are the mean of all mask heads' probabilities."""
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        proposals = self.rpn.propose(
            features, (batch.images.shape[2], batch.images.shape[3]), batch.image_sizes, training=False
        )
        boxes = torch.where(proposals.valid[..., None], proposals.boxes, 0.0)
        stages = self._stages
        said = []
        for head in stages:
            logits, deltas = head(features, boxes, proposals.valid)
            said.append(logits if self.mean_of == "logits" else logits.softmax(-1))
            refined = head.refine(boxes, deltas, batch.image_sizes)
            boxes = refined[:, :, 0]
        mean = torch.stack(said).mean(0)
        probabilities = mean.softmax(-1) if self.mean_of == "logits" else mean
        detections = stages[-1].best_detections(probabilities, refined, proposals.valid)
        return self._with_masks(features, detections) if self.needs_masks else detections

    def _with_masks(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        heads = cast(list[MaskHead], list(self.mask_heads))
        masks = torch.stack([cast(Tensor, head.detect(features, detections).masks) for head in heads])
        return replace(detections, masks=masks.mean(0))


@torch.no_grad()
def refined_proposals(head: BoxHead, sampled: SampledBoxes, deltas: Tensor, image_sizes: Tensor) -> Proposals:
    """The next stage's proposals: the boxes that this stage looked at, as it would have them, without ground truth.

    Args:
        head: the stage, class-agnostic.
        sampled: what it looked at, S slots.
        deltas: [B, S, 1, 4] what it said.
        image_sizes: [B, 2] (height, width).

    Returns:
        S slots, known by the sources that they were made from; their order and scores mean nothing.
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
        backbone: gives a pyramid whose levels have equal channels.
        num_classes: object classes, background not counted.
        pixel_stats: what the backbone expects of pixels.
        conventions: the geometry that the weights were or will be trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the first stage, and of the later stages except for those in `cascade`.
        cascade: what is different in the stages behind the first.
        rpn_head: called with (channels, strides, rpn, conventions).
        box_head: called for each stage with (channels, strides, num_classes, hyperparameters, conventions).

    Raises:
        ValueError: `box` has a box for each class, and so none to hand on to a next stage.
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
    """Build a Cascade Mask R-CNN on a feature pyramid: `cascade_rcnn` with a mask head in each stage or in the first.

    Source: Cai & Vasconcelos, Cascade R-CNN: High Quality Object Detection and Instance Segmentation (2019), two of
    its three forms.

    Args:
        backbone: gives a pyramid whose levels have equal channels.
        num_classes: object classes, background not counted.
        pixel_stats: what the backbone expects of pixels.
        conventions: the geometry that the weights were or will be trained with.
        rpn: hyperparameters of the region proposal network.
        box: hyperparameters of the first stage, and of the later stages except for those in `cascade`.
        cascade: what is different in the stages behind the first.
        mask: hyperparameters of each mask head.
        rpn_head: called with (channels, strides, rpn, conventions).
        box_head: called for each stage with (channels, strides, num_classes, hyperparameters, conventions).
        mask_head: called for each mask head with (channels, strides, num_classes, mask, conventions).

    Raises:
        ValueError: as `cascade_rcnn`.
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
        raise ValueError("a cascade hands one box of each proposal on to its next stage: set box.class_agnostic=true")
    later = zip(cascade.positive_ious, cascade.stds, strict=True)
    return [box, *(replace(box, positive_iou=iou, stds=stds) for iou, stds in later)]

"""Cascade R-CNN: box heads one after another, each refining the boxes of the one before and asking for more overlap.

B images, P proposals, S sampled boxes, C classes.

Source: Cai & Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PYTORCH, Backbone, PixelStats
from boxwright.detectors.detector import PixelNormalizer
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import FIRST_OBJECT_SOURCE, BoxConfig, BoxHead, SampledBoxes
from boxwright.heads.rpn_head import RPNConfig, RPNHead
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections, Proposals

Stds = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """What differs from stage to stage; the defaults are the paper's and the 2018 toolbox's.

    The first stage is the box head as it stands, so that these are of the stages behind it.
    """

    positive_ious: tuple[float, ...] = (0.6, 0.7)
    """A box with at least this IoU with an object is positive in the stage."""
    stds: tuple[Stds, ...] = ((0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    """Box deltas of the stage are divided by these: the boxes of a later stage are nearer to their objects."""
    loss_weights: tuple[float, ...] = (0.5, 0.25)
    """What the stage's losses are multiplied by; the first stage's by 1."""

    def __post_init__(self) -> None:
        if not len(self.positive_ious) == len(self.stds) == len(self.loss_weights):
            raise ValueError(f"{self}: give as many positive_ious as stds and loss_weights, one a stage but the first")


class CascadeRCNN(nn.Module):
    """A backbone, a region proposal network and a box head a stage."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        rpn: RPNHead,
        box_heads: Sequence[BoxHead],
        loss_weights: Sequence[float],
        pixel_stats: PixelStats,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: gives a pyramid whose levels have equal channels.
            rpn: where the first stage's boxes come from.
            box_heads: one a stage, class-agnostic but for the last.
            loss_weights: one a stage.
            pixel_stats: what the backbone expects of pixels.
        """
        super().__init__()
        self.num_classes = box_heads[0].num_classes
        self.normalize = PixelNormalizer(pixel_stats)
        self.backbone = backbone
        self.rpn = rpn
        self.box_heads = nn.ModuleList(box_heads)
        self.loss_weights = tuple(loss_weights)

    @property
    def suppression(self) -> Suppression:
        """How its scored boxes become detections."""
        return self._stages[-1].suppression

    @property
    def _stages(self) -> list[BoxHead]:
        return cast(list[BoxHead], list(self.box_heads))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The RPN's losses and, with the stage's number behind their names, each stage's, weighted.

        As in the 2018 toolbox, the boxes that a stage looked at are refined by it, and the next one samples anew among
        them and the ground truth; the refined ground truth itself is dropped. detectron2 instead adds ground truth
        before the first stage alone, refines it too, and looks at the same boxes in all stages.
        """
        assert batch.targets is not None, "losses need targets"
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        output = self.rpn(features, batch.images.shape[-2:])
        losses = self.rpn.losses(output, batch, batch.targets)
        proposals = self.rpn.proposals(output, batch.image_sizes, training=True)
        stages = self._stages
        for stage, (head, weight) in enumerate(zip(stages, self.loss_weights, strict=True)):
            if stage > 0:
                proposals = refined_proposals(stages[stage - 1], sampled, deltas, batch.image_sizes)
            sampled = head.sample(proposals, batch.targets, batch.seeds, features, stage)
            logits, deltas = head(features, sampled.boxes, sampled.valid)
            own = head.losses_of(logits, deltas, sampled, batch.targets)
            losses |= {f"{name}_{stage + 1}": weight * loss for name, loss in own.items()}
        return losses

    def detect(self, batch: Batch) -> Detections:
        """The last stage's boxes, scored by all stages.

        As in the 2018 toolbox, the class logits of the stages are averaged and then made probabilities. detectron2
        averages the probabilities.
        """
        features = self.backbone(self.normalize(batch.images, batch.image_sizes))
        output = self.rpn(features, batch.images.shape[-2:])
        proposals = self.rpn.proposals(output, batch.image_sizes, training=False)
        boxes = torch.where(proposals.valid[..., None], proposals.boxes, 0.0)
        stages = self._stages
        all_logits = []
        for head in stages:
            logits, deltas = head(features, boxes, proposals.valid)
            all_logits.append(logits)
            refined = head.refine(boxes, deltas, batch.image_sizes)
            boxes = refined[:, :, 0]
        return stages[-1].best_detections(sum(all_logits) / len(stages), refined, proposals.valid)


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
) -> CascadeRCNN:
    """Build a Cascade R-CNN on a feature pyramid.

    Args:
        backbone: gives a pyramid whose levels have equal channels.
        num_classes: object classes, background not counted.
        pixel_stats: what the backbone expects of pixels.
        conventions: the geometry that the weights were or will be trained with.
        rpn: the numbers of the proposals.
        box: the numbers of the first stage, and of the others but for what `cascade` says.
        cascade: what is different in the stages behind the first.

    Raises:
        ValueError: `box` has a box for each class, and so none to hand on to a next stage.
    """
    channels, strides = backbone.channels[0], backbone.strides
    return CascadeRCNN(
        backbone=backbone,
        rpn=RPNHead(channels, strides, rpn, conventions),
        box_heads=[
            BoxHead(channels, strides, num_classes, config, conventions) for config in stage_configs(box, cascade)
        ],
        loss_weights=(1.0, *cascade.loss_weights),
        pixel_stats=pixel_stats,
    )


def stage_configs(box: BoxConfig, cascade: CascadeConfig) -> list[BoxConfig]:
    """The numbers of each stage's box head. Raises as `cascade_rcnn` does."""
    if cascade.positive_ious and not box.class_agnostic:
        raise ValueError("a cascade hands one box of each proposal on to its next stage: set box.class_agnostic=true")
    later = zip(cascade.positive_ious, cascade.stds, strict=True)
    return [box, *(replace(box, positive_iou=iou, stds=stds) for iou, stds in later)]

"""maskrcnn-benchmark: detectors with a ResNet-FPN.

They follow Detectron: background first, BGR pixels, stride in the first 1x1 convolution (not in ResNeXts), Detectron's
anchors. Norm layers have epsilon 0, and RetinaNet's deltas are scaled as in a box head.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from boxwright.backbones.backbone import CAFFE
from boxwright.geometry.conventions import CAFFE2
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import coco_by_count
from boxwright.importers.rules import (
    Rule,
    Unsupported,
    background_to_last,
    without_background,
    without_background_deltas,
)
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile


def unscale_deltas(rows: Tensor) -> Tensor:
    """[A * 4, ...] RetinaNet's last layer for deltas in units of 0.1, 0.1, 0.2, 0.2 -> for unscaled deltas."""
    stds = torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=rows.dtype).repeat(rows.shape[0] // 4)
    return rows * stds.view(-1, *(1,) * (rows.ndim - 1))


def rules(names: Set[str]) -> Sequence[Rule | Unsupported]:
    """Rules for all models. A RetinaNet's head has the names of an RPN, and its pyramid starts at the second stage."""
    retina = any_starts(names, "rpn.head.cls_tower.")
    first = 2 if retina else 1
    single_stage = (
        Rule("rpn.head.cls_tower.{i}.*", "head.class_convs.{i}.*"),
        Rule("rpn.head.bbox_tower.{i}.*", "head.box_convs.{i}.*"),
        Rule("rpn.head.cls_logits.*", "head.class_logits.*"),
        Rule("rpn.head.bbox_pred.*", "head.box_deltas.*", unscale_deltas),
    )
    proposals = (
        Rule("rpn.head.conv.*", "rpn.conv.*"),
        Rule("rpn.head.cls_logits.*", "rpn.objectness.*"),
        Rule("rpn.head.bbox_pred.*", "rpn.deltas.*"),
    )
    return (
        Rule("*.num_batches_tracked", None),
        Rule("rpn.anchor_generator.cell_anchors.{i}", None),
        Rule("backbone.body.stem.*", "backbone.body.*"),
        Unsupported("backbone.body.layer{i}.{b}.conv2.offset.*", "deformable convolutions are not supported"),
        Rule("backbone.body.layer{i}.*", "backbone.body.layer{i}.*"),
        Rule("backbone.fpn.fpn_inner{i}.*", f"backbone.lateral.{{i-{first}}}.*"),
        Rule("backbone.fpn.fpn_layer{i}.*", f"backbone.output.{{i-{first}}}.*"),
        Rule("backbone.fpn.top_blocks.p6.*", "backbone.extra_output.0.*"),
        Rule("backbone.fpn.top_blocks.p7.*", "backbone.extra_output.1.*"),
        *(single_stage if retina else proposals),
        Rule("roi_heads.box.feature_extractor.fc6.*", "box_head.fc1.*"),
        Rule("roi_heads.box.feature_extractor.fc7.*", "box_head.fc2.*"),
        Rule("roi_heads.box.predictor.cls_score.*", "box_head.class_logits.*", background_to_last),
        Rule("roi_heads.box.predictor.bbox_pred.*", "box_head.box_deltas.*", without_background_deltas),
        Rule("roi_heads.mask.feature_extractor.mask_fcn{i}.*", "mask_head.convs.{i-1}.*"),
        Rule("roi_heads.mask.predictor.conv5_mask.*", "mask_head.upsample.*"),
        Rule("roi_heads.mask.predictor.mask_fcn_logits.*", "mask_head.mask_logits.*", without_background),
        Unsupported("roi_heads.keypoint.*", "keypoints are not supported"),
    )


SETTINGS = Settings(
    conventions=CAFFE2,
    pixel_stats=CAFFE,
    style="caffe",
    extra_relu=True,
    train_norm_affine=False,
    # maskrcnn-benchmark keeps the best 2000 proposals of the two images of a GPU, about 1000 per image.
    rpn=RPNConfig(low_quality=0.0, num_proposals=1000, test_pre_nms_per_level=1000, test_num_proposals=1000),
    # maskrcnn-benchmark divides deltas by 0.1, 0.1, 0.2, 0.2 and the box loss by 4, with beta 0.11. For unscaled deltas
    # this is beta 0.011 and weight 2.5 for centres, beta 0.022 and weight 1.25 for sizes. Boxwright has one beta and
    # one weight, which are set to the means.
    retina=RetinaConfig(nms_iou=0.4, smooth_l1_beta=0.0165, box_loss_weight=1.875),
    norm_eps=0.0,
)


def _settings(file: ForeignFile) -> Settings:
    """Settings of a file. ResNeXts have the pytorch style, and an RPN without box head keeps 2000 proposals."""
    weight = file.tensors.get("backbone.body.layer1.0.conv2.weight")
    grouped = weight is not None and weight.shape[0] != weight.shape[1]
    rpn = SETTINGS.rpn
    if not any_starts(file.tensors.keys(), "roi_heads."):
        rpn = replace(rpn, test_num_proposals=2000)
    return replace(SETTINGS, style="pytorch" if grouped else SETTINGS.style, rpn=rpn)


MASKRCNN_BENCHMARK = Source(
    name="maskrcnn_benchmark",
    title="a maskrcnn-benchmark detector",
    recognises=lambda names, file: any_starts(names, "backbone.body.stem."),
    rules=rules,
    settings=_settings,
    categories=coco_by_count,
)

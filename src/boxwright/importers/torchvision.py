"""torchvision's detectors with a ResNet-FPN, and ResNets and ResNeXts of torchvision and timm as backbones.

Labels are COCO ids including the unused ones: 91 rows, of which the first is the background (in RetinaNet an untrained
row).
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace

from boxwright.data.dataset import Category
from boxwright.geometry.conventions import TORCHVISION as GEOMETRY
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import by_coco_id
from boxwright.importers.rules import (
    Rule,
    Unsupported,
    background_to_last,
    without_background,
    without_background_deltas,
)
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile

_FIRST_MODELS = ("258fb6c6", "bf2d0c1e", "eeacb38b")
"""First digits of the hashes of the first published Faster R-CNN, Mask R-CNN and RetinaNet, as in their file names.
Their norm layers have epsilon 0; all later models have 1e-5."""

SETTINGS = Settings(
    conventions=GEOMETRY,
    extra_relu=True,
    train_norm_affine=False,
    rpn=RPNConfig(border=None, low_quality=0.0, test_pre_nms_per_level=1000, test_num_proposals=1000),
    box=BoxConfig(smooth_l1_beta=1 / 9),
    retina=RetinaConfig(smooth_l1_beta=0.0, max_detections=300),
)


def rules(names: Set[str]) -> Sequence[Rule | Unsupported]:
    """Rules for detectors. In the second models (`_v2`), norm layers follow the convolutions.

    In Boxwright, a convolution with a norm is a pair of layers; in RetinaNet's head it adds one layer to the sequence.
    """
    pair = ".0" if "backbone.fpn.inner_blocks.0.1.weight" in names else ""
    box_pair = ".0" if "roi_heads.box_head.0.1.weight" in names else ""
    mask_pair = ".0" if "roi_heads.mask_head.0.1.weight" in names else ""
    layers = 3 if "head.classification_head.conv.0.1.weight" in names else 2
    num_box_convs = sum(re.fullmatch(r"roi_heads\.box_head\.\d+\.0\.weight", name) is not None for name in names)
    return (
        Rule("*.num_batches_tracked", None),
        Unsupported("roi_heads.keypoint*", "keypoints are not supported"),
        Rule("backbone.body.*", "backbone.body.*"),
        Rule("backbone.fpn.inner_blocks.{i}.0.*", f"backbone.lateral.{{i}}{pair}.*"),
        Rule("backbone.fpn.layer_blocks.{i}.0.*", f"backbone.output.{{i}}{pair}.*"),
        Rule("backbone.fpn.inner_blocks.{i}.1.*", "backbone.lateral.{i}.1.*"),
        Rule("backbone.fpn.layer_blocks.{i}.1.*", "backbone.output.{i}.1.*"),
        # Before torchvision 0.13.
        Rule("backbone.fpn.inner_blocks.{i}.*", "backbone.lateral.{i}.*"),
        Rule("backbone.fpn.layer_blocks.{i}.*", "backbone.output.{i}.*"),
        Rule("backbone.fpn.extra_blocks.p6.*", "backbone.extra_output.0.*"),
        Rule("backbone.fpn.extra_blocks.p7.*", "backbone.extra_output.1.*"),
        Rule("rpn.head.conv.0.0.*", "rpn.conv.*"),
        Rule("rpn.head.conv.{i}.0.*", "rpn.more_convs.{i-1}.*"),
        Rule("rpn.head.conv.*", "rpn.conv.*"),
        Rule("rpn.head.cls_logits.*", "rpn.objectness.*"),
        Rule("rpn.head.bbox_pred.*", "rpn.deltas.*"),
        Rule("roi_heads.box_head.{i}.0.*", f"box_head.convs.{{i}}{box_pair}.*"),
        Rule("roi_heads.box_head.{i}.1.*", "box_head.convs.{i}.1.*"),
        # A flatten layer precedes this layer.
        Rule("roi_heads.box_head.fc6.*", "box_head.fc1.*"),
        Rule(f"roi_heads.box_head.{num_box_convs + 1}.*", "box_head.fc1.*"),
        Rule("roi_heads.box_head.fc7.*", "box_head.fc2.*"),
        Rule("roi_heads.box_predictor.cls_score.*", "box_head.class_logits.*", background_to_last),
        Rule("roi_heads.box_predictor.bbox_pred.*", "box_head.box_deltas.*", without_background_deltas),
        Rule("roi_heads.mask_head.{i}.0.*", f"mask_head.convs.{{i}}{mask_pair}.*"),
        Rule("roi_heads.mask_head.{i}.1.*", "mask_head.convs.{i}.1.*"),
        Rule("roi_heads.mask_head.mask_fcn{i}.*", "mask_head.convs.{i-1}.*"),
        Rule("roi_heads.mask_predictor.conv5_mask.*", "mask_head.upsample.*"),
        Rule("roi_heads.mask_predictor.mask_fcn_logits.*", "mask_head.mask_logits.*", without_background),
        Rule("head.classification_head.conv.{i}.0.*", f"head.class_convs.{{i*{layers}}}.*"),
        Rule("head.classification_head.conv.{i}.1.*", f"head.class_convs.{{i*{layers}+1}}.*"),
        Rule("head.regression_head.conv.{i}.0.*", f"head.box_convs.{{i*{layers}}}.*"),
        Rule("head.regression_head.conv.{i}.1.*", f"head.box_convs.{{i*{layers}+1}}.*"),
        Rule("head.classification_head.conv.{i}.*", "head.class_convs.{i}.*"),
        Rule("head.regression_head.conv.{i}.*", "head.box_convs.{i}.*"),
        Rule("head.classification_head.cls_logits.*", "head.class_logits.*"),
        Rule("head.regression_head.bbox_reg.*", "head.box_deltas.*"),
    )


def _settings(file: ForeignFile) -> Settings:
    """Settings of the second RetinaNet, whose head has norms, and of the first models, whose norms have epsilon 0."""
    if "head.regression_head.conv.0.1.weight" in file.tensors:
        return replace(SETTINGS, retina=replace(SETTINGS.retina, box_loss="giou"), train_norm_affine=True)
    return replace(SETTINGS, norm_eps=0.0) if file.sha256.startswith(_FIRST_MODELS) else SETTINGS


def _categories(file: ForeignFile, count: int) -> Sequence[Category] | None:
    return by_coco_id(91 - count) if count in (90, 91) else None


TORCHVISION = Source(
    name="torchvision",
    title="a torchvision detector",
    recognises=lambda names, file: any_starts(names, "backbone.fpn.inner_blocks."),
    rules=rules,
    settings=_settings,
    categories=_categories,
)

_RESNET_RULES = (
    Rule("*.num_batches_tracked", None),
    Rule("fc.*", None),
    Rule("conv1.weight", "backbone.body.conv1.weight"),
    Rule("bn1.*", "backbone.body.bn1.*"),
    Rule("layer{i}.*", "backbone.body.layer{i}.*"),
)

RESNET = Source(
    name="resnet",
    title="a ResNet or ResNeXt of torchvision or timm",
    recognises=lambda names, file: {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= names,
    rules=lambda names: _RESNET_RULES,
    settings=lambda file: Settings(),
)

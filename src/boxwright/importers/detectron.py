"""Detectron (Caffe2): detectors with a ResNet-FPN, and ImageNet weights.

Background is the first class, pixels are BGR, norm layers are a scale and a bias, and the stride is in the first 1x1
convolution (in ResNeXts in the 3x3 one). Layers shared by all levels are named after the finest level.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from torch import Tensor

from boxwright.backbones.backbone import CAFFE
from boxwright.geometry.conventions import CAFFE2
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import coco_by_count
from boxwright.importers.rules import (
    Change,
    Rule,
    Unsupported,
    background_to_last,
    ratios_outermost,
    with_statistics,
    without_background,
    without_background_deltas,
)
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile


def _layer(theirs: str, ours: str, change: Change | None = None) -> tuple[Rule, Rule]:
    """Rules for the weight and the bias of a layer."""
    return Rule(f"{theirs}_w", f"{ours}.weight", change), Rule(f"{theirs}_b", f"{ours}.bias", change)


def _body() -> tuple[Rule, ...]:
    rules = [
        *_layer("conv1", "backbone.body.conv1"),
        Rule("res_conv1_bn_s", "backbone.body.bn1.weight"),
        Rule("res_conv1_bn_b", "backbone.body.bn1.bias"),
    ]
    for stage in range(2, 6):
        block = f"backbone.body.layer{stage - 1}.{{b}}"
        parts = {"1": ("downsample.0", "downsample.1")} | {f"2{c}": (f"conv{i}", f"bn{i}") for i, c in _BRANCH}
        for branch, (conv, norm) in parts.items():
            theirs = f"res{stage}_{{b}}_branch{branch}"
            rules += [
                Rule(f"{theirs}_w", f"{block}.{conv}.weight"),
                Rule(f"{theirs}_bn_s", f"{block}.{norm}.weight"),
                Rule(f"{theirs}_bn_b", f"{block}.{norm}.bias"),
            ]
    return tuple(rules)


_BRANCH = ((1, "a"), (2, "b"), (3, "c"))


def rules(names: Set[str]) -> Sequence[Rule | Unsupported]:
    """Rules for all models. The pyramid of a RetinaNet starts at stage 3, all others start at stage 2."""
    first = 2 if any_starts(names, "fpn_res2_") else 3
    return (
        Rule("*_momentum", None),
        Rule("lr", None),
        Rule("fc1000_*", None),
        Rule("pred_*", None),
        *_body(),
        *_layer("fpn_inner_res{s}_{b}_sum_lateral", f"backbone.lateral.{{s-{first}}}"),
        *_layer("fpn_inner_res{s}_{b}_sum", f"backbone.lateral.{{s-{first}}}"),
        *_layer("fpn_res{s}_{b}_sum", f"backbone.output.{{s-{first}}}"),
        *_layer("fpn_6", "backbone.extra_output.0"),
        *_layer("fpn_7", "backbone.extra_output.1"),
        *_layer("conv_rpn_fpn2", "rpn.conv"),
        *_layer("rpn_cls_logits_fpn2", "rpn.objectness"),
        *_layer("rpn_bbox_pred_fpn2", "rpn.deltas"),
        *_layer("fc6", "box_head.fc1"),
        *_layer("fc7", "box_head.fc2"),
        *_layer("cls_score", "box_head.class_logits", background_to_last),
        *_layer("bbox_pred", "box_head.box_deltas", without_background_deltas),
        *_layer("_[mask]_fcn{i}", "mask_head.convs.{i-1}"),
        *_layer("conv5_mask", "mask_head.upsample"),
        *_layer("mask_fcn_logits", "mask_head.mask_logits", without_background),
        *_layer("retnet_cls_conv_n{i}_fpn3", "head.class_convs.{i*2}"),
        *_layer("retnet_bbox_conv_n{i}_fpn3", "head.box_convs.{i*2}"),
        *_layer("retnet_cls_pred_fpn3", "head.class_logits", ratios_outermost),
        *_layer("retnet_bbox_pred_fpn3", "head.box_deltas", ratios_outermost),
        Unsupported("kps_*", "keypoints are not supported"),
    )


def finish(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add statistics to norm layers, and move the bias of the first convolution into its norm layer."""
    filled = with_statistics(tensors)
    bias = filled.pop("backbone.body.conv1.bias", None)
    if bias is not None and {"backbone.body.bn1.weight", "backbone.body.bn1.bias"} <= filled.keys():
        shift = bias.double() * filled["backbone.body.bn1.weight"].double()
        filled["backbone.body.bn1.bias"] = (filled["backbone.body.bn1.bias"].double() + shift).to(bias.dtype)
    return filled


SETTINGS = Settings(
    conventions=replace(CAFFE2, proposal_clip_multiple=32),
    pixel_stats=CAFFE,
    style="caffe",
    extra_relu=True,
    train_norm_affine=False,
    # Detectron keeps the best 2000 proposals of the two images of a GPU, about 1000 per image.
    rpn=RPNConfig(low_quality=0.0, num_proposals=1000, test_pre_nms_per_level=1000, test_num_proposals=1000),
    retina=RetinaConfig(ratios=(1.0, 2.0, 0.5)),
)


def _settings(file: ForeignFile) -> Settings:
    """Settings of a file.

    ResNeXts have the pytorch style, an RPN without box head keeps 2000 proposals, and the oldest models have unscaled
    deltas.
    """
    weight = file.tensors.get("res2_0_branch2b_w")
    grouped = weight is not None and weight.shape[0] != weight.shape[1]
    rpn, box = SETTINGS.rpn, SETTINGS.box
    if "cls_score_w" not in file.tensors:
        rpn = replace(rpn, test_num_proposals=2000)
    if "cfg" in file.about and "BBOX_REG_WEIGHTS" not in str(file.about["cfg"]):
        # As in Detectron: models without this setting were trained before it existed.
        box = replace(box, stds=(1.0, 1.0, 1.0, 1.0))
    return replace(SETTINGS, style="pytorch" if grouped else SETTINGS.style, rpn=rpn, box=box)


DETECTRON = Source(
    name="detectron",
    title="a Detectron (Caffe2) model",
    recognises=lambda names, file: {"conv1_w", "res2_0_branch2a_w"} <= names,
    rules=rules,
    settings=_settings,
    categories=coco_by_count,
    finish=finish,
)

"""Detectron2: detectors with a ResNet-FPN, and ImageNet weights under the same names.

Most models of the model zoo start from Caffe-trained ResNets: BGR pixels, mean without standard deviation, stride in
the first 1x1 convolution. Models with ResNeXt and with torchvision's ResNets divide by a standard deviation and have
the stride in the 3x3 convolution. Models with GroupNorm have the pixel statistics of the first group and the
stride of the second.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from torch import Tensor

from boxwright.backbones.backbone import PixelStats
from boxwright.detectors.cascade_rcnn import CascadeConfig
from boxwright.geometry.conventions import MODERN
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import coco_by_count
from boxwright.importers.rules import Rule, Unsupported, ratios_outermost, with_statistics
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile

MSRA = PixelStats(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), order="bgr")
"""Pixel statistics of the model zoo's ResNets."""
RESNEXT = replace(MSRA, std=(57.375, 57.12, 58.395))
"""Pixel statistics of the model zoo's ResNeXts."""

_RETINA_NORM = "RetinaNet heads with norm layers after convolutions with biases are not supported"


def _body(prefix: str) -> tuple[Rule | Unsupported, ...]:
    """Rules for a ResNet, in a detector or alone."""
    rules: list[Rule | Unsupported] = [
        Rule(f"{prefix}stem.conv1.weight", "backbone.body.conv1.weight"),
        Rule(f"{prefix}stem.conv1.norm.*", "backbone.body.bn1.*"),
        Rule(f"{prefix}stem.fc.*", None),
        Unsupported(f"{prefix}res{{i}}.{{b}}.conv2_offset.*", "deformable convolutions are not supported"),
    ]
    for stage in range(2, 6):
        theirs, ours = f"{prefix}res{stage}.{{b}}", f"backbone.body.layer{stage - 1}.{{b}}"
        rules += [
            Rule(f"{theirs}.shortcut.weight", f"{ours}.downsample.0.weight"),
            Rule(f"{theirs}.shortcut.norm.*", f"{ours}.downsample.1.*"),
            Rule(f"{theirs}.conv{{c}}.weight", f"{ours}.conv{{c}}.weight"),
            Rule(f"{theirs}.conv{{c}}.norm.*", f"{ours}.bn{{c}}.*"),
        ]
    return tuple(rules)


def rules(names: Set[str]) -> Sequence[Rule | Unsupported]:
    """Rules for all models. The pyramid of a RetinaNet starts at stage 3, all others start at stage 2.

    In Boxwright, a convolution followed by a norm is a pair of layers.
    """
    first = 2 if "backbone.fpn_lateral2.weight" in names else 3
    pair = ".0" if f"backbone.fpn_lateral{first}.norm.weight" in names else ""
    cascade = any_starts(names, "roi_heads.box_head.0.")
    mask_head = "mask_heads.0" if cascade else "mask_head"
    mask_pair = ".0" if "roi_heads.mask_head.mask_fcn1.norm.weight" in names else ""
    return (
        Rule("*.num_batches_tracked", None),
        Rule("pixel_mean", None),
        Rule("pixel_std", None),
        Rule("*anchor_generator.cell_anchors.{i}", None),
        *_body("backbone.bottom_up."),
        *_body(""),
        Rule("linear.*", None),
        Rule("fc.*", None),
        Rule("backbone.fpn_lateral{i}.norm.*", f"backbone.lateral.{{i-{first}}}.1.*"),
        Rule("backbone.fpn_output{i}.norm.*", f"backbone.output.{{i-{first}}}.1.*"),
        Rule("backbone.fpn_lateral{i}.*", f"backbone.lateral.{{i-{first}}}{pair}.*"),
        Rule("backbone.fpn_output{i}.*", f"backbone.output.{{i-{first}}}{pair}.*"),
        Rule("backbone.top_block.p6.*", "backbone.extra_output.0.*"),
        Rule("backbone.top_block.p7.*", "backbone.extra_output.1.*"),
        Rule("proposal_generator.rpn_head.conv.conv0.*", "rpn.conv.*"),
        Rule("proposal_generator.rpn_head.conv.conv{i}.*", "rpn.more_convs.{i-1}.*"),
        Rule("proposal_generator.rpn_head.conv.*", "rpn.conv.*"),
        Rule("proposal_generator.rpn_head.objectness_logits.*", "rpn.objectness.*"),
        Rule("proposal_generator.rpn_head.anchor_deltas.*", "rpn.deltas.*"),
        Unsupported("roi_heads.keypoint_head.*", "keypoints are not supported"),
        *_box_head("", "box_head", names),
        *_box_head(".{s}", "box_heads.{s}", names),
        Rule("roi_heads.mask_head.mask_fcn{i}.norm.*", f"{mask_head}.convs.{{i-1}}.1.*"),
        Rule("roi_heads.mask_head.mask_fcn{i}.*", f"{mask_head}.convs.{{i-1}}{mask_pair}.*"),
        Rule("roi_heads.mask_head.deconv.*", f"{mask_head}.upsample.*"),
        Rule("roi_heads.mask_head.predictor.*", f"{mask_head}.mask_logits.*"),
        Unsupported("head.cls_subnet.1.*", _RETINA_NORM),
        Rule("head.cls_subnet.{i}.*", "head.class_convs.{i}.*"),
        Rule("head.bbox_subnet.{i}.*", "head.box_convs.{i}.*"),
        Rule("head.cls_score.*", "head.class_logits.*", ratios_outermost),
        Rule("head.bbox_pred.*", "head.box_deltas.*", ratios_outermost),
    )


def _box_head(stage: str, ours: str, names: Set[str]) -> tuple[Rule, ...]:
    """Rules for the box head of a two-stage detector or of a stage of a cascade."""
    theirs, predictor = f"roi_heads.box_head{stage}", f"roi_heads.box_predictor{stage}"
    pair = ".0" if f"{theirs.format(s=0)}.conv1.norm.weight" in names else ""
    return (
        Rule(f"{theirs}.conv{{i}}.norm.*", f"{ours}.convs.{{i-1}}.1.*"),
        Rule(f"{theirs}.conv{{i}}.*", f"{ours}.convs.{{i-1}}{pair}.*"),
        Rule(f"{theirs}.fc{{i}}.*", f"{ours}.fc{{i}}.*"),
        Rule(f"{predictor}.cls_score.*", f"{ours}.class_logits.*"),
        Rule(f"{predictor}.bbox_pred.*", f"{ours}.box_deltas.*"),
    )


SETTINGS = Settings(
    # Detectron2 adds 1e-8 to the level, which has no effect in float32.
    conventions=replace(MODERN, level_epsilon=0.0),
    pixel_stats=MSRA,
    style="caffe",
    extra_relu=True,
    train_norm_affine=False,
    rpn=RPNConfig(
        low_quality=0.0,
        border=None,
        smooth_l1_beta=0.0,
        num_proposals=1000,
        test_pre_nms_per_level=1000,
        test_num_proposals=1000,
        # Discards empty boxes only.
        min_size=1e-9,
    ),
    box=BoxConfig(sampling_ratio=0, smooth_l1_beta=0.0, min_size=0.0),
    cascade=CascadeConfig(
        stds=((1 / 20, 1 / 20, 1 / 10, 1 / 10), (1 / 30, 1 / 30, 1 / 15, 1 / 15)),
        loss_weights=(1.0, 1.0),
        mean_of="probabilities",
        mask_in_all_stages=False,
    ),
    mask=MaskConfig(sampling_ratio=0),
    retina=RetinaConfig(smooth_l1_beta=0.0, clip_first=False),
)


def _settings(file: ForeignFile) -> Settings:
    """Settings of a file.

    Files of the first versions contain their pixel statistics. An RPN without box head keeps 2000 proposals.
    """
    mean, std = (file.tensors.get(f"pixel_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        means = _three(mean)
        # In ImageNet, the mean of red is higher than the mean of blue.
        stats = PixelStats(mean=means, std=_three(std), order="bgr" if means[0] < means[2] else "rgb")
    else:
        stats = RESNEXT if _is_resnext(file.tensors) else MSRA
    caffe = stats.std == (1.0, 1.0, 1.0) and not _has_group_norm(file.tensors)
    rpn = SETTINGS.rpn
    if not any_starts(file.tensors.keys(), "roi_heads."):
        rpn = replace(rpn, test_num_proposals=2000)
    if any_starts(file.tensors.keys(), "roi_heads.box_head.0."):
        rpn = replace(rpn, num_proposals=2000)
    return replace(SETTINGS, pixel_stats=stats, style="caffe" if caffe else "pytorch", rpn=rpn)


def _three(values: Tensor) -> tuple[float, float, float]:
    first, second, third = (round(value, 4) for value in values.flatten().tolist())
    return first, second, third


def _is_resnext(tensors: dict[str, Tensor]) -> bool:
    weight = tensors.get("backbone.bottom_up.res2.0.conv2.weight")
    return weight is not None and weight.shape[0] != weight.shape[1]


def _has_group_norm(tensors: dict[str, Tensor]) -> bool:
    """Whether the pyramid, and therefore the ResNet, has norm layers without statistics."""
    norm = "backbone.fpn_lateral5.norm."
    return norm + "weight" in tensors and norm + "running_var" not in tensors


DETECTRON2 = Source(
    name="detectron2",
    title="a Detectron2 model",
    recognises=lambda names, file: any_starts(names, "backbone.bottom_up.stem.", "stem.conv1."),
    rules=rules,
    settings=_settings,
    categories=coco_by_count,
    finish=with_statistics,
)

"""Detectron2's detectors on a ResNet-FPN, and its ImageNet weights under the same names.

Those of the model zoo start from Caffe-trained ResNets: BGR pixels, only their mean taken, the stride in the first 1x1
convolution. Those on ResNeXt and on torchvision's ResNets divide by a deviation and have the stride in the 3x3 one.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from torch import Tensor

from boxwright.backbones.backbone import PixelStats
from boxwright.data.dataset import Category
from boxwright.geometry.conventions import MODERN
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import COCO
from boxwright.importers.rules import Rule, Unsupported, ratios_outermost, with_statistics
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile

MSRA = PixelStats(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), order="bgr")
"""Pixels of the model zoo's ResNets."""
RESNEXT = replace(MSRA, std=(57.375, 57.12, 58.395))
"""Pixels of the model zoo's ResNeXts."""

_CASCADE = "its cascades average probabilities over stages and have one mask head, which cannot be built here"


def _body(prefix: str) -> tuple[Rule | Unsupported, ...]:
    """The ResNet's names, in a detector or alone."""
    rules: list[Rule | Unsupported] = [
        Rule(f"{prefix}stem.conv1.weight", "backbone.body.conv1.weight"),
        Rule(f"{prefix}stem.conv1.norm.*", "backbone.body.bn1.*"),
        Rule(f"{prefix}stem.fc.*", None),
        Unsupported(f"{prefix}res{{i}}.{{b}}.conv2_offset.*", "deformable convolutions cannot be built here"),
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
    """The table; a RetinaNet's pyramid begins with stage 3, all others' with stage 2."""
    first = 2 if "backbone.fpn_lateral2.weight" in names else 3
    return (
        Rule("*.num_batches_tracked", None),
        Rule("pixel_mean", None),
        Rule("pixel_std", None),
        Rule("*anchor_generator.cell_anchors.{i}", None),
        *_body("backbone.bottom_up."),
        *_body(""),
        Rule("linear.*", None),
        Rule("fc.*", None),
        Unsupported("backbone.fpn_lateral{i}.norm.*", "pyramids with norms of Detectron2 cannot be read here"),
        Rule("backbone.fpn_lateral{i}.*", f"backbone.lateral.{{i-{first}}}.*"),
        Rule("backbone.fpn_output{i}.*", f"backbone.output.{{i-{first}}}.*"),
        Rule("backbone.top_block.p6.*", "backbone.extra_output.0.*"),
        Rule("backbone.top_block.p7.*", "backbone.extra_output.1.*"),
        Rule("proposal_generator.rpn_head.conv.*", "rpn.conv.*"),
        Rule("proposal_generator.rpn_head.objectness_logits.*", "rpn.objectness.*"),
        Rule("proposal_generator.rpn_head.anchor_deltas.*", "rpn.deltas.*"),
        Unsupported("roi_heads.box_head.{i}.*", _CASCADE),
        Unsupported("roi_heads.keypoint_head.*", "keypoints cannot be detected here"),
        Rule("roi_heads.box_head.fc{i}.*", "box_head.fc{i}.*"),
        Rule("roi_heads.box_predictor.cls_score.*", "box_head.class_logits.*"),
        Rule("roi_heads.box_predictor.bbox_pred.*", "box_head.box_deltas.*"),
        Rule("roi_heads.mask_head.mask_fcn{i}.*", "mask_head.convs.{i-1}.*"),
        Rule("roi_heads.mask_head.deconv.*", "mask_head.upsample.*"),
        Rule("roi_heads.mask_head.predictor.*", "mask_head.mask_logits.*"),
        Rule("head.cls_subnet.{i}.*", "head.class_convs.{i}.*"),
        Rule("head.bbox_subnet.{i}.*", "head.box_convs.{i}.*"),
        Rule("head.cls_score.*", "head.class_logits.*", ratios_outermost),
        Rule("head.bbox_pred.*", "head.box_deltas.*", ratios_outermost),
    )


SETTINGS = Settings(
    # Its levels get 1e-8, which vanishes beside a level's number in float32.
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
    ),
    box=BoxConfig(sampling_ratio=0, smooth_l1_beta=0.0),
    mask=MaskConfig(sampling_ratio=0),
    retina=RetinaConfig(smooth_l1_beta=0.0, clip_first=False),
)


def _settings(file: ForeignFile) -> Settings:
    """The file's own pixels where it holds them, as files of the first versions do; of an RPN alone, more proposals."""
    mean, std = (file.tensors.get(f"pixel_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        means = _three(mean)
        # ImageNet's pictures have more red than blue.
        stats = PixelStats(mean=means, std=_three(std), order="bgr" if means[0] < means[2] else "rgb")
    else:
        stats = RESNEXT if _is_resnext(file.tensors) else MSRA
    rpn = SETTINGS.rpn
    if not any_starts(file.tensors.keys(), "roi_heads."):
        rpn = replace(rpn, test_num_proposals=2000)
    return replace(SETTINGS, pixel_stats=stats, style="caffe" if stats.std == (1.0, 1.0, 1.0) else "pytorch", rpn=rpn)


def _three(values: Tensor) -> tuple[float, float, float]:
    first, second, third = (round(value, 4) for value in values.flatten().tolist())
    return first, second, third


def _is_resnext(tensors: dict[str, Tensor]) -> bool:
    weight = tensors.get("backbone.bottom_up.res2.0.conv2.weight")
    return weight is not None and weight.shape[0] != weight.shape[1]


def _categories(file: ForeignFile, count: int) -> Sequence[Category] | None:
    return COCO if count == len(COCO) else None


DETECTRON2 = Source(
    name="detectron2",
    title="a Detectron2 model",
    recognises=lambda names, file: any_starts(names, "backbone.bottom_up.stem.", "stem.conv1."),
    rules=rules,
    settings=_settings,
    categories=_categories,
    finish=with_statistics,
)

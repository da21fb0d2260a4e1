"""mmdetection 0.5 to 3.x: detectors with a ResNet-FPN.

Up to 1.x, background is the first class and boxes have the `+1` geometry. From 2.0, background is the last class,
without deltas and masks, and boxes are continuous. Single-stage models have the same tensor names in all versions, so
the version must be in the file or be stated. Files contain the configuration as text: pixel statistics, stride and
losses are read from it; it is not executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, cast

from boxwright.backbones.backbone import CAFFE, PYTORCH, PixelStats
from boxwright.backbones.resnet import Style
from boxwright.data.dataset import Category
from boxwright.geometry.conventions import DETECTRON
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.categories import COCO, named
from boxwright.importers.mmdetection_losses import with_losses
from boxwright.importers.rules import (
    Rule,
    Unsupported,
    background_to_last,
    without_background,
    without_background_deltas,
)
from boxwright.importers.source import Settings, Source, any_starts
from boxwright.weights.foreign import ForeignFile

_RETINA_BN = "RetinaNet heads with BatchNorm are not supported"


def _rpn(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}.rpn_conv.0.conv.*", "rpn.conv.*"),
        Rule(f"{prefix}.rpn_conv.{{i}}.conv.*", "rpn.more_convs.{i-1}.*"),
        Rule(f"{prefix}.rpn_conv.*", "rpn.conv.*"),
        Rule(f"{prefix}.rpn_cls.*", "rpn.objectness.*"),
        Rule(f"{prefix}.rpn_reg.*", "rpn.deltas.*"),
    )


_SHARED: tuple[Rule | Unsupported, ...] = (
    Rule("*.num_batches_tracked", None),
    Rule("backbone.conv1.weight", "backbone.body.conv1.weight"),
    Rule("backbone.bn1.*", "backbone.body.bn1.*"),
    Rule("backbone.gn1.*", "backbone.body.bn1.*"),
    Unsupported("backbone.layer{i}.{j}.conv2.conv_offset*", "deformable convolutions are not supported"),
    Unsupported("backbone.layer{i}.{j}.conv2_offset.*", "deformable convolutions are not supported"),
    Rule("backbone.layer{i}.{j}.gn{k}.*", "backbone.body.layer{i}.{j}.bn{k}.*"),
    Rule("backbone.layer{i}.*", "backbone.body.layer{i}.*"),
    *_rpn("rpn_head"),
    *_rpn("bbox_head"),  # 3.x, for an RPN alone
    Rule("bbox_head.cls_convs.{i}.gn.*", "head.class_convs.{i*3+1}.*"),
    Rule("bbox_head.reg_convs.{i}.gn.*", "head.box_convs.{i*3+1}.*"),
    Unsupported("bbox_head.cls_convs.{i}.bn.*", _RETINA_BN),
    Rule("bbox_head.retina_cls.*", "head.class_logits.*"),
    Rule("bbox_head.retina_reg.*", "head.box_deltas.*"),
)


def _convs(theirs: str, ours: str, names: Set[str]) -> tuple[Rule, ...]:
    """Rules for convolutions. In Boxwright, a convolution followed by a norm is a pair of layers.

    Args:
        theirs: Name in the file up to the number `{i}`.
        ours: Boxwright's name, with the number.
        names: Names of all tensors.
    """
    first = theirs.format(s=0) + ".0."
    pair = ".0" if any_starts(names, f"{first}gn.", f"{first}bn.") else ""
    return (
        Rule(f"{theirs}.{{i}}.conv.*", f"{ours}{pair}.*"),
        Rule(f"{theirs}.{{i}}.gn.*", f"{ours}.1.*"),
        Rule(f"{theirs}.{{i}}.bn.*", f"{ours}.1.*"),
    )


def _heads(prefix: str, names: Set[str], *, background_first: bool) -> tuple[Rule, ...]:
    """Rules for the heads of a two-stage detector or of the stages of a cascade."""
    logits = background_to_last if background_first else None
    deltas = without_background_deltas if background_first else None
    masks = without_background if background_first else None
    rules: list[Rule] = []
    for theirs, ours in (("", "head"), (".{s}", "heads.{s}")):
        box, mask = f"{prefix}bbox_head{theirs}", f"{prefix}mask_head{theirs}"
        rules += [
            *_convs(f"{box}.shared_convs", f"box_{ours}.convs.{{i}}", names),
            Rule(f"{box}.shared_fcs.{{i}}.*", f"box_{ours}.fc{{i+1}}.*"),
            Rule(f"{box}.fc_cls.*", f"box_{ours}.class_logits.*", logits),
            Rule(f"{box}.fc_reg.*", f"box_{ours}.box_deltas.*", deltas),
            *_convs(f"{mask}.convs", f"mask_{ours}.convs.{{i}}", names),
            Rule(f"{mask}.upsample.*", f"mask_{ours}.upsample.*"),
            Rule(f"{mask}.conv_logits.*", f"mask_{ours}.mask_logits.*", masks),
        ]
    return tuple(rules)


def _rules(names: Set[str], heads: Sequence[Rule]) -> Sequence[Rule | Unsupported]:
    """Rules for all models.

    The extra levels P6 and P7 of a RetinaNet are numbered after the levels with lateral convolutions.
    """
    num_laterals = sum(re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", name) is not None for name in names)
    pair = ".0" if any_starts(names, "neck.fpn_convs.0.gn.", "neck.fpn_convs.0.bn.") else ""
    pyramid = list(_convs("neck.lateral_convs", "backbone.lateral.{i}", names))
    for part, place in (("conv", pair), ("gn", ".1"), ("bn", ".1")):
        pyramid += [Rule(f"neck.fpn_convs.{i}.{part}.*", f"backbone.output.{i}{place}.*") for i in range(num_laterals)]
        pyramid.append(Rule(f"neck.fpn_convs.{{i}}.{part}.*", f"backbone.extra_output.{{i-{num_laterals}}}{place}.*"))
    layers = 3 if "bbox_head.cls_convs.0.gn.weight" in names else 2
    retina = (
        Rule("bbox_head.cls_convs.{i}.conv.*", f"head.class_convs.{{i*{layers}}}.*"),
        Rule("bbox_head.reg_convs.{i}.conv.*", f"head.box_convs.{{i*{layers}}}.*"),
        # mmdetection 0.5 and 0.6.
        Rule("bbox_head.cls_convs.{i}.*", "head.class_convs.{i*2}.*"),
        Rule("bbox_head.reg_convs.{i}.*", "head.box_convs.{i*2}.*"),
    )
    return (*_SHARED, *pyramid, *retina, *heads)


FIRST_SETTINGS = Settings(conventions=DETECTRON)
"""The defaults follow mmdetection 0.5."""
LATER_SETTINGS = Settings(
    rpn=RPNConfig(border=None, smooth_l1_beta=0.0, num_proposals=1000, test_num_proposals=1000),
    box=BoxConfig(sampling_ratio=0, smooth_l1_beta=0.0, min_size=0.0),
    mask=MaskConfig(sampling_ratio=0),
)
"""RoIAlign samples each feature position, box losses are plain L1, and fewer proposals are kept."""


def _about(file: ForeignFile) -> Iterator[Mapping[str, Any]]:
    """Metadata of the file."""
    for key in ("meta", "metadata"):
        if isinstance(file.about.get(key), Mapping):
            yield file.about[key]


def _version(file: ForeignFile) -> int | None:
    """Major version that wrote the file, or None; 3.x states only the version of mmengine."""
    for metadata in _about(file):
        match = re.match(r"(\d+)\.", str(metadata.get("mmdet_version", "")))
        if match:
            return int(match[1])
        if "mmengine_version" in metadata:
            return 3
    return None


def _is_mmdetection(names: Set[str]) -> bool:
    return any_starts(names, "neck.lateral_convs.") and any_starts(names, "rpn_head.", "bbox_head.", "roi_head.")


def _recognises_first(names: Set[str], file: ForeignFile) -> bool:
    version = _version(file)
    if not _is_mmdetection(names) or any_starts(names, "roi_head.", "bbox_head.rpn_conv."):
        return False
    return version in (None, 0, 1)


def _recognises_later(names: Set[str], file: ForeignFile) -> bool:
    version = _version(file)
    if not _is_mmdetection(names) or any_starts(names, "bbox_head.shared_fcs.", "bbox_head.0.shared_fcs."):
        return False
    if "bbox_head.cls_convs.0.weight" in names:
        return False
    return any_starts(names, "roi_head.") or version in (None, 2, 3)


def _first_settings(file: ForeignFile) -> Settings:
    # 1.0 halved the number of proposals of the second stage at test time.
    return _settings(file, FIRST_SETTINGS, fewer_proposals=_version(file) == 1)


def _later_settings(file: ForeignFile) -> Settings:
    retina = RetinaConfig(smooth_l1_beta=0.0, drop_empty=_version(file) == 3)
    settings = replace(LATER_SETTINGS, retina=retina)
    names = file.tensors.keys()
    if any_starts(names, "roi_head.bbox_head.0."):
        # Cascades kept the training settings of 1.x.
        rpn = replace(settings.rpn, border=0.0, smooth_l1_beta=1 / 9, num_proposals=2000)
        settings = replace(settings, rpn=rpn, box=replace(settings.box, smooth_l1_beta=1.0))
    elif not any_starts(names, "roi_head."):
        settings = replace(settings, rpn=replace(settings.rpn, border=0.0))
    return _settings(file, settings, fewer_proposals=True)


def _settings(file: ForeignFile, settings: Settings, *, fewer_proposals: bool) -> Settings:
    """Apply the configuration in the file: pixel statistics, style and losses.

    Without a configuration, pixel statistics and style are "pytorch".

    Raises:
        ValueError: The configuration contains convolutions that are not supported and that tensors do not reveal.
    """
    names = file.tensors.keys()
    if fewer_proposals and any_starts(names, "rpn_head.") and any_starts(names, "bbox_head.", "roi_head."):
        # An RPN alone keeps the higher number of proposals.
        settings = replace(settings, rpn=replace(settings.rpn, test_pre_nms_per_level=1000, test_num_proposals=1000))
    text = next((str(metadata[key]) for metadata in _about(file) for key in ("config", "cfg") if key in metadata), "")
    if "ConvWS" in text:
        raise ValueError("convolutions with weight standardisation (ConvWS) are not supported. Use another model.")
    style = re.search(r"style\s*=\s*'(caffe|pytorch)'", text)
    matches = {name: re.search(rf"\b{name}\s*=\s*[\[(]([\d.,\s]+)[\])]", text) for name in ("mean", "std")}
    reverse = re.search(r"(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", text)
    caffe = style is not None and style[1] == "caffe"
    stats = CAFFE if caffe else PYTORCH
    mean, std = (_three(match) for match in matches.values())
    if mean is not None and std is not None and reverse is not None:
        stats = PixelStats(mean=mean, std=std, order="rgb" if reverse[1] == "True" else "bgr")
    settings = replace(settings, pixel_stats=stats, style=cast(Style, style[1] if style else "pytorch"))
    return with_losses(settings, text)


def _three(match: re.Match[str] | None) -> tuple[float, float, float] | None:
    parts = [float(part) for part in match[1].split(",") if part.strip()] if match else []
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


def _categories(file: ForeignFile, count: int) -> Sequence[Category] | None:
    """Classes that the file names, otherwise the COCO classes if there are 80."""
    for metadata in _about(file):
        dataset = metadata.get("dataset_meta")
        names = metadata.get("CLASSES") or (
            (dataset.get("classes") or dataset.get("CLASSES")) if isinstance(dataset, Mapping) else None
        )
        if isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(name, str) for name in names):
            return named(names)
    return COCO if count == len(COCO) else None


FIRST = Source(
    name="mmdetection1",
    title="an mmdetection detector, 0.5 to 1.x",
    recognises=_recognises_first,
    rules=lambda names: _rules(names, _heads("", names, background_first=True)),
    settings=_first_settings,
    categories=_categories,
)
LATER = Source(
    name="mmdetection2",
    title="an mmdetection detector, 2.x or 3.x",
    recognises=_recognises_later,
    rules=lambda names: _rules(names, _heads("roi_head.", names, background_first=False)),
    settings=_later_settings,
    categories=_categories,
)

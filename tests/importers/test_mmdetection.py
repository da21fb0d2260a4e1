"""Import of mmdetection checkpoints (0.5 to 3.x): layouts on a ResNet-18, compared with mappings written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import boxwright
from boxwright.backbones.backbone import CAFFE, PYTORCH, PixelStats
from boxwright.geometry.conventions import DETECTRON, MODERN
from boxwright.importers.categories import COCO, named
from boxwright.importers.convert import convert
from boxwright.training.experiment import arguments_of, call_name
from boxwright.weights.foreign import read_foreign
from importers.layouts import CHANNELS, MASK_WIDTH, WIDTH, file_of, filled, layer, norm, transposed

Shapes = dict[str, tuple[int, ...]]
NUM_CLASSES = 80


def body() -> Shapes:
    """Shapes of a ResNet-18."""
    shapes: Shapes = {"backbone.conv1.weight": (64, 3, 7, 7), **norm("backbone.bn1", 64)}
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"backbone.layer{stage}.{block}"
            shapes |= {f"{prefix}.conv1.weight": (width, inputs, 3, 3), **norm(f"{prefix}.bn1", width)}
            shapes |= {f"{prefix}.conv2.weight": (width, width, 3, 3), **norm(f"{prefix}.bn2", width)}
            if inputs != width:
                shapes |= {f"{prefix}.downsample.0.weight": (width, inputs, 1, 1)}
                shapes |= norm(f"{prefix}.downsample.1", width)
            inputs = width
    return shapes


def pyramid(retina: bool = False) -> Shapes:
    inputs = (128, 256, 512) if retina else (64, 128, 256, 512)
    shapes: Shapes = {}
    for i, size in enumerate(inputs):
        shapes |= layer(f"neck.lateral_convs.{i}.conv", CHANNELS, size, 1, 1)
        shapes |= layer(f"neck.fpn_convs.{i}.conv", CHANNELS, CHANNELS, 3, 3)
    if retina:
        shapes |= layer("neck.fpn_convs.3.conv", CHANNELS, 512, 3, 3)
        shapes |= layer("neck.fpn_convs.4.conv", CHANNELS, CHANNELS, 3, 3)
    return shapes


def rpn() -> Shapes:
    return {
        **layer("rpn_head.rpn_conv", CHANNELS, CHANNELS, 3, 3),
        **layer("rpn_head.rpn_cls", 3, CHANNELS, 1, 1),
        **layer("rpn_head.rpn_reg", 12, CHANNELS, 1, 1),
    }


def box(prefix: str, boxes: int) -> Shapes:
    return {
        **layer(f"{prefix}.shared_fcs.0", WIDTH, CHANNELS * 49),
        **layer(f"{prefix}.shared_fcs.1", WIDTH, WIDTH),
        **layer(f"{prefix}.fc_cls", NUM_CLASSES + 1, WIDTH),
        **layer(f"{prefix}.fc_reg", 4 * boxes, WIDTH),
    }


def mask(prefix: str, rows: int) -> Shapes:
    shapes = transposed(f"{prefix}.upsample", MASK_WIDTH)
    for i in range(4):
        shapes |= layer(f"{prefix}.convs.{i}.conv", MASK_WIDTH, MASK_WIDTH if i else CHANNELS, 3, 3)
    return {**shapes, **layer(f"{prefix}.conv_logits", rows, MASK_WIDTH, 1, 1)}


def retina(wrapped: bool) -> Shapes:
    shapes: Shapes = {}
    for branch in ("cls_convs", "reg_convs"):
        for i in range(4):
            shapes |= layer(f"bbox_head.{branch}.{i}{'.conv' if wrapped else ''}", CHANNELS, CHANNELS, 3, 3)
    shapes |= layer("bbox_head.retina_cls", 9 * NUM_CLASSES, CHANNELS, 3, 3)
    return {**shapes, **layer("bbox_head.retina_reg", 36, CHANNELS, 3, 3)}


def head_names(first: bool) -> tuple[str, int]:
    """Prefix of the heads' names, and the number of background rows."""
    return ("", 1) if first else ("roi_head.", 0)


def detector(kind: str, first: bool) -> dict[str, Tensor]:
    prefix, extra = head_names(first)
    boxes, masks = NUM_CLASSES + extra, NUM_CLASSES + extra
    parts: dict[str, Shapes] = {
        "rpn": rpn(),
        "fast_rcnn": box(f"{prefix}bbox_head", boxes),
        "faster_rcnn": {**rpn(), **box(f"{prefix}bbox_head", boxes)},
        "mask_rcnn": {**rpn(), **box(f"{prefix}bbox_head", boxes), **mask(f"{prefix}mask_head", masks)},
        "cascade_rcnn": {**rpn(), **{k: s for i in range(3) for k, s in box(f"{prefix}bbox_head.{i}", 1).items()}},
        "cascade_mask_rcnn": {
            **rpn(),
            **{name: s for i in range(3) for name, s in box(f"{prefix}bbox_head.{i}", 1).items()},
            **{name: s for i in range(3) for name, s in mask(f"{prefix}mask_head.{i}", masks).items()},
        },
        "retinanet": retina(wrapped=not first),
    }
    return filled({**body(), **pyramid(kind == "retinanet"), **parts[kind]})


MODELS = {
    "rpn": "proposal_network",
    "fast_rcnn": "fast_rcnn",
    "faster_rcnn": "faster_rcnn",
    "mask_rcnn": "mask_rcnn",
    "cascade_rcnn": "cascade_rcnn",
    "cascade_mask_rcnn": "cascade_mask_rcnn",
    "retinanet": "retinanet",
}


def last(rows: Tensor) -> Tensor:
    return torch.cat([rows[1:], rows[:1]])


@pytest.mark.parametrize("first", [True, False], ids=["0.5 and 1.x", "2.x and 3.x"])
@pytest.mark.parametrize("kind", MODELS)
def test_tensors_map_to_the_expected_names(kind: str, first: bool) -> None:
    theirs = detector(kind, first)
    version = "0.5.4" if first else "2.28.0"
    imported = convert(
        file_of(theirs, meta={"mmdet_version": version}),
    )
    assert call_name(imported.experiment.model).endswith("." + MODELS[kind])
    ours, unused = imported.tensors, imported.unused
    assert len(ours) == len(theirs)
    assert not unused
    pairs = {
        "backbone.body.conv1.weight": theirs["backbone.conv1.weight"],
        "backbone.body.layer4.0.downsample.1.running_var": theirs["backbone.layer4.0.downsample.1.running_var"],
        "backbone.lateral.1.bias": theirs["neck.lateral_convs.1.conv.bias"],
        "backbone.output.2.weight": theirs["neck.fpn_convs.2.conv.weight"],
    }
    prefix, _ = head_names(first)
    if kind == "retinanet":
        conv = "" if first else ".conv"
        pairs |= {
            "backbone.extra_output.0.weight": theirs["neck.fpn_convs.3.conv.weight"],
            "backbone.extra_output.1.bias": theirs["neck.fpn_convs.4.conv.bias"],
            "head.class_convs.6.weight": theirs[f"bbox_head.cls_convs.3{conv}.weight"],
            "head.box_convs.2.bias": theirs[f"bbox_head.reg_convs.1{conv}.bias"],
            "head.class_logits.weight": theirs["bbox_head.retina_cls.weight"],
            "head.box_deltas.weight": theirs["bbox_head.retina_reg.weight"],
        }
    elif kind != "fast_rcnn":
        pairs |= {
            "backbone.output.3.bias": theirs["neck.fpn_convs.3.conv.bias"],
            "rpn.conv.weight": theirs["rpn_head.rpn_conv.weight"],
            "rpn.objectness.bias": theirs["rpn_head.rpn_cls.bias"],
            "rpn.deltas.weight": theirs["rpn_head.rpn_reg.weight"],
        }
    if kind in ("fast_rcnn", "faster_rcnn", "mask_rcnn"):
        logits, deltas = (theirs[f"{prefix}bbox_head.{name}.weight"] for name in ("fc_cls", "fc_reg"))
        pairs |= {
            "box_head.fc1.weight": theirs[f"{prefix}bbox_head.shared_fcs.0.weight"],
            "box_head.fc2.bias": theirs[f"{prefix}bbox_head.shared_fcs.1.bias"],
            "box_head.class_logits.weight": last(logits) if first else logits,
            "box_head.box_deltas.weight": deltas[4:] if first else deltas,
        }
    if kind == "mask_rcnn":
        logits = theirs[f"{prefix}mask_head.conv_logits.bias"]
        pairs |= {
            "mask_head.convs.3.weight": theirs[f"{prefix}mask_head.convs.3.conv.weight"],
            "mask_head.upsample.weight": theirs[f"{prefix}mask_head.upsample.weight"],
            "mask_head.mask_logits.bias": logits[1:] if first else logits,
        }
    if kind.startswith("cascade"):
        logits = theirs[f"{prefix}bbox_head.2.fc_cls.bias"]
        pairs |= {
            "box_heads.0.fc2.weight": theirs[f"{prefix}bbox_head.0.shared_fcs.1.weight"],
            "box_heads.2.class_logits.bias": last(logits) if first else logits,
            "box_heads.1.box_deltas.weight": theirs[f"{prefix}bbox_head.1.fc_reg.weight"],
        }
    if kind == "cascade_mask_rcnn":
        masks = theirs[f"{prefix}mask_head.1.conv_logits.weight"]
        pairs |= {
            "mask_heads.1.mask_logits.weight": masks[1:] if first else masks,
        }
    for name, tensor in pairs.items():
        assert torch.equal(ours[name], tensor), name


PROPOSALS = {
    ("rpn", "0.5.7"): (2000, 2000),
    ("faster_rcnn", "0.6.0"): (2000, 2000),
    ("rpn", "1.0.0"): (2000, 2000),
    ("mask_rcnn", "1.0.0"): (1000, 1000),
    ("rpn", "2.28.2"): (2000, 1000),
    ("faster_rcnn", "2.28.2"): (1000, 1000),
    ("cascade_rcnn", "2.28.2"): (1000, 1000),
}
"""`test_cfg` of the versions' configurations: proposals per level before NMS, and in total after NMS."""


@pytest.mark.parametrize(("kind", "version"), PROPOSALS)
def test_proposal_counts_match_the_version(kind: str, version: str) -> None:
    theirs = detector(kind, first=version < "2")
    rpn = arguments_of(convert(file_of(theirs, meta={"mmdet_version": version})).experiment.model)["rpn"]
    assert (rpn.test_pre_nms_per_level, rpn.test_num_proposals) == PROPOSALS[kind, version]
    assert rpn.nms_iou == 0.7


def test_settings_of_0_x_and_1_x() -> None:
    """Geometry, RPN, box head and RetinaNet settings, for files that do not name their version."""
    model = arguments_of(convert(file_of(detector("mask_rcnn", first=True))).experiment.model)
    assert model["conventions"] == DETECTRON
    assert (model["rpn"].test_pre_nms_per_level, model["rpn"].test_num_proposals) == (2000, 2000)
    assert (model["box"].sampling_ratio, model["box"].stds) == (2, (0.1, 0.1, 0.2, 0.2))
    assert (model["box"].score_threshold, model["box"].nms_iou, model["box"].max_detections) == (0.05, 0.5, 100)
    retina = arguments_of(convert(file_of(detector("retinanet", first=True))).experiment.model)
    backbone = arguments_of(retina["backbone"])
    assert (backbone["extra"], backbone["extra_relu"], backbone["out_stages"]) == ("c5", False, (3, 4, 5))
    assert (retina["retina"].pre_nms_per_level, retina["retina"].anchor_scale) == (1000, 4.0)
    assert (retina["retina"].score_threshold, retina["retina"].nms_iou) == (0.05, 0.5)


def test_settings_of_2_x_and_3_x() -> None:
    model = arguments_of(convert(file_of(detector("mask_rcnn", first=False))).experiment.model)
    assert model["conventions"] == MODERN
    assert (model["box"].sampling_ratio, model["mask"].sampling_ratio) == (0, 0)
    assert model["box"].min_size == 0, "small detections must not be dropped"
    assert (model["box"].score_threshold, model["box"].nms_iou, model["box"].max_detections) == (0.05, 0.5, 100)


@pytest.mark.parametrize("kind", ["rpn", "retinanet"])
def test_single_stage_files_without_a_version_need_a_source(kind: str) -> None:
    tensors = detector(kind, first=False)
    with pytest.raises(ValueError, match="Choose one with --source mmdetection1 or --source mmdetection2"):
        convert(file_of(tensors))
    for source, geometry in (("mmdetection1", DETECTRON), ("mmdetection2", MODERN)):
        imported = convert(file_of(tensors), source=source)
        assert arguments_of(imported.experiment.model)["conventions"] == geometry


def test_3_x_is_recognised_by_mmengine_and_its_rpn_is_named_bbox_head() -> None:
    meta = {"mmengine_version": "0.10.7"}
    imported = convert(file_of(detector("retinanet", first=False), meta=meta))
    assert imported.source.name == "mmdetection2"
    assert arguments_of(imported.experiment.model)["retina"].drop_empty, "only 3.x drops empty boxes"
    theirs = detector("rpn", first=False)
    renamed = {name.replace("rpn_head.", "bbox_head."): tensor for name, tensor in theirs.items()}
    for about in ({"meta": meta}, {}):
        imported = convert(file_of(renamed, **about))
        assert imported.source.name == "mmdetection2"
        rpn = arguments_of(imported.experiment.model)["rpn"]
        assert (rpn.test_pre_nms_per_level, rpn.test_num_proposals) == (2000, 1000)
        assert torch.equal(imported.tensors["rpn.deltas.weight"], theirs["rpn_head.rpn_reg.weight"])


CONFIG_2018 = """
model = dict(backbone=dict(type='ResNet', depth=50, style='{style}'), rpn_head=dict(target_means=[.0, .0, .0, .0]))
img_norm_cfg = dict(
    mean={mean}, std={std}, to_rgb={rgb})
"""


def pixels_of(**about: Any) -> tuple[PixelStats, str]:
    model = arguments_of(convert(file_of(detector("faster_rcnn", first=False), **about)).experiment.model)
    return model["pixel_stats"], arguments_of(model["backbone"])["style"]


def test_pixel_statistics_and_style_come_from_the_configuration() -> None:
    caffe = {"style": "caffe", "mean": "[102.9801, 115.9465, 122.7717]", "std": "[1.0, 1.0, 1.0]", "rgb": "False"}
    assert pixels_of(meta={"config": CONFIG_2018.format(**caffe)}) == (CAFFE, "caffe")
    other = {**caffe, "style": "pytorch", "mean": "[1, 2.5, 3]", "rgb": "True"}
    assert pixels_of(meta={"config": CONFIG_2018.format(**other)}) == (
        PixelStats(mean=(1.0, 2.5, 3.0), std=(1.0, 1.0, 1.0)),
        "pytorch",
    )
    later = (
        "data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)\nstyle='caffe'"
    )
    assert pixels_of(meta={"cfg": later}) == (replace(CAFFE, mean=(103.53, 116.28, 123.675)), "caffe")
    assert pixels_of() == (PYTORCH, "pytorch")


def test_class_names_come_from_the_file_or_default_to_coco() -> None:
    theirs = detector("faster_rcnn", first=False)
    names = [f"thing {i}" for i in range(NUM_CLASSES)]
    for meta in ({"CLASSES": tuple(names)}, {"dataset_meta": {"classes": names}}, {"dataset_meta": {"CLASSES": names}}):
        assert [c.name for c in convert(file_of(theirs, meta=meta)).categories] == names
    assert [c.id for c in convert(file_of(theirs)).categories][9:12] == [10, 11, 13]


def test_proposal_networks_keep_the_class_names_of_their_data_set() -> None:
    theirs = detector("rpn", first=True)
    names = ["a", "b"]
    for categories, expected in ((None, [c.name for c in COCO]), (named(names), names)):
        imported = convert(file_of(theirs), source="mmdetection1", categories=categories)
        assert [c.name for c in imported.categories] == expected


def test_unsupported_parts_are_reported() -> None:
    theirs = detector("retinanet", first=False)
    for name, why in {
        "bbox_head.cls_convs.0.bn.weight": "BatchNorm",
        "backbone.layer2.0.conv2.conv_offset.weight": "deformable convolutions",
        "bbox_head.fcos_cls.weight": "1 unknown tensor",
    }.items():
        with pytest.raises(ValueError, match=why):
            convert(file_of({**theirs, name: torch.ones(1)}), source="mmdetection2")


def test_a_converted_model_detects(tmp_path: Path) -> None:
    theirs = {name: tensor / 50 for name, tensor in detector("faster_rcnn", first=True).items()}
    theirs |= {name: tensor * 50 for name, tensor in theirs.items() if "running_var" in name}
    torch.save({"meta": {"mmdet_version": "0.5.1"}, "state_dict": theirs}, tmp_path / "theirs.pth")
    convert(read_foreign(tmp_path / "theirs.pth"), changes=["model.box.score_threshold=0.0"]).save(tmp_path / "ours")
    detections = boxwright.load(tmp_path / "ours").predict(np.zeros((64, 96, 3), np.uint8), native=True)
    assert len(detections) == 100
    assert set(detections.names) <= {category.name for category in COCO}

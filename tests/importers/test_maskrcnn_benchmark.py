"""Import of maskrcnn-benchmark's layout on a ResNet-18, compared with mappings written by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from boxwright.backbones.backbone import CAFFE
from boxwright.geometry.boxes import decode
from boxwright.geometry.conventions import CAFFE2
from boxwright.importers.convert import convert
from boxwright.layers.norm import FrozenBatchNorm2d
from boxwright.training.experiment import arguments_of, call_name
from importers.layouts import CHANNELS, MASK_WIDTH, WIDTH, file_of, filled, layer, norm, transposed

Shapes = dict[str, tuple[int, ...]]
NUM_CLASSES = 80


def body() -> Shapes:
    shapes: Shapes = {"backbone.body.stem.conv1.weight": (64, 3, 7, 7), **norm("backbone.body.stem.bn1", 64)}
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"backbone.body.layer{stage}.{block}"
            shapes |= {f"{prefix}.conv1.weight": (width, inputs, 3, 3), **norm(f"{prefix}.bn1", width)}
            shapes |= {f"{prefix}.conv2.weight": (width, width, 3, 3), **norm(f"{prefix}.bn2", width)}
            if inputs != width:
                shapes |= {f"{prefix}.downsample.0.weight": (width, inputs, 1, 1)}
                shapes |= norm(f"{prefix}.downsample.1", width)
            inputs = width
    return shapes


def pyramid(retina: bool) -> Shapes:
    shapes: Shapes = {}
    for level, inputs in enumerate((64, 128, 256, 512), start=1):
        if level > 1 or not retina:
            shapes |= layer(f"backbone.fpn.fpn_inner{level}", CHANNELS, inputs, 1, 1)
            shapes |= layer(f"backbone.fpn.fpn_layer{level}", CHANNELS, CHANNELS, 3, 3)
    if retina:
        shapes |= layer("backbone.fpn.top_blocks.p6", CHANNELS, 512, 3, 3)
        shapes |= layer("backbone.fpn.top_blocks.p7", CHANNELS, CHANNELS, 3, 3)
    return shapes


def rpn() -> Shapes:
    return {
        **layer("rpn.head.conv", CHANNELS, CHANNELS, 3, 3),
        **layer("rpn.head.cls_logits", 3, CHANNELS, 1, 1),
        **layer("rpn.head.bbox_pred", 12, CHANNELS, 1, 1),
    }


def box() -> Shapes:
    return {
        **layer("roi_heads.box.feature_extractor.fc6", WIDTH, CHANNELS * 49),
        **layer("roi_heads.box.feature_extractor.fc7", WIDTH, WIDTH),
        **layer("roi_heads.box.predictor.cls_score", NUM_CLASSES + 1, WIDTH),
        **layer("roi_heads.box.predictor.bbox_pred", 4 * (NUM_CLASSES + 1), WIDTH),
    }


def mask() -> Shapes:
    shapes = transposed("roi_heads.mask.predictor.conv5_mask", MASK_WIDTH)
    for i in range(1, 5):
        prefix = f"roi_heads.mask.feature_extractor.mask_fcn{i}"
        shapes |= layer(prefix, MASK_WIDTH, MASK_WIDTH if i > 1 else CHANNELS, 3, 3)
    return {**shapes, **layer("roi_heads.mask.predictor.mask_fcn_logits", NUM_CLASSES + 1, MASK_WIDTH, 1, 1)}


def retina() -> Shapes:
    shapes: Shapes = {}
    for branch in ("cls_tower", "bbox_tower"):
        for i in (0, 2, 4, 6):
            shapes |= layer(f"rpn.head.{branch}.{i}", CHANNELS, CHANNELS, 3, 3)
    shapes |= layer("rpn.head.cls_logits", 9 * NUM_CLASSES, CHANNELS, 3, 3)
    return {**shapes, **layer("rpn.head.bbox_pred", 36, CHANNELS, 3, 3)}


def detector(kind: str) -> dict[str, Tensor]:
    parts = {
        "proposal_network": rpn(),
        "fast_rcnn": box(),
        "faster_rcnn": {**rpn(), **box()},
        "mask_rcnn": {**rpn(), **box(), **mask()},
        "retinanet": retina(),
    }
    return filled({**body(), **pyramid(kind == "retinanet"), **parts[kind]})


SHARED = {
    "backbone.body.conv1.weight": "backbone.body.stem.conv1.weight",
    "backbone.body.bn1.bias": "backbone.body.stem.bn1.bias",
    "backbone.body.layer3.0.downsample.0.weight": "backbone.body.layer3.0.downsample.0.weight",
}
TWO_STAGES = {
    **SHARED,
    "backbone.lateral.0.weight": "backbone.fpn.fpn_inner1.weight",
    "backbone.output.3.bias": "backbone.fpn.fpn_layer4.bias",
    "rpn.conv.weight": "rpn.head.conv.weight",
    "rpn.objectness.weight": "rpn.head.cls_logits.weight",
    "rpn.deltas.bias": "rpn.head.bbox_pred.bias",
    "box_head.fc1.weight": "roi_heads.box.feature_extractor.fc6.weight",
    "box_head.fc2.bias": "roi_heads.box.feature_extractor.fc7.bias",
    "mask_head.convs.0.weight": "roi_heads.mask.feature_extractor.mask_fcn1.weight",
    "mask_head.convs.3.bias": "roi_heads.mask.feature_extractor.mask_fcn4.bias",
    "mask_head.upsample.weight": "roi_heads.mask.predictor.conv5_mask.weight",
}
RETINANET = {
    **SHARED,
    "backbone.lateral.0.weight": "backbone.fpn.fpn_inner2.weight",
    "backbone.output.2.weight": "backbone.fpn.fpn_layer4.weight",
    "backbone.extra_output.0.weight": "backbone.fpn.top_blocks.p6.weight",
    "backbone.extra_output.1.bias": "backbone.fpn.top_blocks.p7.bias",
    "head.class_convs.6.weight": "rpn.head.cls_tower.6.weight",
    "head.box_convs.2.bias": "rpn.head.bbox_tower.2.bias",
    "head.class_logits.weight": "rpn.head.cls_logits.weight",
}


def check(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], mapping: Mapping[str, str]) -> int:
    present = {name: their_name for name, their_name in mapping.items() if their_name in theirs}
    for name, their_name in present.items():
        assert torch.equal(ours[name], theirs[their_name]), name
    return len(present)


@pytest.mark.parametrize("kind", ["proposal_network", "fast_rcnn", "faster_rcnn", "mask_rcnn", "retinanet"])
def test_tensors_map_to_the_expected_names(kind: str) -> None:
    theirs = detector(kind)
    imported = convert(file_of(theirs))
    assert call_name(imported.experiment.model).endswith("." + kind)
    assert len(imported.tensors) == len(theirs)
    assert check(imported.tensors, theirs, RETINANET if kind == "retinanet" else TWO_STAGES) >= 7
    if kind in ("fast_rcnn", "faster_rcnn", "mask_rcnn"):
        logits, deltas = (theirs[f"roi_heads.box.predictor.{name}.weight"] for name in ("cls_score", "bbox_pred"))
        assert torch.equal(imported.tensors["box_head.class_logits.weight"], torch.cat([logits[1:], logits[:1]]))
        assert torch.equal(imported.tensors["box_head.box_deltas.weight"], deltas[4:])
    if kind == "mask_rcnn":
        masks = theirs["roi_heads.mask.predictor.mask_fcn_logits.bias"]
        assert torch.equal(imported.tensors["mask_head.mask_logits.bias"], masks[1:])


def test_norms_without_eps_give_equal_outputs() -> None:
    """maskrcnn-benchmark divides by sqrt(var) without eps. Outputs agree even if the variance is far below our eps."""
    theirs = detector("fast_rcnn")
    prefix = "backbone.body.stem.bn1."
    theirs[prefix + "running_var"][:8] = torch.tensor([1e-12, 1e-9, 1e-6, 9e-6, 1e-5, 2e-5, 1.0, 1.0])
    ours = FrozenBatchNorm2d(64)
    tensors = convert(file_of(theirs)).tensors
    ours.load_state_dict({k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith("backbone.body.bn1.")})
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    weight, bias, mean, variance = (
        theirs[prefix + part].double().view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = (x - mean) * weight / variance.sqrt() + bias
    assert torch.allclose(ours(x.float()).double(), expected, rtol=1e-5, atol=1e-4)


def test_retinanet_deltas_include_the_box_weights() -> None:
    theirs = detector("retinanet")["rpn.head.bbox_pred.bias"]
    deltas = convert(file_of(detector("retinanet"))).tensors["head.box_deltas.bias"]
    anchors = torch.tensor([[10.0, 20.0, 49.0, 80.0]]).expand(9, 4)
    expected = decode(theirs.view(9, 4), anchors, (0.1, 0.1, 0.2, 0.2), plus_one=1.0)
    assert torch.allclose(decode(deltas.view(9, 4), anchors, (1.0, 1.0, 1.0, 1.0), plus_one=1.0), expected)


def test_settings() -> None:
    model = arguments_of(convert(file_of(detector("mask_rcnn"))).experiment.model)
    assert (model["conventions"], model["pixel_stats"]) == (CAFFE2, CAFFE)
    assert arguments_of(model["backbone"])["style"] == "caffe"
    assert (model["rpn"].test_pre_nms_per_level, model["rpn"].test_num_proposals) == (1000, 1000)
    retina_model = arguments_of(convert(file_of(detector("retinanet"))).experiment.model)
    assert retina_model["retina"].nms_iou == 0.4
    assert arguments_of(retina_model["backbone"])["extra_relu"]

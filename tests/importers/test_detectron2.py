"""Import of Detectron2's layout on a ResNet-18, compared with mappings written by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boxwright.backbones.backbone import PYTORCH
from boxwright.geometry.anchors import base_anchors, octave_sizes
from boxwright.importers.convert import convert
from boxwright.importers.detectron2 import MSRA, RESNEXT
from boxwright.training.experiment import arguments_of, call_name
from boxwright.weights.foreign import read_foreign
from importers.layouts import CHANNELS, MASK_WIDTH, WIDTH, file_of, filled, layer, norm, transposed

Shapes = dict[str, tuple[int, ...]]
NUM_CLASSES = 80


def body(prefix: str = "backbone.bottom_up.", statistics: bool = True) -> Shapes:
    """Shapes of a ResNet-18."""

    def conv(name: str, *shape: int) -> Shapes:
        return {f"{prefix}{name}.weight": shape, **norm(f"{prefix}{name}.norm", shape[0], statistics)}

    shapes = conv("stem.conv1", 64, 3, 7, 7)
    inputs = 64
    for stage, width in zip((2, 3, 4, 5), (64, 128, 256, 512), strict=True):
        for block in range(2):
            shapes |= conv(f"res{stage}.{block}.conv1", width, inputs, 3, 3)
            shapes |= conv(f"res{stage}.{block}.conv2", width, width, 3, 3)
            if inputs != width:
                shapes |= conv(f"res{stage}.{block}.shortcut", width, inputs, 1, 1)
            inputs = width
    return shapes


def pyramid(retina: bool = False) -> Shapes:
    shapes: Shapes = {}
    for stage, inputs in zip((2, 3, 4, 5), (64, 128, 256, 512), strict=True):
        if stage > 2 or not retina:
            shapes |= layer(f"backbone.fpn_lateral{stage}", CHANNELS, inputs, 1, 1)
            shapes |= layer(f"backbone.fpn_output{stage}", CHANNELS, CHANNELS, 3, 3)
    if retina:
        shapes |= layer("backbone.top_block.p6", CHANNELS, 512, 3, 3)
        shapes |= layer("backbone.top_block.p7", CHANNELS, CHANNELS, 3, 3)
    return shapes


def rpn() -> Shapes:
    return {
        **layer("proposal_generator.rpn_head.conv", CHANNELS, CHANNELS, 3, 3),
        **layer("proposal_generator.rpn_head.objectness_logits", 3, CHANNELS, 1, 1),
        **layer("proposal_generator.rpn_head.anchor_deltas", 12, CHANNELS, 1, 1),
    }


def box() -> Shapes:
    return {
        **layer("roi_heads.box_head.fc1", WIDTH, CHANNELS * 49),
        **layer("roi_heads.box_head.fc2", WIDTH, WIDTH),
        **layer("roi_heads.box_predictor.cls_score", NUM_CLASSES + 1, WIDTH),
        **layer("roi_heads.box_predictor.bbox_pred", 4 * NUM_CLASSES, WIDTH),
    }


def mask() -> Shapes:
    shapes = transposed("roi_heads.mask_head.deconv", MASK_WIDTH)
    for i in range(1, 5):
        shapes |= layer(f"roi_heads.mask_head.mask_fcn{i}", MASK_WIDTH, MASK_WIDTH if i > 1 else CHANNELS, 3, 3)
    return {**shapes, **layer("roi_heads.mask_head.predictor", NUM_CLASSES, MASK_WIDTH, 1, 1)}


def retina() -> Shapes:
    shapes: Shapes = {}
    for branch in ("cls_subnet", "bbox_subnet"):
        for i in (0, 2, 4, 6):
            shapes |= layer(f"head.{branch}.{i}", CHANNELS, CHANNELS, 3, 3)
    shapes |= layer("head.cls_score", 9 * NUM_CLASSES, CHANNELS, 3, 3)
    return {**shapes, **layer("head.bbox_pred", 36, CHANNELS, 3, 3)}


def detector(kind: str, statistics: bool = True) -> dict[str, Tensor]:
    parts = {
        "proposal_network": rpn(),
        "fast_rcnn": box(),
        "faster_rcnn": {**rpn(), **box()},
        "mask_rcnn": {**rpn(), **box(), **mask()},
        "retinanet": retina(),
    }
    return filled({**body(statistics=statistics), **pyramid(kind == "retinanet"), **parts[kind]})


KINDS = ["proposal_network", "fast_rcnn", "faster_rcnn", "mask_rcnn", "retinanet"]
MAPPING = {
    "backbone.body.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
    "backbone.body.bn1.running_mean": "backbone.bottom_up.stem.conv1.norm.running_mean",
    "backbone.body.layer1.1.conv2.weight": "backbone.bottom_up.res2.1.conv2.weight",
    "backbone.body.layer3.0.downsample.0.weight": "backbone.bottom_up.res4.0.shortcut.weight",
    "backbone.body.layer4.0.downsample.1.bias": "backbone.bottom_up.res5.0.shortcut.norm.bias",
    "backbone.body.layer4.1.bn2.running_var": "backbone.bottom_up.res5.1.conv2.norm.running_var",
    "backbone.lateral.0.weight": "backbone.fpn_lateral2.weight",
    "backbone.output.3.bias": "backbone.fpn_output5.bias",
    "rpn.conv.weight": "proposal_generator.rpn_head.conv.weight",
    "rpn.objectness.bias": "proposal_generator.rpn_head.objectness_logits.bias",
    "rpn.deltas.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
    "box_head.fc1.weight": "roi_heads.box_head.fc1.weight",
    "box_head.fc2.bias": "roi_heads.box_head.fc2.bias",
    "box_head.class_logits.weight": "roi_heads.box_predictor.cls_score.weight",
    "box_head.box_deltas.bias": "roi_heads.box_predictor.bbox_pred.bias",
    "mask_head.convs.0.weight": "roi_heads.mask_head.mask_fcn1.weight",
    "mask_head.upsample.weight": "roi_heads.mask_head.deconv.weight",
    "mask_head.mask_logits.weight": "roi_heads.mask_head.predictor.weight",
    "head.class_convs.6.weight": "head.cls_subnet.6.weight",
    "head.box_convs.2.bias": "head.bbox_subnet.2.bias",
    "backbone.extra_output.0.weight": "backbone.top_block.p6.weight",
    "backbone.extra_output.1.bias": "backbone.top_block.p7.bias",
}
RETINANET_MAPPING = {**MAPPING, "backbone.lateral.0.weight": "backbone.fpn_lateral3.weight"}
RETINANET_MAPPING["backbone.output.2.bias"] = RETINANET_MAPPING.pop("backbone.output.3.bias")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_map_to_the_expected_names(kind: str) -> None:
    theirs = detector(kind)
    extra = {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    imported = convert(file_of({**theirs, **extra}))
    assert call_name(imported.experiment.model).endswith("." + kind)
    assert imported.unused == list(extra)
    assert len(imported.tensors) == len(theirs)
    num_checked = 0
    for ours, name in (RETINANET_MAPPING if kind == "retinanet" else MAPPING).items():
        if name in theirs:
            assert torch.equal(imported.tensors[ours], theirs[name]), ours
            num_checked += 1
    assert num_checked >= 11


def test_retinanet_outputs_are_reordered_with_the_anchors() -> None:
    """Detectron2 orders anchors by size, then by ratio. Each output must stay with its anchor in Boxwright's order."""
    theirs = detector("retinanet")
    theirs["head.cls_score.bias"] = torch.arange(9 * NUM_CLASSES).float()
    theirs["head.bbox_pred.weight"] = torch.arange(36).float()[:, None, None, None].repeat(1, CHANNELS, 3, 3)
    tensors = convert(file_of(theirs)).tensors
    sizes, ratios = octave_sizes(32, 3), (0.5, 1.0, 2.0)
    order = []
    for size in sizes:
        for ratio in ratios:
            width = (size**2 / ratio) ** 0.5
            order.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    gaps = (base_anchors(sizes, ratios)[:, None] - torch.tensor(order)[None]).abs().amax(2)
    rows = gaps.argmin(1)
    assert gaps.amin(1).max() < 1e-4
    assert rows.tolist() != list(range(9))
    logits = tensors["head.class_logits.bias"].reshape(9, NUM_CLASSES)
    assert torch.equal(logits, theirs["head.cls_score.bias"].reshape(9, NUM_CLASSES)[rows])
    deltas = tensors["head.box_deltas.weight"][:, 0, 0, 0].reshape(9, 4)
    assert torch.equal(deltas, torch.arange(36.0).reshape(9, 4)[rows])


def test_pixel_statistics_and_style() -> None:
    def settings(**extra: Tensor) -> tuple[object, str]:
        model = arguments_of(convert(file_of({**detector("faster_rcnn"), **extra})).experiment.model)
        return model["pixel_stats"], arguments_of(model["backbone"])["style"]

    def column(*values: float) -> Tensor:
        return torch.tensor(values).view(3, 1, 1)

    assert settings() == (MSRA, "caffe")
    pixels = {"pixel_mean": column(*PYTORCH.mean), "pixel_std": column(*PYTORCH.std)}
    assert settings(**pixels) == (PYTORCH, "pytorch")
    pixels = {"pixel_mean": column(*RESNEXT.mean), "pixel_std": column(*RESNEXT.std)}
    assert settings(**pixels) == (RESNEXT, "pytorch")
    pixels = {"pixel_mean": column(102.9801, 115.9465, 122.7717), "pixel_std": column(1, 1, 1)}
    assert settings(**pixels) == (replace(MSRA, mean=(102.9801, 115.9465, 122.7717)), "caffe")


def test_pickled_arrays_and_norms_without_statistics(tmp_path: Path) -> None:
    """The model zoo's files are pickled arrays, and the norms of its Caffe-trained ResNets have no statistics."""
    theirs = detector("faster_rcnn", statistics=False)
    content = {"model": {k: v.numpy() for k, v in theirs.items()}, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "theirs.pkl").write_bytes(pickle.dumps(content))
    tensors = convert(read_foreign(tmp_path / "theirs.pkl")).tensors
    scale = tensors["backbone.body.bn1.weight"] / (tensors["backbone.body.bn1.running_var"] + 1e-5).sqrt()
    assert torch.allclose(scale, theirs["backbone.bottom_up.stem.conv1.norm.weight"], rtol=1e-6)
    assert not tensors["backbone.body.layer2.0.downsample.1.running_mean"].any()
    assert np.array_equal(tensors["box_head.fc2.weight"].numpy(), content["model"]["roi_heads.box_head.fc2.weight"])


def test_a_file_with_a_body_only_becomes_a_backbone() -> None:
    theirs = filled({**body(""), "stem.fc.weight": (1000, 512), "stem.fc.bias": (1000,)})
    imported = convert(file_of(theirs))
    assert imported.experiment is None
    assert imported.unused == ["stem.fc.weight", "stem.fc.bias"]
    assert torch.equal(imported.tensors["backbone.body.layer2.1.bn1.bias"], theirs["res3.1.conv1.norm.bias"])


def test_unsupported_parts_are_reported() -> None:
    theirs = detector("faster_rcnn")
    for name, why in {
        "roi_heads.keypoint_head.conv_fcn1.weight": "keypoints",
        "head.cls_subnet.1.weight": "after convolutions with biases",
        "backbone.bottom_up.res3.0.conv2_offset.weight": "deformable",
    }.items():
        with pytest.raises(ValueError, match=why):
            convert(file_of({**theirs, name: torch.ones(1)}))

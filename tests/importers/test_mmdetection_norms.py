"""Import of mmdetection models with GroupNorm (`configs/gn`), compared with mappings written by hand."""

from __future__ import annotations

import pytest
import torch

from boxwright.importers.convert import convert
from boxwright.training.experiment import arguments_of, call_name
from importers.layouts import CHANNELS, MASK_WIDTH, WIDTH, file_of, filled, layer, norm, transposed

Shapes = dict[str, tuple[int, ...]]
NUM_CLASSES = 80


def conv(name: str, *shape: int) -> Shapes:
    """Shapes of a convolution without bias and its norm, under the names of `ConvModule`."""
    return {f"{name}.conv.weight": shape, **norm(f"{name}.gn", shape[0], statistics=False)}


def body() -> Shapes:
    """Shapes of a ResNet-18 with GroupNorm."""
    shapes: Shapes = {"backbone.conv1.weight": (64, 3, 7, 7), **norm("backbone.gn1", 64, statistics=False)}
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"backbone.layer{stage}.{block}"
            for number, channels in ((1, inputs), (2, width)):
                shapes[f"{prefix}.conv{number}.weight"] = (width, channels, 3, 3)
                shapes |= norm(f"{prefix}.gn{number}", width, statistics=False)
            if inputs != width:
                shapes[f"{prefix}.downsample.0.weight"] = (width, inputs, 1, 1)
                shapes |= norm(f"{prefix}.downsample.1", width, statistics=False)
            inputs = width
    return shapes


def pyramid(retina: bool) -> Shapes:
    shapes: Shapes = {}
    for i, size in enumerate((128, 256, 512) if retina else (64, 128, 256, 512)):
        shapes |= conv(f"neck.lateral_convs.{i}", CHANNELS, size, 1, 1)
        shapes |= conv(f"neck.fpn_convs.{i}", CHANNELS, CHANNELS, 3, 3)
    if retina:
        shapes |= conv("neck.fpn_convs.3", CHANNELS, 512, 3, 3) | conv("neck.fpn_convs.4", CHANNELS, CHANNELS, 3, 3)
    return shapes


def two_stages(prefix: str, background: int, stage: str = "") -> Shapes:
    """Shapes of an RPN (two convolutions), a box head (four convolutions, one linear layer) and a mask head."""
    box, mask = f"{prefix}bbox_head{stage}", f"{prefix}mask_head{stage}"
    shapes = layer("rpn_head.rpn_cls", 3, CHANNELS, 1, 1) | layer("rpn_head.rpn_reg", 12, CHANNELS, 1, 1)
    for i in range(2):
        shapes |= layer(f"rpn_head.rpn_conv.{i}.conv", CHANNELS, CHANNELS, 3, 3)
    for i in range(4):
        shapes |= conv(f"{box}.shared_convs.{i}", 12, 12 if i else CHANNELS, 3, 3)
        shapes |= conv(f"{mask}.convs.{i}", MASK_WIDTH, MASK_WIDTH if i else CHANNELS, 3, 3)
    num_boxes = 1 if stage else NUM_CLASSES + background
    return {
        **shapes,
        **layer(f"{box}.shared_fcs.0", WIDTH, 12 * 49),
        **layer(f"{box}.fc_cls", NUM_CLASSES + 1, WIDTH),
        **layer(f"{box}.fc_reg", 4 * num_boxes, WIDTH),
        **transposed(f"{mask}.upsample", MASK_WIDTH),
        **layer(f"{mask}.conv_logits", NUM_CLASSES + background, MASK_WIDTH, 1, 1),
    }


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("first", [True, False], ids=["1.x", "2.x and 3.x"])
def test_two_stages_with_norms_everywhere(first: bool, cascade: bool) -> None:
    prefix, background = ("", 1) if first else ("roi_head.", 0)
    stages = [".0", ".1", ".2"] if cascade else [""]
    heads = {name: shape for stage in stages for name, shape in two_stages(prefix, background, stage).items()}
    theirs = filled({**body(), **pyramid(retina=False), **heads})
    imported = convert(file_of(theirs, meta={"mmdet_version": "1.2.0" if first else "2.28.0"}))
    assert call_name(imported.experiment.model).endswith(".cascade_mask_rcnn" if cascade else ".mask_rcnn")
    model = arguments_of(imported.experiment.model)
    backbone = arguments_of(model["backbone"])
    assert (backbone["norm"], backbone["fpn_norm"], model["box"].norm, model["mask"].norm) == ("gn",) * 4
    assert (model["box"].num_convs, model["box"].conv_width, model["box"].num_fcs) == (4, 12, 1)
    assert (model["mask"].num_convs, model["rpn"].num_convs) == (4, 2)
    assert len(imported.tensors) == len(theirs)
    assert not imported.unused
    their_stage, our_stage = (".2", "heads.2") if cascade else ("", "head")
    for ours, name in {
        "backbone.body.bn1.weight": "backbone.gn1.weight",
        "backbone.body.layer2.0.bn2.bias": "backbone.layer2.0.gn2.bias",
        "backbone.body.layer3.0.downsample.1.weight": "backbone.layer3.0.downsample.1.weight",
        "backbone.lateral.1.0.weight": "neck.lateral_convs.1.conv.weight",
        "backbone.lateral.1.1.bias": "neck.lateral_convs.1.gn.bias",
        "backbone.output.3.0.weight": "neck.fpn_convs.3.conv.weight",
        "backbone.output.3.1.weight": "neck.fpn_convs.3.gn.weight",
        "rpn.conv.weight": "rpn_head.rpn_conv.0.conv.weight",
        "rpn.more_convs.0.bias": "rpn_head.rpn_conv.1.conv.bias",
        f"box_{our_stage}.convs.2.0.weight": f"{prefix}bbox_head{their_stage}.shared_convs.2.conv.weight",
        f"box_{our_stage}.convs.3.1.bias": f"{prefix}bbox_head{their_stage}.shared_convs.3.gn.bias",
        f"box_{our_stage}.fc1.weight": f"{prefix}bbox_head{their_stage}.shared_fcs.0.weight",
        f"mask_{our_stage}.convs.1.0.weight": f"{prefix}mask_head{their_stage}.convs.1.conv.weight",
        f"mask_{our_stage}.convs.1.1.weight": f"{prefix}mask_head{their_stage}.convs.1.gn.weight",
    }.items():
        assert torch.equal(imported.tensors[ours], theirs[name]), ours


def test_retinanet_with_norms_everywhere() -> None:
    shapes = {**body(), **pyramid(retina=True)}
    for i in range(4):
        for branch in ("cls_convs", "reg_convs"):
            shapes |= conv(f"bbox_head.{branch}.{i}", CHANNELS, CHANNELS, 3, 3)
    shapes |= layer("bbox_head.retina_cls", 9 * NUM_CLASSES, CHANNELS, 3, 3)
    shapes |= layer("bbox_head.retina_reg", 36, CHANNELS, 3, 3)
    theirs = filled(shapes)
    imported = convert(file_of(theirs), source="mmdetection2")
    model = arguments_of(imported.experiment.model)
    assert (model["retina"].norm, model["retina"].num_convs) == ("gn", 4)
    assert (arguments_of(model["backbone"])["extra"], len(imported.tensors)) == ("c5", len(theirs))
    for ours, name in {
        "backbone.output.2.1.bias": "neck.fpn_convs.2.gn.bias",
        "backbone.extra_output.0.0.weight": "neck.fpn_convs.3.conv.weight",
        "backbone.extra_output.1.1.weight": "neck.fpn_convs.4.gn.weight",
        "head.class_convs.6.weight": "bbox_head.cls_convs.2.conv.weight",
        "head.class_convs.7.bias": "bbox_head.cls_convs.2.gn.bias",
        "head.box_convs.10.weight": "bbox_head.reg_convs.3.gn.weight",
    }.items():
        assert torch.equal(imported.tensors[ours], theirs[name]), ours


def test_weight_standardisation_is_refused_although_the_tensors_look_the_same() -> None:
    theirs = filled({**body(), **pyramid(retina=False), **two_stages("roi_head.", 0)})
    with pytest.raises(ValueError, match="weight standardisation"):
        convert(file_of(theirs, meta={"config": "conv_cfg = dict(type='ConvWS')\n"}))

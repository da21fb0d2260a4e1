"""Import of Detectron's blobs on a ResNet-50, compared with mappings written by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from boxwright.backbones.backbone import CAFFE
from boxwright.backbones.resnet import ResNet
from boxwright.geometry.conventions import CAFFE2
from boxwright.importers.convert import Imported, convert
from boxwright.layers.norm import has_untrained_statistics
from boxwright.training.experiment import arguments_of, call_name
from boxwright.weights.foreign import read_foreign
from importers.layouts import CHANNELS, MASK_WIDTH, WIDTH, file_of, filled

Shapes = dict[str, tuple[int, ...]]
NUM_CLASSES = 80


def blob(name: str, *shape: int) -> Shapes:
    return {f"{name}_w": shape, f"{name}_b": shape[:1]}


def body() -> Shapes:
    shapes: Shapes = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}

    def conv(name: str, *shape: int) -> Shapes:
        return {f"{name}_w": shape, f"{name}_bn_s": shape[:1], f"{name}_bn_b": shape[:1]}

    inputs = 64
    for stage, (width, num_blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=2):
        for block in range(num_blocks):
            prefix = f"res{stage}_{block}_branch"
            shapes |= conv(prefix + "2a", width, inputs, 1, 1)
            shapes |= conv(prefix + "2b", width, width, 3, 3)
            shapes |= conv(prefix + "2c", 4 * width, width, 1, 1)
            if block == 0:
                shapes |= conv(prefix + "1", 4 * width, inputs, 1, 1)
            inputs = 4 * width
    return shapes


LAST_BLOCKS = {2: 2, 3: 3, 4: 5, 5: 2}


def pyramid(retina: bool) -> Shapes:
    shapes: Shapes = {}
    for stage in range(3 if retina else 2, 6):
        name = f"res{stage}_{LAST_BLOCKS[stage]}_sum"
        lateral = "" if stage == 5 else "_lateral"
        shapes |= blob(f"fpn_inner_{name}{lateral}", CHANNELS, 2 ** (stage + 6), 1, 1)
        shapes |= blob(f"fpn_{name}", CHANNELS, CHANNELS, 3, 3)
    if retina:
        shapes |= {**blob("fpn_6", CHANNELS, 2048, 3, 3), **blob("fpn_7", CHANNELS, CHANNELS, 3, 3)}
    return shapes


def rpn() -> Shapes:
    return {
        **blob("conv_rpn_fpn2", CHANNELS, CHANNELS, 3, 3),
        **blob("rpn_cls_logits_fpn2", 3, CHANNELS, 1, 1),
        **blob("rpn_bbox_pred_fpn2", 12, CHANNELS, 1, 1),
    }


def box() -> Shapes:
    return {
        **blob("fc6", WIDTH, CHANNELS * 49),
        **blob("fc7", WIDTH, WIDTH),
        **blob("cls_score", NUM_CLASSES + 1, WIDTH),
        **blob("bbox_pred", 4 * (NUM_CLASSES + 1), WIDTH),
    }


def mask() -> Shapes:
    shapes: Shapes = {"conv5_mask_w": (MASK_WIDTH, MASK_WIDTH, 2, 2), "conv5_mask_b": (MASK_WIDTH,)}
    for i in range(1, 5):
        shapes |= blob(f"_[mask]_fcn{i}", MASK_WIDTH, MASK_WIDTH if i > 1 else CHANNELS, 3, 3)
    return {**shapes, **blob("mask_fcn_logits", NUM_CLASSES + 1, MASK_WIDTH, 1, 1)}


def retina() -> Shapes:
    shapes: Shapes = {}
    for branch in ("cls", "bbox"):
        for i in range(4):
            shapes |= blob(f"retnet_{branch}_conv_n{i}_fpn3", CHANNELS, CHANNELS, 3, 3)
    shapes |= blob("retnet_cls_pred_fpn3", 9 * NUM_CLASSES, CHANNELS, 3, 3)
    return {**shapes, **blob("retnet_bbox_pred_fpn3", 36, CHANNELS, 3, 3)}


PARTS = {
    "proposal_network": rpn(),
    "fast_rcnn": box(),
    "faster_rcnn": {**rpn(), **box()},
    "mask_rcnn": {**rpn(), **box(), **mask()},
    "retinanet": retina(),
}


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return filled(body())


def detector(kind: str, resnet: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**resnet, **filled({**pyramid(kind == "retinanet"), **PARTS[kind]})}


TWO_STAGES = {
    "backbone.body.conv1.weight": "conv1_w",
    "backbone.body.bn1.weight": "res_conv1_bn_s",
    "backbone.body.bn1.bias": "res_conv1_bn_b",
    "backbone.body.layer1.0.conv1.weight": "res2_0_branch2a_w",
    "backbone.body.layer2.3.bn2.weight": "res3_3_branch2b_bn_s",
    "backbone.body.layer3.5.conv3.weight": "res4_5_branch2c_w",
    "backbone.body.layer4.0.downsample.0.weight": "res5_0_branch1_w",
    "backbone.body.layer4.0.downsample.1.bias": "res5_0_branch1_bn_b",
    "backbone.lateral.0.weight": "fpn_inner_res2_2_sum_lateral_w",
    "backbone.lateral.2.bias": "fpn_inner_res4_5_sum_lateral_b",
    "backbone.lateral.3.weight": "fpn_inner_res5_2_sum_w",
    "backbone.output.1.weight": "fpn_res3_3_sum_w",
    "rpn.conv.bias": "conv_rpn_fpn2_b",
    "rpn.objectness.weight": "rpn_cls_logits_fpn2_w",
    "rpn.deltas.weight": "rpn_bbox_pred_fpn2_w",
    "box_head.fc1.weight": "fc6_w",
    "box_head.fc2.bias": "fc7_b",
    "mask_head.convs.3.weight": "_[mask]_fcn4_w",
    "mask_head.upsample.weight": "conv5_mask_w",
}
RETINANET = {
    "backbone.lateral.0.weight": "fpn_inner_res3_3_sum_lateral_w",
    "backbone.output.2.bias": "fpn_res5_2_sum_b",
    "backbone.extra_output.0.weight": "fpn_6_w",
    "backbone.extra_output.1.weight": "fpn_7_w",
    "head.class_convs.6.weight": "retnet_cls_conv_n3_fpn3_w",
    "head.box_convs.2.bias": "retnet_bbox_conv_n1_fpn3_b",
}


@pytest.mark.parametrize("kind", PARTS)
def test_blobs_map_to_the_expected_names(kind: str, resnet: dict[str, Tensor], tmp_path: Path) -> None:
    theirs = detector(kind, resnet)
    imported: Imported = convert(
        file_of({**theirs, "fc6_w_momentum": torch.ones(1), "lr": torch.ones(1)}),
    )
    assert call_name(imported.experiment.model).endswith("." + kind)
    assert imported.unused == ["fc6_w_momentum", "lr"]
    mapping = RETINANET if kind == "retinanet" else TWO_STAGES
    present = {ours: name for ours, name in mapping.items() if name in theirs}
    assert len(present) >= 6
    for ours, name in present.items():
        assert torch.equal(imported.tensors[ours], theirs[name]), ours
    if kind == "mask_rcnn":
        logits = theirs["cls_score_b"]
        assert torch.equal(imported.tensors["box_head.class_logits.bias"], torch.cat([logits[1:], logits[:1]]))
        assert torch.equal(imported.tensors["box_head.box_deltas.weight"], theirs["bbox_pred_w"][4:])
        assert torch.equal(imported.tensors["mask_head.mask_logits.weight"], theirs["mask_fcn_logits_w"][1:])
    if kind == "retinanet":
        # Second size, ratio 1: the fourth anchor in Detectron's order (ratios 1, 2, 0.5), the second in Boxwright's.
        assert torch.equal(imported.tensors["head.box_deltas.bias"][4:8], theirs["retnet_bbox_pred_fpn3_b"][12:16])
        ours, logits = imported.tensors["head.class_logits.weight"], theirs["retnet_cls_pred_fpn3_w"]
        assert torch.equal(ours[NUM_CLASSES : 2 * NUM_CLASSES], logits[3 * NUM_CLASSES : 4 * NUM_CLASSES])


def test_settings(resnet: dict[str, Tensor]) -> None:
    model = arguments_of(convert(file_of(detector("faster_rcnn", resnet))).experiment.model)
    assert (model["conventions"], model["pixel_stats"]) == (replace(CAFFE2, proposal_clip_multiple=32), CAFFE)
    assert arguments_of(model["backbone"])["style"] == "caffe"
    assert (model["rpn"].test_pre_nms_per_level, model["rpn"].test_num_proposals) == (1000, 1000)
    assert (model["box"].sampling_ratio, model["box"].nms_iou) == (2, 0.5)


def test_deltas_are_unscaled_if_the_configuration_has_no_bbox_reg_weights(resnet: dict[str, Tensor]) -> None:
    """Detectron itself treats its oldest files this way."""
    theirs = detector("fast_rcnn", resnet)

    def stds(**about: str) -> tuple[float, ...]:
        return arguments_of(convert(file_of(theirs, **about)).experiment.model)["box"].stds

    assert stds() == (0.1, 0.1, 0.2, 0.2)
    assert stds(cfg="MODEL:\n  BBOX_REG_WEIGHTS: [10.0, 10.0, 5.0, 5.0]\n") == (0.1, 0.1, 0.2, 0.2)
    assert stds(cfg="MODEL:\n  NUM_CLASSES: 81\n") == (1.0, 1.0, 1.0, 1.0)


def test_imagenet_pickle_becomes_a_body_with_affine_norms(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """The file has Python 2 strings, a bias of the first convolution, and a classifier, which is not imported."""
    blobs = {**resnet, **filled({"conv1_b": (64,), "fc1000_w": (10, 2048), "fc1000_b": (10,)})}
    arrays = {name: tensor.numpy() for name, tensor in blobs.items()}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": arrays, "cfg": "NUM_GPUS: 8"}, protocol=2))
    imported = convert(read_foreign(tmp_path / "R-50.pkl"))
    assert imported.experiment is None
    assert imported.unused == ["fc1000_w", "fc1000_b"]
    net = ResNet(50, style="caffe").eval()
    net.load_state_dict({name.removeprefix("backbone.body."): tensor for name, tensor in imported.tensors.items()})
    assert not has_untrained_statistics(net)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = torch.conv2d(x, blobs["conv1_w"].double(), blobs["conv1_b"].double(), stride=2, padding=3)
    scale, bias = (blobs[f"res_conv1_bn_{part}"].double().view(1, -1, 1, 1) for part in "sb")
    with torch.no_grad():
        actual = net.bn1(net.conv1(x.float())).double()
    assert (actual - expected * scale - bias).abs().max() < 1e-4

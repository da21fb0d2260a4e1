"""Exported models give equal detections in torchvision. Models that torchvision cannot express are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from typer.testing import CliRunner

import boxwright
from boxwright.backbones.backbone import CAFFE, PixelStats
from boxwright.backbones.fpn import resnet_fpn
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.geometry.conventions import DETECTRON, MODERN, TORCHVISION
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.convert import convert
from boxwright.importers.rules import rename
from boxwright.importers.torchvision import rules
from boxwright.importers.torchvision_export import export
from boxwright.structures import Batch, map_tensors
from boxwright.training.experiment import Experiment, build, from_json, to_json
from boxwright.weights.foreign import ForeignFile, read_foreign
from boxwright.weights.ours import save_weights
from importers.test_torchvision import detections_of, image_of
from parity.peer import real_batch

NAMES = [f'thing "{number}"' for number in range(7)]
CATEGORIES = [Category(id=number, name=name) for number, name in enumerate(NAMES, start=1)]
PIXELS = PixelStats(mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0))
R18: Any = partial(resnet_fpn, depth=18, norm="bn")
R18_P3: Any = partial(R18, out_stages=(3, 4, 5), extra="c5", extra_relu=True)
UNROUNDED = replace(TORCHVISION, anchor_rounding="none", anchor_strides_from_canvas=False)
RPN = RPNConfig(anchor_scale=6.0, ratios=(0.4, 1.0), test_pre_nms_per_level=300, test_num_proposals=200, nms_iou=0.6)
BOX = BoxConfig(
    width=64, output_size=5, num_levels=3, sampling_ratio=1, stds=(0.2, 0.1, 0.3, 0.2), score_threshold=0.1, nms_iou=0.4
)
MASK = MaskConfig(width=32, num_convs=2, output_size=10, num_levels=2)
RETINA = RetinaConfig(
    norm="gn", anchor_scale=3.0, scales_per_octave=2, ratios=(0.5, 2.0), score_threshold=0.02, max_detections=80
)
MODELS: dict[str, Any] = {
    "faster_rcnn with torchvision settings": partial(faster_rcnn, backbone=R18, conventions=TORCHVISION),
    "mask_rcnn with torchvision settings": partial(mask_rcnn, backbone=R18, conventions=TORCHVISION),
    "mask_rcnn with other settings and anchors": partial(
        mask_rcnn, backbone=R18, conventions=UNROUNDED, pixel_stats=PIXELS, rpn=RPN, box=BOX, mask=MASK
    ),
    "retinanet with torchvision settings": partial(retinanet, backbone=R18_P3, conventions=TORCHVISION),
    "retinanet with other settings and Boxwright anchors": partial(
        retinanet, backbone=partial(R18_P3, extra="p5"), conventions=MODERN, pixel_stats=PIXELS, retina=RETINA
    ),
}


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_batch(data_dir)


def trained(model: Any, batch: Batch) -> nn.Module:
    """Build the model with random weights that preserve the scale of activations and spread scores and boxes."""
    torch.manual_seed(3)
    detector: Any = build(model, num_classes=len(NAMES))
    for name, module in detector.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, *((0.1, 0.3) if name.endswith("bn2") else (0.5, 1.5)))
    detector.train()
    with torch.no_grad():
        detector.backbone(detector.normalize(batch.images, batch.image_sizes))
        # Untrained output layers start near 0, so all scores would be nearly equal.
        if hasattr(detector, "head"):
            for layer in (*detector.head.class_convs, *detector.head.box_convs):
                if isinstance(layer, nn.Conv2d):
                    layer.weight *= 3
            detector.head.class_logits.bias += 2
        else:
            for layer, factor in ((detector.rpn.objectness, 10), (detector.rpn.deltas, 3)):
                layer.weight *= factor
            for layer, factor in ((detector.box_head.class_logits, 10), (detector.box_head.box_deltas, 30)):
                layer.weight *= factor
    return detector.eval()


def saved(detector: nn.Module, model: Any, path: Path) -> Path:
    metadata = {
        "experiment": to_json(Experiment(model=model)),
        "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
    }
    save_weights(path, detector.state_dict(), metadata)
    return path


def exported(path: Path, out: Path) -> str:
    result = CliRunner().invoke(app, ["weights", "export", str(path), "--to", "torchvision", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.output


def built(code: str) -> tuple[Any, list[str]]:
    """Run the exported Python code. Returns its model and its class names."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"], names["names"]


def imported(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename(state, rules(state.keys())).tensors


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_exported_models_give_equal_detections(kind: str, batch: Batch, tmp_path: Path) -> None:
    path = saved(trained(MODELS[kind], batch), MODELS[kind], tmp_path / "ours.safetensors")
    peer, names = built(exported(path, tmp_path / "theirs.pth"))
    model, image = boxwright.load(path), image_of(batch)
    actual = model.predict(image, native=True)
    peer.transform.max_size = 10**7
    expected = detections_of(peer, image / np.float32(255))
    assert len(actual) == len(expected["scores"]) > 30, "too few detections for a meaningful comparison"
    assert len(set(actual.labels)) > 2
    assert actual.names == [names[label] for label in expected["labels"]]
    assert np.abs(actual.scores - expected["scores"].numpy()).max() < 1e-4
    assert np.abs(actual.boxes - expected["boxes"].numpy()).max() < 1e-2
    if actual.masks is not None:
        # Compared before pasting, because torchvision pastes differently.
        peer.transform.postprocess = lambda detections, *_: detections
        masks = model.detector.detect(map_tensors(batch, lambda tensor: tensor[:1])).masks[0]
        expected_masks = detections_of(peer, image / np.float32(255))["masks"].squeeze(1)
        assert expected_masks.std() > 0.1, "the masks are too uniform for a meaningful comparison"
        assert (masks - expected_masks).abs().max() < 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_boxwright_weights_survive_export_and_import_bit_for_bit(kind: str, batch: Batch, tmp_path: Path) -> None:
    model = MODELS[kind]
    detector = trained(model, batch)
    back = imported(export(detector, Experiment(model=model), CATEGORIES).tensors)
    tensors = {name: t for name, t in detector.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


PUBLISHED: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": fasterrcnn_resnet50_fpn,
    "mask_rcnn": maskrcnn_resnet50_fpn,
    "retinanet": retinanet_resnet50_fpn,
    "retinanet_v2": retinanet_resnet50_fpn_v2,
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_torchvision_weights_survive_import_and_export_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Except for the boxes and masks of the background class, which are never read, and `num_batches_tracked`."""
    torch.manual_seed(0)
    peer = PUBLISHED[kind](weights=None, weights_backbone=None)
    state = peer.state_dict()
    file = ForeignFile(path=tmp_path / "theirs.pth", sha256=64 * "0", tensors=state, about={})
    convert(file).save(tmp_path / "ours.safetensors")
    code = exported(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = read_foreign(tmp_path / "back.pth").tensors
    assert back.keys() == {name for name in state if not name.endswith("num_batches_tracked")}
    for name, tensor in back.items():
        first = 4 if "bbox_pred" in name and "roi" in name else 1 if "mask_fcn_logits" in name else 0
        assert torch.equal(tensor[first:], state[name][first:]), name
        assert not tensor[:first].any(), "background rows must be zero"
    peer.load_state_dict(back, strict=True)
    model, names = built(code)
    assert names[1:3] == ["person", "bicycle"]
    assert names[0] == ("N/A 0" if "retinanet" in kind else "__background__")
    anchors = peer.anchor_generator if "retinanet" in kind else peer.rpn.anchor_generator
    assert (model.anchor_generator if "retinanet" in kind else model.rpn.anchor_generator).sizes == anchors.sizes
    for part in ("min_size", "max_size", "image_mean", "image_std"):
        assert getattr(model.transform, part) == pytest.approx(getattr(peer.transform, part), abs=1e-9)
    if "retinanet" in kind:
        assert model.head.regression_head._loss_type == peer.head.regression_head._loss_type  # type: ignore[union-attr]
    thresholds = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
    for part, theirs in ((model, peer), *([] if "retinanet" in kind else [(model.roi_heads, peer.roi_heads)])):
        assert [getattr(part, n, None) for n in thresholds] == [getattr(theirs, n, None) for n in thresholds]


@pytest.mark.parametrize(
    "body",
    [
        {"depth": 34},
        {"depth": 101},
        {"depth": 50, "groups": 32, "width_per_group": 4},
        {"depth": 101, "groups": 32, "width_per_group": 8},
        {"depth": 101, "groups": 64, "width_per_group": 4},
    ],
)
def test_every_torchvision_backbone_can_be_exported(body: dict[str, int]) -> None:
    model = partial(mask_rcnn, backbone=partial(resnet_fpn, **body), conventions=TORCHVISION)  # type: ignore[arg-type]
    names: dict[str, Any] = {}
    with torch.device("meta"):
        exported_model = export(build(model, num_classes=len(NAMES)), Experiment(model=model), CATEGORIES)
        exec(exported_model.code, names)
    expected = {name: tensor.shape for name, tensor in names["model"].state_dict().items()}
    assert {name: tensor.shape for name, tensor in exported_model.tensors.items()} == expected


def export_error(model: Any) -> str:
    with torch.device("meta"):
        detector = build(model, num_classes=len(NAMES))
    with pytest.raises(ValueError) as caught:
        export(detector, Experiment(model=model), CATEGORIES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (partial(faster_rcnn, backbone=R18), ["conventions.roi_align_aligned is True, expected False (train with"]),
        (
            partial(faster_rcnn, backbone=R18, conventions=DETECTRON),
            ["plus_one is 1.0", "anchor_rounding is detectron"],
        ),
        (partial(faster_rcnn, backbone=R18, pixel_stats=CAFFE), ["the order of the pixels is bgr"]),
        (partial(faster_rcnn, backbone=R18, box=BoxConfig(class_agnostic=True)), ["box.class_agnostic is True"]),
        (partial(faster_rcnn, backbone=R18, box=BoxConfig(nms="linear")), ["box.nms is linear, expected hard"]),
        (partial(faster_rcnn, backbone=R18, rpn=RPNConfig(min_size=0.0)), ["rpn.min_size is 0.0, expected 0.001"]),
        (
            partial(faster_rcnn, backbone=partial(resnet_fpn, depth=50, style="caffe", channels=64, fpn_norm="gn")),
            ["the style of the backbone is caffe", "pyramid has norm layers", "64 channels"],
        ),
        (
            partial(faster_rcnn, backbone=partial(resnet_fpn, norm="gn", extra=None)),
            ["the norm of the backbone is gn", "no extra level"],
        ),
        (
            partial(faster_rcnn, backbone=partial(resnet_fpn, depth=101, groups=32, width_per_group=4)),
            ["32 groups of width 4"],
        ),
        (partial(retinanet, backbone=partial(R18_P3, extra_relu=False)), ["no ReLU between P6 and P7 (train with"]),
        (partial(retinanet, backbone=R18_P3, retina=RetinaConfig(num_convs=2)), ["retina.num_convs is 2, expected 4"]),
        (partial(proposal_network, backbone=R18), ["proposal_network cannot be exported"]),
    ],
)
def test_models_that_torchvision_cannot_express_are_refused_with_every_reason(model: Any, messages: list[str]) -> None:
    error = export_error(model)
    for message in messages:
        assert message in error


def test_training_settings_and_roi_settings_of_a_retinanet_do_not_prevent_export(batch: Batch) -> None:
    model = partial(
        retinanet,
        backbone=R18_P3,
        conventions=MODERN,
        retina=RetinaConfig(prior=0.1, focal_gamma=1.0, positive_iou=0.6),
    )
    with torch.device("meta"):
        export(build(model, num_classes=7), Experiment(model=model), CATEGORIES)


def test_text_instead_of_a_number_is_refused_before_it_reaches_exported_code() -> None:
    """The export writes the settings of a weights file into Python code, and the file may be untrusted."""
    model = partial(faster_rcnn, backbone=R18, conventions=TORCHVISION, box=BoxConfig(score_threshold=0.25))
    text = json.dumps(to_json(Experiment(model=model)))
    data = json.loads(text.replace('"score_threshold": 0.25', '"score_threshold": "1); exit("'))
    with pytest.raises(ValueError, match=r"score_threshold: .*got '1\); exit\('"):
        from_json(data)


def l1_of_edges(predictions: Tensor, targets: Tensor) -> Tensor:
    """A user-defined box loss."""
    return (predictions - targets).abs().sum(-1)


@pytest.mark.parametrize(
    ("box_loss", "theirs"),
    [("smooth_l1", "l1"), ("giou", "giou"), ("diou", "diou"), ("ciou", "ciou"), (l1_of_edges, "l1")],
)
def test_iou_losses_are_exported_and_other_box_losses_become_l1(box_loss: Any, theirs: str) -> None:
    model = partial(retinanet, backbone=R18_P3, conventions=TORCHVISION, retina=RetinaConfig(box_loss=box_loss))
    with torch.device("meta"):
        code = export(build(model, num_classes=7), Experiment(model=model), CATEGORIES).code
        names: dict[str, Any] = {}
        exec(code, names)
    assert names["model"].head.regression_head._loss_type == theirs


def test_settings_appear_in_exported_code_as_literals(batch: Batch, tmp_path: Path) -> None:
    """Exported code quotes the value of a setting, even a value that `BoxConfig` would refuse."""
    box = BoxConfig()
    object.__setattr__(box, "score_threshold", "1); exit(")
    model = partial(faster_rcnn, backbone=R18, conventions=TORCHVISION, box=box)
    with torch.device("meta"):
        code = export(build(model, num_classes=7), Experiment(model=model), CATEGORIES).code
    assert "box_score_thresh='1); exit('," in code


def test_the_export_command_refuses_unknown_targets_and_suffixes(tmp_path: Path) -> None:
    for arguments, message in (
        (["x", "--to", "onnx", "--out", "x.pth"], "--to: expected torchvision"),
        (["x", "--out", "x.safetensors"], "ends in .pth"),
    ):
        result = CliRunner().invoke(app, ["weights", "export", *arguments])
        assert result.exit_code == 1
        assert message in result.output

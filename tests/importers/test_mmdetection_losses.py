"""Loss settings are read from the configuration inside an mmdetection checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from boxwright.importers.mmdetection import FIRST, LATER
from boxwright.importers.mmdetection_losses import with_losses
from boxwright.importers.source import Settings
from boxwright.weights.foreign import ForeignFile
from importers.reference import FIXTURES, Reference

NAMES = sorted(file.name.removesuffix(".json.gz") for file in FIXTURES.glob("mmdetection*.json.gz"))
ROI_HEAD = "model = dict(rpn_head=dict({rpn}), roi_head=dict(bbox_head=dict({box}), mask_head=dict({mask})))"


def losses_of(text: str) -> Settings:
    return with_losses(Settings(), text)


def box_losses(fields: str) -> tuple[Any, ...]:
    box = losses_of(ROI_HEAD.format(rpn="", box=fields, mask="")).box
    return box.box_loss, box.smooth_l1_beta, box.box_loss_weight


@pytest.mark.parametrize("name", NAMES)
def test_published_configurations_give_the_published_settings(name: str) -> None:
    """The importers' settings per version and mmdetection's own configuration of the model agree."""
    reference = Reference.load(name)
    source = FIRST if name[len("mmdetection")] in "01" else LATER
    about = reference.about
    (key,) = {"config", "cfg"} & about["meta"].keys()
    text = about["meta"][key]
    assert "loss_bbox=" in text or name.startswith("mmdetection0")
    without_model = {"meta": {**about["meta"], key: text.replace("model = ", "unused = ")}}
    settings = [
        source.settings(ForeignFile(path=Path("x.pth"), sha256="0" * 64, tensors=reference.tensors(), about=metadata))
        for metadata in (about, without_model)
    ]
    assert settings[0] == settings[1]


def test_losses_of_every_head_are_read() -> None:
    settings = losses_of(
        ROI_HEAD.format(
            rpn="loss_cls=dict(loss_weight=0.7), loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=3)",
            box="loss_cls=dict(loss_weight=2.0), loss_bbox=dict(type='L1Loss', loss_weight=1.5)",
            mask="loss_mask=dict(loss_weight=0.5)",
        )
    )
    assert settings.rpn.objectness_loss_weight == 0.7
    assert (settings.rpn.smooth_l1_beta, settings.rpn.box_loss_weight) == (1 / 9, 3.0)
    assert (settings.box.class_loss_weight, settings.box.smooth_l1_beta, settings.box.box_loss_weight) == (2.0, 0, 1.5)
    assert settings.mask.mask_loss_weight == 0.5
    assert settings.retina == Settings().retina


def test_losses_of_a_retinanet_are_read() -> None:
    head = "type='RetinaHead', reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=2.0)"
    settings = losses_of(f"model = dict(bbox_head=dict(loss_cls={{'loss_weight': 4}}, {head}))")
    retina = settings.retina
    assert (retina.box_loss, retina.box_loss_weight, retina.class_loss_weight) == ("giou", 2.0, 4.0)
    assert settings.box == Settings().box


@pytest.mark.parametrize(("kind", "box_loss"), [("GIoULoss", "giou"), ("DIoULoss", "diou"), ("CIoULoss", "ciou")])
def test_iou_losses_are_read(kind: str, box_loss: str) -> None:
    loss = f"loss_bbox=dict(type='{kind}', loss_weight=10.0)"
    assert box_losses(f"reg_decoded_bbox=True, {loss}") == (box_loss, 1.0, 10.0)
    assert box_losses(loss) == ("smooth_l1", 1.0, 1.0), "an IoU loss on undecoded box deltas must be ignored"


@pytest.mark.parametrize(
    "fields",
    [
        "reg_decoded_bbox=True, loss_bbox=dict(type='IoULoss', loss_weight=10.0)",
        "reg_decoded_bbox=True, loss_bbox=dict(type='L1Loss', loss_weight=10.0)",
        "loss_bbox=dict(type='BalancedL1Loss', alpha=0.5, beta=2.0, loss_weight=10.0)",
        "loss_bbox=dict(type='SmoothL1Loss', beta=-1.0, loss_weight='10')",
        "loss_bbox=dict(type='SmoothL1Loss', beta=1 / 0, loss_weight=1e999)",
        "loss_bbox=open('x'), loss_cls=[1, 2]",
    ],
)
def test_unsupported_losses_leave_the_settings_unchanged(fields: str) -> None:
    assert losses_of(ROI_HEAD.format(rpn=fields, box=fields, mask="loss_mask=3")) == Settings()


@pytest.mark.parametrize("text", ["", "model = dict(", "model = 3", "model = f()", "model = dict(**x)", "a\x00b"])
def test_invalid_configuration_text_leaves_the_settings_unchanged(text: str) -> None:
    assert losses_of(text) == Settings()


def test_cascade_losses_are_read_only_if_all_stages_agree() -> None:
    stages = "bbox_head=[dict(target_stds=[1], loss_bbox=dict(type='L1Loss', loss_weight={})), dict(loss_bbox={})]"
    equal = "dict(type='L1Loss', loss_weight=2.0)"
    assert losses_of(f"model = dict({stages.format(2.0, equal)})").box.box_loss_weight == 2.0
    assert losses_of(f"model = dict({stages.format(3.0, equal)})") == Settings()


def test_a_converted_file_trains_with_the_losses_of_its_configuration() -> None:
    text = ROI_HEAD.format(
        rpn="", box="reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=10)", mask=""
    )
    tensors = {"roi_head.bbox_head.shared_fcs.0.weight": torch.zeros(1, 1)}
    about = {"meta": {"mmdet_version": "2.28.2", "config": text}}
    box = LATER.settings(ForeignFile(path=Path("x.pth"), sha256="0" * 64, tensors=tensors, about=about)).box
    assert (box.box_loss, box.box_loss_weight) == ("giou", 10.0)

"""torchvision's models have a row for each COCO id up to 90; `boxwright test` evaluates the 80 classes with a name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from typer.testing import CliRunner

import boxwright
from boxwright.cli.main import app
from boxwright.importers.categories import COCO

LIKELY = [1, 12, 18, 26, 90]
"""Ids of the classes that the models predict: three COCO classes, and two ids that COCO does not use."""
SMALL = ["--set", "resize.short=192", "--set", "resize.long=256"]
"""Images of 480 x 640 fill a canvas of this size, in a batch as well as alone; their anchors depend on it."""


def likely_only(bias: torch.Tensor) -> None:
    """Set biases [..., 91] with which the classes `LIKELY` have the highest scores."""
    bias.fill_(-8)
    bias[..., LIKELY] = 0.0


@torch.no_grad()
def faster_rcnn() -> nn.Module:
    torch.manual_seed(0)
    model = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=91)
    likely_only(model.roi_heads.box_predictor.cls_score.bias)
    return model


@torch.no_grad()
def retinanet() -> nn.Module:
    torch.manual_seed(0)
    extra = LastLevelP6P7(256, 256)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=extra
    )
    model = RetinaNet(backbone, num_classes=91)
    likely_only(model.head.classification_head.cls_logits.bias.view(9, 91))
    return model


@pytest.fixture
def few_images(data_dir: Path, tmp_path: Path) -> Path:
    """Three images of COCO with its 80 classes, which have other ids and another order here."""
    source = data_dir / "coco_mini"
    annotations = json.loads(next((source / "annotations").glob("instances_val2017*.json")).read_text())
    annotations["images"] = [
        image for image in annotations["images"] if (image["height"], image["width"]) == (480, 640)
    ][:3]
    image_ids = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["image_id"] in image_ids]
    for entry in (*annotations["annotations"], *annotations["categories"]):
        key = "id" if "name" in entry else "category_id"
        entry[key] = 1000 - entry[key]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "instances_val.json").write_text(json.dumps(annotations))
    (folder / "val").symlink_to(source / "val2017")
    return folder


@pytest.mark.parametrize(("make", "head"), [(faster_rcnn, "box"), (retinanet, "retina")])
def test_classes_are_matched_by_name_and_unused_ones_are_ignored(
    make: Callable[[], nn.Module], head: str, few_images: Path, tmp_path: Path
) -> None:
    torch.save(make().state_dict(), tmp_path / "torchvision.pth")
    weights = tmp_path / "boxwright.safetensors"
    limit = f"model.{head}.max_detections=1000"  # so that one class does not fill it
    commands = [
        ["weights", "convert", str(tmp_path / "torchvision.pth"), "--out", str(weights), *SMALL, "--set", limit],
        [
            "test",
            str(weights),
            "--data",
            str(few_images),
            "--workers",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ],
    ]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    annotations = json.loads((few_images / "instances_val.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    assert len(names) == len(COCO) == 80
    actual = Counter((entry["image_id"], names[entry["category_id"]]) for entry in results)
    model = boxwright.load(weights)
    expected: Counter[tuple[int, str]] = Counter()
    for image in annotations["images"]:
        prediction = model.predict(few_images / "val" / image["file_name"])
        expected.update((image["id"], name) for name in prediction.names)
    unused = {key for key in expected if key[1].startswith("N/A")}
    assert {name for _, name in unused} == {"N/A 12", "N/A 26"}, "the model must predict unused classes"
    assert actual == Counter({key: count for key, count in expected.items() if key not in unused})
    assert {name for _, name in actual} == {"person", "dog", "toothbrush"}

"""Torchvision's models have a row for each COCO id up to the last; `boxwright test` reads the 80 that have a name."""

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
"""What the models take everything for: three of COCO's ids, and two that it does not use."""
SMALL = ["--set", "resize.short=192", "--set", "resize.long=256"]
"""Images of 480 x 640 fill a canvas of this size, in a batch as well as alone; their anchors depend on it."""


def likely_only(bias: torch.Tensor) -> None:
    """[..., 91] biases under which these classes score most."""
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
    page = json.loads(next((source / "annotations").glob("instances_val2017*.json")).read_text())
    page["images"] = [image for image in page["images"] if (image["height"], image["width"]) == (480, 640)][:3]
    kept = {image["id"] for image in page["images"]}
    page["annotations"] = [thing for thing in page["annotations"] if thing["image_id"] in kept]
    for thing in (*page["annotations"], *page["categories"]):
        key = "id" if "name" in thing else "category_id"
        thing[key] = 1000 - thing[key]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "instances_val.json").write_text(json.dumps(page))
    (folder / "val").symlink_to(source / "val2017")
    return folder


@pytest.mark.parametrize(("make", "head"), [(faster_rcnn, "box"), (retinanet, "retina")])
def test_classes_go_by_name_and_unused_ones_are_left_out(
    make: Callable[[], nn.Module], head: str, few_images: Path, tmp_path: Path
) -> None:
    torch.save(make().state_dict(), tmp_path / "theirs.pth")
    weights = tmp_path / "ours.safetensors"
    room = f"model.{head}.max_detections=1000"  # or one class fills it
    commands = [
        ["weights", "convert", str(tmp_path / "theirs.pth"), "--out", str(weights), *SMALL, "--set", room],
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
    page = json.loads((few_images / "instances_val.json").read_text())
    found = json.loads((tmp_path / "results.json").read_text())
    names = {category["id"]: category["name"] for category in page["categories"]}
    assert len(names) == len(COCO) == 80
    given = Counter((entry["image_id"], names[entry["category_id"]]) for entry in found)
    model = boxwright.load(weights)
    expected: Counter[tuple[int, str]] = Counter()
    for image in page["images"]:
        prediction = model.predict(few_images / "val" / image["file_name"])
        expected.update((image["id"], name) for name in prediction.names)
    unused = {key for key in expected if key[1].startswith("N/A")}
    assert {name for _, name in unused} == {"N/A 12", "N/A 26"}, "without any, nothing is left out"
    assert given == Counter({key: count for key, count in expected.items() if key not in unused})
    assert {name for _, name in given} == {"person", "dog", "toothbrush"}

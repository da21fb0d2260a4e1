from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from typer.testing import CliRunner

import boxwright
from boxwright.cli.main import app

RUNNER = CliRunner()


def run(*arguments: object, status: int = 0) -> str:
    result = RUNNER.invoke(app, ["weights", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "detector.pth"
    torch.manual_seed(0)
    state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(state, path)
    return path


def changed(checkpoint: Path, out: Path, change: dict[str, torch.Tensor | None]) -> Path:
    state = torch.load(checkpoint, weights_only=True)
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, out)
    return out


def test_inspect_says_what_it_is_and_what_was_assumed(checkpoint: Path, tmp_path: Path) -> None:
    theirs = run("inspect", checkpoint)
    out = tmp_path / "ours.safetensors"
    run("convert", checkpoint, "--out", out, "--set", "model.box.score_threshold=0.25")
    ours = run("inspect", out)
    for printed in (theirs, ours):
        assert "faster_rcnn, ResNet of depth 50, 90 classes" in printed
        assert "model.pixel_stats.order = rgb model.pixel_stats.mean = 123.675,116.28,103.53" in printed
        assert "model.backbone.style = pytorch" in printed
        assert "model.conventions.roi_align_aligned = False" in printed
        assert "box_head: 8 tensors, 14,357,955 numbers, float32" in printed
    assert "a torchvision detector, sha256" in theirs
    assert "model.box.score_threshold = 0.05" in theirs
    assert "model.box.score_threshold = 0.25" in ours
    assert boxwright.load(out).detector.box_head.config.score_threshold == 0.25


def test_what_the_file_does_not_say_can_be_told(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    settings = {"model.pixel_stats.order": "bgr", "model.backbone.style": "caffe", "model.conventions.plus_one": "1.0"}
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    run("convert", checkpoint, "--out", out, *arguments)
    printed = run("inspect", out)
    for name, value in settings.items():
        assert f"{name} = {value}" in printed
    detector = boxwright.load(out).detector
    assert detector.normalize.reverse_colours
    assert detector.backbone.body.layer2[0].conv1.stride == (2, 2)
    assert "model.backbone has no 'stile'" in run("inspect", checkpoint, "--set", "model.backbone.stile=a", status=1)


def test_hash_that_is_not_the_files_stops_it(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    assert "it is another file, or damaged" in run("convert", checkpoint, "--out", out, "--sha256", "ab", status=1)
    assert not out.exists()


def test_unknown_missing_and_mismatched_tensors_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def error(change: dict[str, torch.Tensor | None]) -> str:
        path = changed(checkpoint, tmp_path / "x.pth", change)
        printed = run("convert", path, "--out", tmp_path / "ours.safetensors", status=1)
        assert not (tmp_path / "ours.safetensors").exists()
        return printed

    assert "1 tensors are no part of the models" in error({"roi_heads.mask_iou.weight": torch.ones(1)})
    assert "1 tensors are missing: box_head.fc2.bias" in error({"roi_heads.box_head.fc7.bias": None})
    assert "rpn.deltas.bias is [60] in the file and [12] in the model" in error(
        {"rpn.head.bbox_pred.bias": torch.ones(60)}
    )
    assert "1 tensors have no place in the model: rpn.conv.scale" in error({"rpn.head.conv.0.0.scale": torch.ones(1)})
    body = {f"backbone.body.layer3.5.{name}": None for name in ("conv1.weight", "conv2.weight")}
    assert "no ResNet here has" in error(body)


def test_files_of_no_known_kind_and_wrong_names(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "x.pth")
    assert "of no kind that is read here (torchvision" in run("inspect", tmp_path / "x.pth", status=1)
    assert "there is no source 'tv'" in run("inspect", checkpoint, "--source", "tv", status=1)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    printed = run("inspect", checkpoint, "--categories", tmp_path / "names.txt", status=1)
    assert "it has 90 classes, but 2 are named: cat, dog" in printed


def test_classes_that_nobody_names_must_be_given(checkpoint: Path, tmp_path: Path) -> None:
    predictor = {
        f"roi_heads.box_predictor.{name}": torch.zeros(shape)
        for name, shape in {
            "cls_score.weight": (3, 1024),
            "cls_score.bias": (3,),
            "bbox_pred.weight": (12, 1024),
            "bbox_pred.bias": (12,),
        }.items()
    }
    path = changed(checkpoint, tmp_path / "two.pth", predictor)
    printed = run("convert", path, "--out", tmp_path / "ours.safetensors", status=1)
    assert "does not name its 2 classes: give --categories" in printed
    assert "2 classes: class 1, class 2" in run("inspect", path), "which one may look at nevertheless"
    (tmp_path / "coco.json").write_text('{"categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]}')
    assert "2 classes: cat, dog" in run("inspect", path, "--categories", tmp_path / "coco.json")
    (tmp_path / "coco.json").write_text('{"categories": [{"name": "dog"}]}')
    printed = run("inspect", path, "--categories", tmp_path / "coco.json", status=1)
    assert "no list of categories with an id and a name" in printed


def test_diff_compares_under_our_names(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    run("convert", checkpoint, "--out", out)
    assert run("diff", checkpoint, out) == "295 tensors equal, 0 different"
    bias = torch.load(checkpoint, weights_only=True)["rpn.head.bbox_pred.bias"]
    change = {
        "rpn.head.bbox_pred.bias": bias + 0.5,
        "rpn.head.cls_logits.bias": torch.ones(15),
        "roi_heads.box_head.fc7.bias": None,
    }
    printed = run("diff", changed(checkpoint, tmp_path / "x.pth", change), out, status=1)
    assert "only in B: box_head.fc2.bias [1024]" in printed
    assert "shape: rpn.objectness.bias is [15] in A and [3] in B" in printed
    assert "value: rpn.deltas.bias differs by up to 0.5" in printed
    assert "292 tensors equal, 3 different" in printed

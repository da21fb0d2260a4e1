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
    path = tmp_path_factory.mktemp("torchvision") / "detector.pth"
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


def test_inspect_prints_the_model_and_the_assumed_settings(checkpoint: Path, tmp_path: Path) -> None:
    original = run("inspect", checkpoint)
    out = tmp_path / "ours.safetensors"
    run("convert", checkpoint, "--out", out, "--set", "model.box.score_threshold=0.25")
    converted = run("inspect", out)
    for printed in (original, converted):
        assert "faster_rcnn, ResNet of depth 50, 90 classes" in printed
        assert "model.pixel_stats.order = rgb model.pixel_stats.mean = 123.675,116.28,103.53" in printed
        assert "model.backbone.style = pytorch" in printed
        assert "model.conventions.roi_align_aligned = False" in printed
        assert "box_head: 8 tensors, 14,357,955 elements, float32" in printed
    assert "a torchvision detector, sha256" in original
    assert "model.box.score_threshold = 0.05" in original
    assert "model.box.score_threshold = 0.25" in converted
    assert boxwright.load(out).detector.box_head.config.score_threshold == 0.25


def test_settings_that_the_file_does_not_contain_can_be_set(checkpoint: Path, tmp_path: Path) -> None:
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


def test_a_wrong_hash_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    assert "The file is damaged or another file" in run("convert", checkpoint, "--out", out, "--sha256", "ab", status=1)
    assert not out.exists()


def test_unknown_missing_and_mismatched_tensors_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def error(change: dict[str, torch.Tensor | None]) -> str:
        path = changed(checkpoint, tmp_path / "x.pth", change)
        printed = run("convert", path, "--out", tmp_path / "ours.safetensors", status=1)
        assert not (tmp_path / "ours.safetensors").exists()
        return printed

    assert "1 unknown tensor, so the model would be incomplete: roi_heads.mask_iou.weight" in error(
        {"roi_heads.mask_iou.weight": torch.ones(1)}
    )
    assert "1 missing tensor: box_head.fc2.bias" in error({"roi_heads.box_head.fc7.bias": None})
    assert "rpn.deltas.bias: [60] in the file, [12] in the model" in error({"rpn.head.bbox_pred.bias": torch.ones(60)})
    assert "1 unexpected tensor: rpn.conv.scale" in error({"rpn.head.conv.0.0.scale": torch.ones(1)})
    body = {f"backbone.body.layer3.5.{name}": None for name in ("conv1.weight", "conv2.weight")}
    assert "supported are ResNets of depth 18, 34, 50, 101" in error(body)


def test_unknown_files_sources_and_class_names_are_errors(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "x.pth")
    assert "unknown source; supported are torchvision" in run("inspect", tmp_path / "x.pth", status=1)
    assert "--source: expected one of torchvision, resnet" in run("inspect", checkpoint, "--source", "tv", status=1)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    printed = run("inspect", checkpoint, "--categories", tmp_path / "names.txt", status=1)
    assert "the model has 90 classes, got 2 names: cat, dog" in printed


def test_unknown_class_names_need_categories(checkpoint: Path, tmp_path: Path) -> None:
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
    assert "the names of its 2 classes are unknown: use --categories FILE" in printed
    assert "2 classes: class 1, class 2" in run("inspect", path), "inspect does not need the names"
    (tmp_path / "coco.json").write_text('{"categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]}')
    assert "2 classes: cat, dog" in run("inspect", path, "--categories", tmp_path / "coco.json")
    (tmp_path / "coco.json").write_text('{"categories": [{"name": "dog"}]}')
    printed = run("inspect", path, "--categories", tmp_path / "coco.json", status=1)
    assert "expected a list of categories, each with an id and a name" in printed


def test_diff_compares_by_boxwright_names(checkpoint: Path, tmp_path: Path) -> None:
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
    assert "shape: rpn.objectness.bias [15] in A, [3] in B" in printed
    assert "value: rpn.deltas.bias maximum difference 0.5" in printed
    assert "292 tensors equal, 3 different" in printed

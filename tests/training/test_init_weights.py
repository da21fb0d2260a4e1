from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from boxwright.data.dataset import Category
from boxwright.detectors.class_rows import class_rows
from boxwright.training.init_weights import load_init
from boxwright.weights.ours import save_weights
from factory import small_detector


def named(*names: str) -> list[Category]:
    return [Category(id=10 * label + 1, name=name) for label, name in enumerate(names)]


OLD = named("cat", "dog", "bird", "fish")
NEW = named("whale", "bird", "cat")
BY_NAME = [(1, 2), (2, 0)]
"""Labels of the shared classes: (in NEW, in OLD)."""


def module(kind: str, categories: Sequence[Category], seed: int) -> nn.Module:
    """A detector whose parameters and buffers are random numbers of `seed`."""
    detector = cast(nn.Module, small_detector(kind, len(categories)))
    generator = torch.Generator().manual_seed(seed)
    for tensor in detector.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return detector


def write(path: Path, kind: str, categories: Sequence[Category], metadata_categories: Any = None) -> dict[str, Tensor]:
    """Write weights of a detector of `categories`; `metadata_categories` replaces the categories in the metadata."""
    tensors = module(kind, categories, 1).state_dict()
    if metadata_categories is None:
        metadata_categories = [{"id": category.id, "name": category.name} for category in categories]
    save_weights(path, tensors, {"categories": metadata_categories})
    return tensors


def copies(detector: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_rows_of_shared_classes_are_matched_by_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_tensors = write(tmp_path / "w.safetensors", kind, OLD)
    detector = module(kind, NEW, 2)
    before = copies(detector)
    load_init(detector, tmp_path / "w.safetensors", NEW, match_classes=True)
    after = detector.state_dict()
    # (Background rows after the classes, rows per class), written out independently of `class_rows`.
    layouts = {"class_logits": (1, 1), "box_deltas": (0, 4), "mask_logits": (0, 1)}
    num_checked = 0
    for name, tensor in after.items():
        layer = name.split(".")[-2]
        if name.startswith(("box_head", "mask_head")) and layer in layouts and tensor.shape != file_tensors[name].shape:
            background, values = layouts[layer]
            for new, old in [*BY_NAME, *([(len(NEW), len(OLD))] if background else [])]:
                actual, expected = (
                    tensor[new * values : (new + 1) * values],
                    file_tensors[name][old * values : (old + 1) * values],
                )
                assert torch.equal(actual, expected), name
            assert torch.equal(tensor[:values], before[name][:values]), (
                f"{name}: rows of the new class must keep their initial values"
            )
            num_checked += 1
        elif name.startswith("head.class_logits"):
            anchors = len(tensor) // len(NEW)
            for anchor in range(anchors):
                for new, old in BY_NAME:
                    assert torch.equal(tensor[anchor * len(NEW) + new], file_tensors[name][anchor * len(OLD) + old])
                assert torch.equal(tensor[anchor * len(NEW)], before[name][anchor * len(NEW)])
            num_checked += 1
        else:
            assert torch.equal(tensor, file_tensors[name]), name
    # Weight and bias of logits, boxes and masks; a cascade's three stages have class-agnostic boxes here.
    assert num_checked == {"faster_rcnn": 4, "mask_rcnn": 6, "cascade_mask_rcnn": 12, "retinanet": 2}[kind]
    log = capsys.readouterr().out
    assert "rows loaded by class name: bird, cat | re-initialised: whale" in log
    assert "warning" not in log


def test_reordered_classes_are_matched_by_name_only_with_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_tensors = write(tmp_path / "w.safetensors", "retinanet", OLD)
    reordered = OLD[::-1]
    detector = module("retinanet", reordered, 2)
    load_init(detector, tmp_path / "w.safetensors", reordered, match_classes=True)
    anchors = file_tensors["head.class_logits.bias"].view(-1, len(OLD))
    assert torch.equal(detector.state_dict()["head.class_logits.bias"].view(-1, len(OLD)), anchors.flip(1))
    assert "re-initialised" not in capsys.readouterr().out
    # Without the flag, rows are matched by position, with a warning unless the classes are the same.
    load_init(detector, tmp_path / "w.safetensors", reordered)
    assert torch.equal(detector.state_dict()["head.class_logits.bias"], file_tensors["head.class_logits.bias"])
    assert "warning: class-specific rows were matched by position" in capsys.readouterr().out
    load_init(detector, tmp_path / "w.safetensors", OLD)
    assert "warning" not in capsys.readouterr().out


def test_a_larger_set_of_classes_scores_the_known_ones_as_before(tmp_path: Path) -> None:
    """In RetinaNet the scores of a class depend only on the rows of that class."""
    write(tmp_path / "w.safetensors", "retinanet", OLD)
    wider = named("whale", *[category.name for category in OLD[::-1]], "ant")
    old, new = (module("retinanet", classes, 1) for classes in (OLD, wider))
    load_init(new, tmp_path / "w.safetensors", wider, match_classes=True)
    levels = range(len(cast(nn.Module, old.backbone).strides))
    features = [torch.randn(1, 32, 16 // 2**level, 16 // 2**level) for level in levels]
    with torch.inference_mode():
        before = cast(nn.Module, old.head)(features, (64, 64)).logits
        after = cast(nn.Module, new.head)(features, (64, 64)).logits
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(second[..., 1:5].flip(-1), first)


def test_without_the_flag_mismatched_tensors_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_tensors = write(tmp_path / "w.safetensors", "mask_rcnn", OLD)
    detector = module("mask_rcnn", NEW, 2)
    before = copies(detector)
    load_init(detector, tmp_path / "w.safetensors", NEW)
    initial = {
        name
        for name, tensor in detector.state_dict().items()
        if not torch.equal(tensor, file_tensors[name][: len(tensor)])
    }
    assert initial == class_rows(detector).keys()
    assert all(torch.equal(detector.state_dict()[name], before[name]) for name in initial)
    log = capsys.readouterr().out
    assert f"loaded {len(file_tensors) - 6} of the model's {len(file_tensors)} tensors" in log
    assert "6 tensors re-initialised (shape mismatch)" in log
    assert "box_head.class_logits.bias [5] in the file, [4] in the model" in log
    save_weights(tmp_path / "w.safetensors", {"rpn.conv.bias": file_tensors["rpn.conv.bias"]}, {})
    load_init(detector, tmp_path / "w.safetensors", NEW)
    assert f"{len(file_tensors) - 1} tensors re-initialised (not in the file): backbone." in capsys.readouterr().out


def test_class_agnostic_boxes_are_loaded_for_other_classes(tmp_path: Path) -> None:
    file_tensors = write(tmp_path / "w.safetensors", "ohem_rcnn", OLD)
    detector = module("ohem_rcnn", NEW, 2)
    load_init(detector, tmp_path / "w.safetensors", NEW, match_classes=True)
    assert torch.equal(detector.state_dict()["box_head.box_deltas.weight"], file_tensors["box_head.box_deltas.weight"])


def test_weights_that_cannot_be_matched_by_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    def start(kind: str, categories: Sequence[Category] = NEW) -> None:
        load_init(module(kind, categories, 2), path, categories, match_classes=True)

    write(path, "retinanet", OLD)
    with pytest.raises(
        ValueError, match=r"w\.safetensors: no class is shared .*bird, cat, dog, fish\. Data set: ant, bee\."
    ):
        start("retinanet", named("bee", "ant"))
    with pytest.raises(ValueError, match="rows cannot be matched by class name"):
        start("faster_rcnn")
    write(path, "retinanet", OLD, metadata_categories=[])
    with pytest.raises(ValueError, match="does not name its classes"):
        start("retinanet")
    write(path, "retinanet", OLD, metadata_categories=[{"id": "x"}])
    with pytest.raises(ValueError, match=r"w\.safetensors: its categories cannot be read"):
        start("retinanet")
    write(path, "retinanet", OLD, metadata_categories=[{"id": 1, "name": "cat"}, *[{"id": 3, "name": "x"}] * 10])
    with pytest.raises(ValueError, match="no layer with rows for the 11 classes"):
        start("retinanet")
    save_weights(path, {"other": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="no tensor matches the model in name and shape"):
        load_init(module("retinanet", NEW, 2), path, NEW)

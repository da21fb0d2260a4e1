"""Imported Detectron2 cascades and models with norms in pyramid and heads reproduce Detectron2's detections."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import boxwright
from boxwright.importers.convert import Imported, convert
from boxwright.importers.detectron2 import MSRA
from boxwright.training.experiment import arguments_of, call_name
from boxwright.weights.foreign import read_foreign
from importers.reference import ImageDetections, Reference, compare, detect, images_of


def converted(reference: Reference, folder: Path, without: str | None = None, changes: Sequence[str] = ()) -> Imported:
    """Import a file in the model zoo's format. Tensors whose name contains `without` are left out."""
    tensors = {name: tensor for name, tensor in reference.tensors().items() if without is None or without not in name}
    (folder / "theirs.pkl").write_bytes(pickle.dumps({"model": {name: t.numpy() for name, t in tensors.items()}}))
    return convert(read_foreign(folder / "theirs.pkl"), changes=changes)


def compare_all(
    imported: Imported,
    expected: Sequence[ImageDetections],
    folder: Path,
    data: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    imported.save(folder / "ours.safetensors")
    detector = boxwright.load(folder / "ours.safetensors").detector.to(dtype)
    for pixels, reference in zip(images_of(data), expected, strict=True):
        assert reference.count > 50, "too few detections for a meaningful comparison"
        differences = compare(detect(detector, pixels), reference)
        assert differences.boxes < 1e-2
        assert differences.scores < 1e-4
        assert differences.masks < 1e-3


def settings_of(imported: Imported) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the model and of its backbone."""
    assert imported.experiment is not None
    model = arguments_of(imported.experiment.model)
    return model, arguments_of(model["backbone"])


def test_cascade_mask_rcnn_has_one_mask_head_and_averages_probabilities(data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    imported = converted(reference, tmp_path)
    assert not imported.unused
    assert {name.split(".")[1] for name in imported.tensors if name.startswith("mask_heads.")} == {"0"}
    compare_all(imported, reference.detections, tmp_path, data_dir)
    of_logits = converted(reference, tmp_path, changes=["model.cascade.mean_of=logits"])
    with pytest.raises(AssertionError, match="no match for detection"):
        compare_all(of_logits, reference.detections, tmp_path, data_dir)


def test_cascade_rcnn_equals_cascade_mask_rcnn_without_masks(data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    imported = converted(reference, tmp_path, without="mask_head")
    assert call_name(imported.experiment.model).endswith(".cascade_rcnn")
    compare_all(imported, [replace(item, masks=None) for item in reference.detections], tmp_path, data_dir)


def test_group_norm_everywhere(data_dir: Path, tmp_path: Path) -> None:
    """The ResNets have their stride in the 3x3 convolution, yet pixels are not divided by a standard deviation."""
    reference = Reference.load("detectron2_mask_rcnn_gn")
    imported = converted(reference, tmp_path)
    assert not imported.unused
    model, backbone = settings_of(imported)
    assert (model["pixel_stats"], backbone["style"]) == (MSRA, "pytorch")
    assert (backbone["norm"], backbone["fpn_norm"], model["box"].norm, model["mask"].norm) == ("gn",) * 4
    assert (model["box"].num_convs, model["box"].num_fcs) == (4, 1)
    compare_all(imported, reference.detections, tmp_path, data_dir)


def test_batch_norm_everywhere_and_an_rpn_of_two_convolutions(data_dir: Path, tmp_path: Path) -> None:
    """Backbone norms keep updating their statistics. Head norms are frozen, because RoI slots may be empty."""
    reference = Reference.load("detectron2_mask_rcnn_syncbn")
    imported = converted(reference, tmp_path)
    assert all(name.endswith("num_batches_tracked") for name in imported.unused)
    model, backbone = settings_of(imported)
    assert (backbone["style"], backbone["norm"], backbone["fpn_norm"]) == ("caffe", "bn", "bn")
    assert (model["rpn"].num_convs, model["box"].norm, model["mask"].norm) == (2, "frozen_bn", "frozen_bn")
    compare_all(imported, reference.detections, tmp_path, data_dir, torch.float64)


def test_a_missing_layer_of_a_box_head_is_reported(tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    with pytest.raises(ValueError, match=r"6 missing tensors: box_heads\.0\.fc2\.bias"):
        converted(reference, tmp_path, without=".fc2.")


def test_files_without_num_batches_tracked_are_complete(tmp_path: Path) -> None:
    reference = Reference.load("detectron2_mask_rcnn_syncbn")
    imported = converted(reference, tmp_path, without="num_batches_tracked")
    assert not imported.unused
    assert torch.equal(imported.tensors["backbone.output.3.1.num_batches_tracked"], torch.tensor(0))

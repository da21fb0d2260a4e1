"""Detectron2's cascades, and its models with norms in pyramid and heads, give its own models' detections."""

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
from importers.reference import Found, Reference, compare, detect, images_of


def converted(reference: Reference, folder: Path, without: str | None = None, changes: Sequence[str] = ()) -> Imported:
    """From a file as those of the model zoo are, maybe without the tensors of a part."""
    tensors = {name: tensor for name, tensor in reference.tensors().items() if without is None or without not in name}
    (folder / "theirs.pkl").write_bytes(pickle.dumps({"model": {name: t.numpy() for name, t in tensors.items()}}))
    return convert(read_foreign(folder / "theirs.pkl"), changes=changes)


def compare_all(
    imported: Imported, expected: Sequence[Found], folder: Path, data: Path, dtype: torch.dtype = torch.float32
) -> None:
    imported.save(folder / "ours.safetensors")
    detector = boxwright.load(folder / "ours.safetensors").detector.to(dtype)
    for pixels, found in zip(images_of(data), expected, strict=True):
        assert found.count > 50, "a check of few detections proves little"
        different = compare(detect(detector, pixels), found)
        assert different.boxes < 1e-2
        assert different.scores < 1e-4
        assert different.masks < 1e-3


def settings_of(imported: Imported) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the model, and of its backbone."""
    assert imported.experiment is not None
    model = arguments_of(imported.experiment.model)
    return model, arguments_of(model["backbone"])


def test_cascade_mask_rcnn_has_one_mask_head_and_averages_probabilities(data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    given = converted(reference, tmp_path)
    assert not given.unused
    assert {name.split(".")[1] for name in given.tensors if name.startswith("mask_heads.")} == {"0"}
    compare_all(given, reference.found, tmp_path, data_dir)
    of_logits = converted(reference, tmp_path, changes=["model.cascade.mean_of=logits"])
    with pytest.raises(AssertionError, match="is not among ours"):
        compare_all(of_logits, reference.found, tmp_path, data_dir)


def test_cascade_rcnn_is_the_same_without_masks(data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    given = converted(reference, tmp_path, without="mask_head")
    assert call_name(given.experiment.model).endswith(".cascade_rcnn")
    compare_all(given, [replace(found, masks=None) for found in reference.found], tmp_path, data_dir)


def test_group_norm_everywhere(data_dir: Path, tmp_path: Path) -> None:
    """Its ResNets have the stride in the 3x3 convolution, and pixels without deviation all the same."""
    reference = Reference.load("detectron2_mask_rcnn_gn")
    given = converted(reference, tmp_path)
    assert not given.unused
    model, backbone = settings_of(given)
    assert (model["pixel_stats"], backbone["style"]) == (MSRA, "pytorch")
    assert (backbone["norm"], backbone["fpn_norm"], model["box"].norm, model["mask"].norm) == ("gn",) * 4
    assert (model["box"].num_convs, model["box"].num_fcs) == (4, 1)
    compare_all(given, reference.found, tmp_path, data_dir)


def test_batch_norm_everywhere_and_an_rpn_of_two_convolutions(data_dir: Path, tmp_path: Path) -> None:
    """Norms of backbones go on learning their statistics; those of heads, which may have empty slots, do not."""
    reference = Reference.load("detectron2_mask_rcnn_syncbn")
    given = converted(reference, tmp_path)
    assert all(name.endswith("num_batches_tracked") for name in given.unused)
    model, backbone = settings_of(given)
    assert (backbone["style"], backbone["norm"], backbone["fpn_norm"]) == ("caffe", "bn", "bn")
    assert (model["rpn"].num_convs, model["box"].norm, model["mask"].norm) == (2, "frozen_bn", "frozen_bn")
    compare_all(given, reference.found, tmp_path, data_dir, torch.float64)


def test_a_box_head_that_lacks_a_layer_is_no_other_head(tmp_path: Path) -> None:
    reference = Reference.load("detectron2_cascade_mask_rcnn")
    with pytest.raises(ValueError, match=r"6 missing tensors: box_heads\.0\.fc2\.bias"):
        converted(reference, tmp_path, without=".fc2.")


def test_files_without_counts_of_batches_have_all_that_a_model_wants(tmp_path: Path) -> None:
    reference = Reference.load("detectron2_mask_rcnn_syncbn")
    given = converted(reference, tmp_path, without="num_batches_tracked")
    assert not given.unused
    assert torch.equal(given.tensors["backbone.output.3.1.num_batches_tracked"], torch.tensor(0))

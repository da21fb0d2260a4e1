"""Checkpoints in Detectron2's layout give the detections of Detectron2's own models, on real pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import boxwright
from boxwright.importers.convert import convert
from boxwright.weights.foreign import read_foreign
from importers.reference import Reference, compare, detect, pictures, proposals

MODELS = [
    "proposal_network",
    "fast_rcnn",
    "faster_rcnn",
    "faster_rcnn_resnext",
    "mask_rcnn",
    "retinanet",
]


@pytest.mark.parametrize("name", MODELS)
def test_detections_are_detectron2s(name: str, data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load(f"detectron2_{name}")
    # As the model zoo's files are.
    page = {"model": {key: tensor.numpy() for key, tensor in reference.tensors().items()}}
    (tmp_path / "theirs.pkl").write_bytes(pickle.dumps(page))
    convert(read_foreign(tmp_path / "theirs.pkl")).save(tmp_path / "ours.safetensors")
    detector = boxwright.load(tmp_path / "ours.safetensors").detector
    for picture, wanted in zip(pictures(data_dir), reference.found, strict=True):
        assert wanted.count > 50, "a check of few detections proves little"
        given = detect(detector, picture, proposals(picture) if name == "fast_rcnn" else None)
        different = compare(given, wanted)
        print(different)
        assert different.boxes < 1e-2
        assert different.scores < 1e-4
        assert different.masks < 1e-3

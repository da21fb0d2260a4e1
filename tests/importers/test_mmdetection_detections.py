"""Checkpoints in mmdetection's layouts give the detections of mmdetection's own models, on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import boxwright
from boxwright.importers.convert import convert
from boxwright.weights.foreign import read_foreign
from importers.reference import FIXTURES, Reference, compare, detect, images_of, proposals

NAMES = sorted(file.name.removesuffix(".json.gz") for file in FIXTURES.glob("mmdetection*.json.gz"))


@pytest.mark.parametrize("name", NAMES)
def test_detections_are_the_peers(name: str, data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load(name)
    torch.save({"meta": reference.about["meta"], "state_dict": reference.tensors()}, tmp_path / "theirs.pth")
    imported = convert(read_foreign(tmp_path / "theirs.pth"))
    assert imported.source.name == ("mmdetection1" if name[len("mmdetection")] in "01" else "mmdetection2")
    imported.save(tmp_path / "ours.safetensors")
    detector = boxwright.load(tmp_path / "ours.safetensors").detector
    assert sum(expected.count for expected in reference.found) > 100, "a check of few detections proves little"
    for pixels, expected in zip(images_of(data_dir), reference.found, strict=True):
        given = detect(detector, pixels, proposals(pixels) if "fast_rcnn" in name else None)
        different = compare(given, expected)
        assert different.boxes < 1e-2
        assert different.scores < 1e-4
        assert different.masks < 1e-3

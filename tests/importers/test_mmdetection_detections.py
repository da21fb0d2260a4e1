"""Imported mmdetection checkpoints reproduce the detections of mmdetection's own models, on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import boxwright
from boxwright.importers.convert import convert
from boxwright.weights.foreign import read_foreign
from importers.reference import FIXTURES, Reference, compare, detect, images_of, proposals_for

NAMES = sorted(file.name.removesuffix(".json.gz") for file in FIXTURES.glob("mmdetection*.json.gz"))


@pytest.mark.parametrize("name", NAMES)
def test_detections_equal_the_peers(name: str, data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load(name)
    torch.save({"meta": reference.about["meta"], "state_dict": reference.tensors()}, tmp_path / "theirs.pth")
    imported = convert(read_foreign(tmp_path / "theirs.pth"))
    assert imported.source.name == ("mmdetection1" if name[len("mmdetection")] in "01" else "mmdetection2")
    imported.save(tmp_path / "ours.safetensors")
    detector = boxwright.load(tmp_path / "ours.safetensors").detector
    assert sum(expected.count for expected in reference.detections) > 100, (
        "too few detections for a meaningful comparison"
    )
    for pixels, expected in zip(images_of(data_dir), reference.detections, strict=True):
        actual = detect(detector, pixels, proposals_for(pixels) if "fast_rcnn" in name else None)
        differences = compare(actual, expected)
        assert differences.boxes < 1e-2
        assert differences.scores < 1e-4
        assert differences.masks < 1e-3

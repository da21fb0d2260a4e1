"""Imported checkpoints reproduce the detections of the code bases they come from, on real images."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import boxwright
from boxwright.data.buckets import Resize
from boxwright.importers.convert import convert
from boxwright.weights.foreign import read_foreign
from importers.reference import Reference, compare, detect, images_of, proposals_for


def write_arrays(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file in the format of Detectron2's model zoo."""
    content = {
        "model": {name: tensor.numpy() for name, tensor in tensors.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    file.write_bytes(pickle.dumps(content))


def write_checkpoint(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a checkpoint as maskrcnn-benchmark saves it when training on several GPUs."""
    torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "iteration": 90000}, file)


def write_blobs(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file like Detectron's, with the configuration as text."""
    blobs = {name: tensor.numpy() for name, tensor in tensors.items()}
    file.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL:\n  BBOX_REG_WEIGHTS: [10.0, 10.0, 5.0, 5.0]"}, 2))


Writer = Callable[[Mapping[str, Tensor], Path], None]
SOURCES: dict[str, tuple[Writer, list[str]]] = {
    "detectron2": (
        write_arrays,
        ["proposal_network", "fast_rcnn", "faster_rcnn", "faster_rcnn_resnext", "mask_rcnn", "retinanet"],
    ),
    "maskrcnn_benchmark": (
        write_checkpoint,
        ["proposal_network", "faster_rcnn", "faster_rcnn_resnext", "mask_rcnn", "retinanet", "retinanet_p5"],
    ),
    "detectron": (
        write_blobs,
        ["proposal_network", "fast_rcnn", "faster_rcnn", "faster_rcnn_resnext", "mask_rcnn", "retinanet"],
    ),
}


@pytest.mark.parametrize(("source", "model"), [(source, model) for source in SOURCES for model in SOURCES[source][1]])
def test_detections_equal_the_peers(source: str, model: str, data_dir: Path, tmp_path: Path) -> None:
    reference = Reference.load(f"{source}_{model}")
    SOURCES[source][0](reference.tensors(), tmp_path / "theirs")
    imported = convert(read_foreign(tmp_path / "theirs"))
    assert imported.source.name == source
    imported.save(tmp_path / "ours.safetensors")
    detector = boxwright.load(tmp_path / "ours.safetensors").detector
    for pixels, expected in zip(images_of(data_dir), reference.detections, strict=True):
        assert expected.count > 50, "too few detections for a meaningful comparison"
        boxes = proposals_for(pixels) if model == "fast_rcnn" else None
        # Detectron pads images for RetinaNet to its coarsest stride, and the padding affects the convolutions.
        multiple = 128 if source == "detectron" and model == "retinanet" else 32
        actual = detect(detector, pixels, boxes, multiple=multiple)
        differences = compare(actual, expected)
        assert differences.boxes < 1e-2
        assert differences.scores < 1e-4
        assert differences.masks < 1e-3


# (height, width) of an image, and its size after the resize of Detectron2, maskrcnn-benchmark and Detectron.
RESIZED = {
    (480, 640): ((800, 1067), (800, 1066), (800, 1067)),
    (640, 427): ((1199, 800), (1199, 800), (1199, 800)),
    (375, 500): ((800, 1067), (800, 1066), (800, 1067)),
    (333, 500): ((800, 1201), (800, 1201), (800, 1201)),
    (640, 360): ((1333, 750), (1333, 750), (1333, 750)),
    (213, 640): ((444, 1333), (444, 1334), (444, 1333)),
    (500, 1023): ((652, 1333), (652, 1333), (652, 1333)),
    (1333, 800): ((1333, 800), (1333, 800), (1333, 800)),
}


@pytest.mark.parametrize("size", RESIZED)
def test_resized_size_equals_detectron2s_and_is_within_a_pixel_of_the_others(size: tuple[int, int]) -> None:
    actual = Resize(800, 1333).size(*size)
    assert actual == RESIZED[size][0]
    for expected in RESIZED[size]:
        assert max(abs(actual[0] - expected[0]), abs(actual[1] - expected[1])) <= 1

"""A weights file that Boxwright 0.1.0 wrote still loads and gives the same detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

import boxwright
from fixtures.make_mask_rcnn_0_1_0 import image

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = FIXTURES / "mask_rcnn_0_1_0.safetensors"


def test_every_tensor_is_loaded_under_its_name() -> None:
    stored, loaded = load_tensors(WEIGHTS), boxwright.load(WEIGHTS).detector.state_dict()
    assert list(loaded) == list(boxwright.load(WEIGHTS).detector.train().state_dict())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_the_detections_are_those_of_0_1_0() -> None:
    """Equal to the bit where they were made (AMD EPYC, torch 2.14.1, one thread); elsewhere sums round differently."""
    expected = load_file(FIXTURES / "mask_rcnn_0_1_0_detections.safetensors")
    prediction = boxwright.load(WEIGHTS).predict(image())
    np.testing.assert_array_equal(prediction.labels, expected["labels"])
    np.testing.assert_allclose(prediction.scores, expected["scores"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(prediction.boxes, expected["boxes"], rtol=0, atol=1e-2)
    masks = np.stack([prediction.masks[index] for index in range(len(prediction))])
    stored = np.unpackbits(expected["masks"])[: masks.size].reshape(masks.shape)
    assert 0.001 < stored.mean() < 0.5
    assert (masks != stored).mean() < 1e-3

"""Losses and detections are computed on a GPU without a host synchronisation.

The tests run without a GPU. Fake tensors claim to be on one, so operators take the code path of GPUs. An operator that
needs the data raises an error, and copies between host and GPU are recorded at dispatch. The backward pass can only be
checked on a GPU; `python -m benchmarks.gpu` does that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from factory import DETECTORS, random_batch, small_detector


class Crossings(TorchDispatchMode):
    """Records the operators whose inputs and outputs are on different kinds of devices."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.operators.append(str(func))
        return result


@pytest.mark.parametrize("kind", DETECTORS)
def test_losses_and_detections_copy_nothing_between_host_and_gpu(kind: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda"):
            detector, batch = small_detector(kind), random_batch()
        with Crossings() as crossings:
            losses = detector.losses(batch)
            detections = detector.detect(batch)
    assert crossings.operators == []
    assert all(loss.device.type == "cuda" for loss in losses.values())
    assert detections.boxes.device.type == "cuda"


def test_host_synchronisations_are_detected() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        on_gpu = torch.ones(3, device="cuda")
        for crossing in (on_gpu.cpu, lambda: torch.tensor([1.0], device="cuda"), lambda: on_gpu.copy_(torch.ones(3))):
            with Crossings() as crossings:
                crossing()
            assert crossings.operators
        with pytest.raises(DataDependentOutputException):
            on_gpu[0].item()
        for dynamic in (on_gpu.nonzero, lambda: on_gpu[on_gpu > 0]):
            with pytest.raises(DynamicOutputShapeException):
                dynamic()

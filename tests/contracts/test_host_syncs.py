"""On a GPU the host waits for nothing between pixels and losses, and between pixels and detections.

There need be no GPU: tensors without data say that they lie on one, and so go a GPU's way through every operator. What
would have to look at data fails of itself; what would be copied between host and GPU is seen as it is dispatched. The
backward pass needs a GPU, and `python -m benchmarks.gpu` checks it.
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
    """Notes the operators that take from one kind of device and give on another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("kind", DETECTORS)
def test_nothing_crosses_between_host_and_gpu(kind: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda"):
            detector, batch = small_detector(kind), random_batch()
        with Crossings() as crossings:
            losses = detector.losses(batch)
            detections = detector.detect(batch)
    assert crossings.found == []
    assert all(loss.device.type == "cuda" for loss in losses.values())
    assert detections.boxes.device.type == "cuda"


def test_what_makes_the_host_wait_is_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        on_gpu = torch.ones(3, device="cuda")
        for crossing in (on_gpu.cpu, lambda: torch.tensor([1.0], device="cuda"), lambda: on_gpu.copy_(torch.ones(3))):
            with Crossings() as crossings:
                crossing()
            assert crossings.found
        with pytest.raises(DataDependentOutputException):
            on_gpu[0].item()
        for dynamic in (on_gpu.nonzero, lambda: on_gpu[on_gpu > 0]):
            with pytest.raises(DynamicOutputShapeException):
                dynamic()

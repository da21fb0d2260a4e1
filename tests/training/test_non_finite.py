from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from boxwright.training.non_finite import keep_batches, load_batches
from factory import random_batch


def assert_equal(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        elif left is None:
            assert right is None
        else:
            assert_equal(left, right)


def test_saved_batches_are_loaded_with_their_masks(tmp_path: Path) -> None:
    batches = [random_batch(), random_batch(num_objects=0)]
    assert batches[0].targets.masks is not None
    path, image_ids = keep_batches(tmp_path, 3, batches, loss_is_finite=False)
    assert image_ids == [0, 1, 0, 1]
    for loaded, batch in zip(load_batches(path), batches, strict=True):
        assert_equal(loaded, batch)

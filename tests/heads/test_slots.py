from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from boxwright.heads.slots import used_slots


@pytest.mark.parametrize(("counts", "slots"), [([0, 0], 8), ([3, 8], 8), ([9, 2], 16), ([40, 64], 64), ([70, 1], 100)])
def test_used_slots_are_rounded_up_to_one_of_a_few_sizes(counts: list[int], slots: int) -> None:
    assert used_slots(torch.arange(100) < torch.tensor(counts)[:, None]) == slots


def test_all_slots_are_used_if_there_are_fewer_than_the_minimum() -> None:
    assert used_slots(torch.zeros(2, 5, dtype=torch.bool)) == 5


def test_all_slots_are_used_for_fake_tensors_and_in_compiled_code() -> None:
    with FakeTensorMode():
        assert used_slots(torch.zeros(2, 100, dtype=torch.bool)) == 100
    compiled = torch.compile(lambda valid: valid[:, : used_slots(valid)], fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2, 100, dtype=torch.bool)).shape == (2, 100)

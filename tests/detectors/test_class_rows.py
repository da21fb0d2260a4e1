from __future__ import annotations

import pytest
import torch

from boxwright.detectors.class_rows import ClassRows, class_rows, with_shared_rows
from factory import DETECTORS, small_detector


@pytest.mark.parametrize("kind", DETECTORS)
def test_class_rows_lists_all_parameters_that_depend_on_the_number_of_classes(kind: str) -> None:
    detector = small_detector(kind, 3)
    few, many = detector.state_dict(), small_detector(kind, 5).state_dict()
    growing = {name for name in few if few[name].shape != many[name].shape}
    layouts = class_rows(detector)
    by_class = {name for name, layout in layouts.items() if layout.num_anchors(len(few[name]), 3) is not None}
    assert by_class == growing
    for name in growing:
        layout = layouts[name]
        assert layout.num_anchors(len(few[name]), 3) == layout.num_anchors(len(many[name]), 5)


def test_with_shared_rows_copies_the_rows_of_shared_classes() -> None:
    """The three classes of the model are class 2, no class and class 0 of the given weights, in three layouts."""
    shared = [2, None, 0]
    logits = with_shared_rows(-torch.ones(4), torch.arange(5.0), ClassRows(background=1), shared=shared, num_given=4)
    assert logits is not None
    assert logits.tolist() == [2, -1, 0, 4]
    boxes = with_shared_rows(
        -torch.ones(12, 1), torch.arange(16.0)[:, None], ClassRows(values=4), shared=shared, num_given=4
    )
    assert boxes is not None
    assert boxes.flatten().tolist() == [8, 9, 10, 11, -1, -1, -1, -1, 0, 1, 2, 3]
    anchors = with_shared_rows(-torch.ones(6), torch.arange(8.0), ClassRows(), shared=shared, num_given=4)
    assert anchors is not None
    assert anchors.tolist() == [2, -1, 0, 6, -1, 4]


def test_other_shape_differences_copy_nothing() -> None:
    weight = torch.zeros(6, 5)
    for other in (torch.ones(8, 4), torch.ones(4, 5), torch.ones(9, 5)):
        assert with_shared_rows(weight, other, ClassRows(), shared=[0, 1, None], num_given=4) is None
    assert not weight.any()

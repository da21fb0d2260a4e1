from __future__ import annotations

import pytest
import torch

from boxwright.detectors.class_rows import ClassRows, class_rows, with_shared_rows
from factory import DETECTORS, small_detector


@pytest.mark.parametrize("kind", DETECTORS)
def test_heads_declare_exactly_the_parameters_that_grow_with_the_classes(kind: str) -> None:
    detector = small_detector(kind, 3)
    few, many = detector.state_dict(), small_detector(kind, 5).state_dict()
    growing = {name for name in few if few[name].shape != many[name].shape}
    layouts = class_rows(detector)
    by_class = {name for name, layout in layouts.items() if layout.num_anchors(len(few[name]), 3) is not None}
    assert by_class == growing
    for name in growing:
        layout = layouts[name]
        assert layout.num_anchors(len(few[name]), 3) == layout.num_anchors(len(many[name]), 5)


def test_rows_of_each_layout() -> None:
    """Three classes of the model are class 2, none and class 0 of two anchors', boxes' and backgrounds' weights."""
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


def test_what_differs_in_more_than_classes_is_left() -> None:
    own = torch.zeros(6, 5)
    for given in (torch.ones(8, 4), torch.ones(4, 5), torch.ones(9, 5)):
        assert with_shared_rows(own, given, ClassRows(), shared=[0, 1, None], num_given=4) is None
    assert not own.any()

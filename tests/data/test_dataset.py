"""`DatasetInfo` uses the attributes of a data set, or computes facts from its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boxwright.data.concat import ConcatDataset
from boxwright.data.dataset import Category, Dataset, DatasetInfo, Sample


class Bare:
    """Three images with 2, 0 and 1 objects, with only the required members of `Dataset`."""

    categories = (Category(1, "ant"),)

    def __init__(self, *, masks: bool = False) -> None:
        self.masks = masks
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, position: int, /) -> Sample:
        self.reads.append(position)
        count = (2, 0, 1)[position]
        return Sample(
            image=np.zeros((20 + position, 30, 3), np.uint8),
            image_id=100 - position,
            file_name=f"{position}.png",
            boxes=np.tile(np.array([[1, 2, 9, 8]], np.float32), (count, 1)),
            labels=np.zeros(count, np.int64),
            crowd=np.zeros(count, bool),
            object_ids=np.arange(count),
            masks=[np.zeros((20 + position, 30), bool)] * count if self.masks else None,
        )


def test_facts_are_computed_in_one_pass_over_the_samples() -> None:
    dataset = Bare()
    assert isinstance(dataset, Dataset)
    info = DatasetInfo(dataset)
    assert dataset.reads == []
    np.testing.assert_array_equal(info.image_sizes, [[20, 30], [21, 30], [22, 30]])
    np.testing.assert_array_equal(info.image_ids, [100, 99, 98])
    assert info.max_objects == 2
    assert dataset.reads == [0, 1, 2]
    assert (info.image_sizes.dtype, info.image_ids.dtype) == (np.int64, np.int64)


def test_attributes_of_the_data_set_are_used_without_reading_samples() -> None:
    dataset = Bare()
    dataset.image_sizes, dataset.image_ids, dataset.max_objects = [(1, 2)] * 3, [5, 6, 7], 9
    dataset.num_masks, dataset.num_without_mask, dataset.annotations = 4, 3, "a/b.json"
    info = DatasetInfo(dataset)
    np.testing.assert_array_equal(info.image_sizes, [[1, 2]] * 3)
    np.testing.assert_array_equal(info.image_ids, [5, 6, 7])
    assert (info.max_objects, info.num_masks, info.num_without_mask, info.has_masks) == (9, 4, 3, True)
    assert (info.annotations, info.images, info.source) == (Path("a/b.json"), None, "a/b.json")
    assert dataset.reads == []


def test_has_masks_reads_samples_up_to_the_first_mask() -> None:
    dataset = Bare(masks=True)
    assert DatasetInfo(dataset).has_masks
    assert dataset.reads == [0]
    assert not DatasetInfo(Bare()).has_masks
    assert DatasetInfo(dataset).num_masks is None


def test_num_masks_of_0_means_no_masks() -> None:
    dataset = Bare(masks=True)
    dataset.num_masks = 0
    assert not DatasetInfo(dataset).has_masks


@pytest.mark.parametrize("annotations", [None, {"images": []}, ["a.json"]])
def test_an_annotations_attribute_that_is_not_a_path_is_ignored(annotations: object) -> None:
    dataset = Bare()
    dataset.annotations = annotations
    assert (DatasetInfo(dataset).annotations, DatasetInfo(dataset).source) == (None, "Bare")


def test_the_source_of_a_concatenated_data_set_lists_its_parts() -> None:
    one, two = Bare(), Bare()
    two.annotations = Path("two.json")
    assert DatasetInfo(ConcatDataset([one, two])).source == "Bare, two.json"


def test_facts_of_an_empty_data_set() -> None:
    class Empty(Bare):
        def __len__(self) -> int:
            return 0

    info = DatasetInfo(Empty())
    assert (info.image_sizes.shape, info.image_ids.shape, info.max_objects) == ((0, 2), (0,), 0)

"""Joined data sets give each part's samples, under one class space and ids of their own."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.concat import ConcatDataset, RepeatDataset
from boxwright.data.dataset import Category, Dataset
from boxwright.data.loader import TrainingLoader
from pictures import Pictures, StatedPictures

SMALL = Augmentation(resize=Resize(64, 107))
TURNED = (Category(id=3, name="two"), Category(id=4, name="one"))


class NumberedPictures(StatedPictures):
    """Pictures that state all they can, and may not be looked at to learn it."""

    looks = 0

    @property
    def image_ids(self) -> np.ndarray:
        """The ids that samples have."""
        return 100 + np.arange(self.count)

    def __getitem__(self, index: int):
        """A sample, counted."""
        type(self).looks += 1
        return super().__getitem__(index)


def test_samples_come_part_after_part_with_the_first_ones_labels() -> None:
    one, two = Pictures(5), replace(Pictures(6), categories=TURNED)
    joined = ConcatDataset([one, two])
    assert isinstance(joined, Dataset)
    assert len(joined) == 11
    assert joined.categories == one.categories
    for position in range(11):
        sample = joined[position]
        own = one[position] if position < 5 else two[position - 5]
        np.testing.assert_array_equal(sample.image, own.image)
        np.testing.assert_array_equal(sample.boxes, own.boxes)
        np.testing.assert_array_equal(sample.crowd, own.crowd)
        assert sample.labels.dtype == np.int64
        own_categories = one.categories if position < 5 else TURNED
        names = [own_categories[label].name for label in own.labels]
        assert [joined.categories[label].name for label in sample.labels] == names
        assert sample.image_id == joined.image_ids[position]
        assert tuple(joined.image_sizes[position]) == sample.image.shape[:2]
    assert joined.max_objects == 3


def test_image_ids_stay_where_they_can_and_are_unique() -> None:
    class Others(NumberedPictures):
        @property
        def image_ids(self) -> np.ndarray:
            return 7 + np.arange(self.count)

    joined = ConcatDataset([NumberedPictures(3), Others(2), NumberedPictures(3), NumberedPictures(2)])
    assert joined.image_ids.tolist() == [100, 101, 102, 7, 8, 103, 104, 105, 106, 107]


def test_what_parts_state_is_not_looked_up_again() -> None:
    NumberedPictures.looks = 0
    joined = RepeatDataset(ConcatDataset([NumberedPictures(4), NumberedPictures(5)]), 2)
    TrainingLoader(joined, augmentation=SMALL, batch_size=2, seed=0, num_workers=0)
    assert NumberedPictures.looks == 0
    assert joined.max_objects == 3


def test_other_categories_are_an_error_that_lists_both() -> None:
    dust = replace(Pictures(2), categories=(Category(id=1, name="one"), Category(id=2, name="dust")))
    told = r"Only in data set 2 \(2 categories\): dust. Only in data set 1 \(2 categories\): two. Rename"
    with pytest.raises(ValueError, match=told):
        ConcatDataset([Pictures(3), dust])
    with pytest.raises(ValueError, match="data sets to concatenate: expected at least one"):
        ConcatDataset([])


def test_repeating_gives_every_sample_as_often_and_changes_it_anew() -> None:
    repeated = RepeatDataset(Pictures(4), 3)
    assert len(repeated) == 12
    assert repeated.image_ids.tolist() == [100, 101, 102, 103] * 3
    assert repeated.image_sizes.shape == (12, 2)
    for position in range(12):
        np.testing.assert_array_equal(repeated[position].image, Pictures(4)[position % 4].image)
    loader = TrainingLoader(repeated, augmentation=SMALL, batch_size=2, seed=0, num_workers=0)
    batches = list(islice(loader.batches(), loader.steps_per_epoch))
    pairs = {
        (int(image_id), int(seed))
        for batch in batches
        for image_id, seed in zip(batch.image_ids, batch.seeds, strict=True)
    }
    assert len(pairs) == 12
    with pytest.raises(ValueError, match="times=0"):
        RepeatDataset(Pictures(4), 0)


def test_both_can_be_pickled() -> None:
    joined = pickle.loads(pickle.dumps(RepeatDataset(ConcatDataset([Pictures(2), Pictures(3)]), 2)))
    assert joined[7].image_id == joined.image_ids[7]


class Outlined(Pictures):
    """One that says how many of its objects have a mask."""

    num_masks, num_without_mask = 3, 2


class BoxesAlone(Pictures):
    """One that has none."""

    annotations, num_masks, num_without_mask = "boxes_alone.json", 0, 4


def test_masks_are_counted_over_the_parts() -> None:
    joined = ConcatDataset([Outlined(4), BoxesAlone(4)])
    assert (joined.num_masks, joined.num_without_mask) == (3, 6)
    assert (RepeatDataset(joined, 3).num_masks, RepeatDataset(joined, 3).num_without_mask) == (3, 6)
    unstated = ConcatDataset([Outlined(4), Pictures(4)])
    assert (unstated.num_masks, unstated.num_without_mask) == (None, 2)
    settings = {"augmentation": SMALL, "batch_size": 2, "seed": 0, "num_workers": 0, "masks": True}
    TrainingLoader(joined, **settings)
    with pytest.raises(ValueError, match=r"^boxes_alone.json, boxes_alone.json: no object has a mask"):
        TrainingLoader(ConcatDataset([BoxesAlone(2), BoxesAlone(3)]), **settings)


def test_samples_keep_their_masks() -> None:
    joined, part = ConcatDataset([Pictures(4), Pictures(4)]), Pictures(4)
    assert len(joined[7].masks) == 3
    for mask, wanted in zip(joined[7].masks, part[3].masks, strict=True):
        np.testing.assert_array_equal(mask, wanted)

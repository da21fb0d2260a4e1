"""`ConcatDataset` has the samples of all parts, with common labels and unique image ids."""

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
from generated_images import GeneratedImages, GeneratedImagesWithInfo

SMALL = Augmentation(resize=Resize(64, 107))
REVERSED = (Category(id=3, name="two"), Category(id=4, name="one"))


class CountedReads(GeneratedImagesWithInfo):
    """A data set with all attributes of `DatasetInfo`, which counts how many samples are read."""

    reads = 0

    @property
    def image_ids(self) -> np.ndarray:
        """[N] image ids."""
        return 100 + np.arange(self.count)

    def __getitem__(self, index: int):
        """Count the read, and return the sample."""
        type(self).reads += 1
        return super().__getitem__(index)


def test_samples_of_all_parts_have_the_labels_of_the_first_part() -> None:
    one, two = GeneratedImages(5), replace(GeneratedImages(6), categories=REVERSED)
    concatenated = ConcatDataset([one, two])
    assert isinstance(concatenated, Dataset)
    assert len(concatenated) == 11
    assert concatenated.categories == one.categories
    for position in range(11):
        sample = concatenated[position]
        original = one[position] if position < 5 else two[position - 5]
        np.testing.assert_array_equal(sample.image, original.image)
        np.testing.assert_array_equal(sample.boxes, original.boxes)
        np.testing.assert_array_equal(sample.crowd, original.crowd)
        assert sample.labels.dtype == np.int64
        original_categories = one.categories if position < 5 else REVERSED
        names = [original_categories[label].name for label in original.labels]
        assert [concatenated.categories[label].name for label in sample.labels] == names
        assert sample.image_id == concatenated.image_ids[position]
        assert tuple(concatenated.image_sizes[position]) == sample.image.shape[:2]
    assert concatenated.max_objects == 3


def test_image_ids_are_unique_and_change_only_if_necessary() -> None:
    class OtherIds(CountedReads):
        @property
        def image_ids(self) -> np.ndarray:
            return 7 + np.arange(self.count)

    concatenated = ConcatDataset([CountedReads(3), OtherIds(2), CountedReads(3), CountedReads(2)])
    assert concatenated.image_ids.tolist() == [100, 101, 102, 7, 8, 103, 104, 105, 106, 107]


def test_attributes_of_the_parts_are_used_without_reading_samples() -> None:
    CountedReads.reads = 0
    concatenated = RepeatDataset(ConcatDataset([CountedReads(4), CountedReads(5)]), 2)
    TrainingLoader(concatenated, augmentation=SMALL, batch_size=2, seed=0, num_workers=0)
    assert CountedReads.reads == 0
    assert concatenated.max_objects == 3


def test_different_categories_are_an_error_that_lists_the_differences() -> None:
    dust = replace(GeneratedImages(2), categories=(Category(id=1, name="one"), Category(id=2, name="dust")))
    message = r"Only in data set 2 \(2 categories\): dust. Only in data set 1 \(2 categories\): two. Rename"
    with pytest.raises(ValueError, match=message):
        ConcatDataset([GeneratedImages(3), dust])
    with pytest.raises(ValueError, match="data sets to concatenate: expected at least one"):
        ConcatDataset([])


def test_repetitions_of_a_sample_are_augmented_differently() -> None:
    repeated = RepeatDataset(GeneratedImages(4), 3)
    assert len(repeated) == 12
    assert repeated.image_ids.tolist() == [100, 101, 102, 103] * 3
    assert repeated.image_sizes.shape == (12, 2)
    for position in range(12):
        np.testing.assert_array_equal(repeated[position].image, GeneratedImages(4)[position % 4].image)
    loader = TrainingLoader(repeated, augmentation=SMALL, batch_size=2, seed=0, num_workers=0)
    batches = list(islice(loader.batches(), loader.steps_per_epoch))
    pairs = {
        (int(image_id), int(seed))
        for batch in batches
        for image_id, seed in zip(batch.image_ids, batch.seeds, strict=True)
    }
    assert len(pairs) == 12
    with pytest.raises(ValueError, match="times: expected at least 1, got 0"):
        RepeatDataset(GeneratedImages(4), 0)


def test_concatenated_and_repeated_data_sets_can_be_pickled() -> None:
    concatenated = pickle.loads(pickle.dumps(RepeatDataset(ConcatDataset([GeneratedImages(2), GeneratedImages(3)]), 2)))
    assert concatenated[7].image_id == concatenated.image_ids[7]


class WithMasks(GeneratedImages):
    """States the number of objects with and without a mask."""

    num_masks, num_without_mask = 3, 2


class BoxesOnly(GeneratedImages):
    """States that no object has a mask."""

    annotations, num_masks, num_without_mask = "boxes_only.json", 0, 4


def test_masks_of_all_parts_are_counted() -> None:
    concatenated = ConcatDataset([WithMasks(4), BoxesOnly(4)])
    assert (concatenated.num_masks, concatenated.num_without_mask) == (3, 6)
    assert (RepeatDataset(concatenated, 3).num_masks, RepeatDataset(concatenated, 3).num_without_mask) == (3, 6)
    unknown = ConcatDataset([WithMasks(4), GeneratedImages(4)])
    assert (unknown.num_masks, unknown.num_without_mask) == (None, 2)
    settings = {"augmentation": SMALL, "batch_size": 2, "seed": 0, "num_workers": 0, "masks": True}
    TrainingLoader(concatenated, **settings)
    with pytest.raises(ValueError, match=r"^boxes_only.json, boxes_only.json: no object has a mask"):
        TrainingLoader(ConcatDataset([BoxesOnly(2), BoxesOnly(3)]), **settings)


def test_concatenated_samples_keep_their_masks() -> None:
    concatenated, part = ConcatDataset([GeneratedImages(4), GeneratedImages(4)]), GeneratedImages(4)
    assert len(concatenated[7].masks) == 3
    for actual, expected in zip(concatenated[7].masks, part[3].masks, strict=True):
        np.testing.assert_array_equal(actual, expected)

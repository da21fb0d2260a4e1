"""`collate` pads images and targets with zeros and fills every field of the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from boxwright.data.collate import PlacedSample, collate, slots_for
from boxwright.data.placement import place, place_image
from generated_images import GeneratedImages


@pytest.mark.parametrize(("objects", "slots"), [(0, 8), (8, 8), (9, 16), (93, 128), (400, 512)])
def test_slots_fit_the_maximum_number_of_objects(objects: int, slots: int) -> None:
    assert slots_for(objects) == slots


def test_a_batch_has_the_data_of_its_samples() -> None:
    samples = [GeneratedImages(8)[3], GeneratedImages(8)[0]]
    placed = [
        PlacedSample(samples[0], place((50, 50), (64, 64), flipped=True), seed=7),
        PlacedSample(samples[1], place((40, 60), (64, 96)), seed=(1 << 63) - 1),
    ]
    batch = collate(iter(placed), 2, (64, 96), 8)
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    first = np.zeros((64, 64, 3), np.uint8)
    place_image(samples[0].image, placed[0].placement, first)
    np.testing.assert_array_equal(batch.images[0, :, :, :64].permute(1, 2, 0), first)
    assert (batch.images[0, :, :, 64:] == 0).all()
    assert batch.image_sizes.tolist() == [[64, 64], [64, 96]]
    assert batch.original_sizes.tolist() == [[50, 50], [40, 60]]
    assert batch.image_ids.tolist() == [103, 100]
    assert batch.seeds.tolist() == [7, (1 << 63) - 1]
    np.testing.assert_array_equal(batch.transforms[0], placed[0].placement.matrix)
    targets = batch.targets
    assert targets is not None
    assert targets.valid.sum(1).tolist() == [3, 0]
    assert targets.labels[0, :3].tolist() == [0, 1, 0]
    assert targets.crowd[0].tolist() == [False, False, True] + [False] * 5
    x1, y1, x2, y2 = samples[0].boxes[0] * (64 / 50)
    np.testing.assert_allclose(targets.boxes[0, 0], [64 - x2, y1, 64 - x1, y2], rtol=1e-5)
    assert (targets.boxes[~targets.valid] == 0).all()
    assert targets.masks is None, "targets have no masks by default"


def test_masks_follow_flip_scale_and_crop() -> None:
    """A flip mirrors the grid. The frame moves like the box, but a crop does not clip it."""
    sample = GeneratedImages(4)[3]
    triangle = np.array([[10, 5], [40, 30], [10, 45]], np.float32)
    boxes = np.tile(np.array([10, 5, 40, 45], np.float32), (3, 1))
    sample = replace(sample, boxes=boxes, masks=[[triangle], None, [triangle]])
    plain, flipped, cropped = (
        collate([PlacedSample(sample, placement, 0)], 1, (128, 128), 8, masks=True).targets.masks
        for placement in (
            place((50, 50), (50, 50)),
            place((50, 50), (50, 50), flipped=True),
            place((50, 50), (100, 100), window=(30, 40, 60, 50)),
        )
    )
    for masks in (plain, flipped, cropped):
        assert masks.valid[0].tolist() == [True] + [False] * 7, (
            "no grid for the object without a mask and the crowd region"
        )
        assert (masks.bitmaps[~masks.valid] == 0).all()
        assert (masks.frames[~masks.valid] == 0).all()
    assert plain.frames[0, 0].tolist() == [10, 5, 40, 45]
    assert flipped.frames[0, 0].tolist() == [10, 5, 40, 45]
    assert cropped.frames[0, 0].tolist() == [-20, -20, 40, 60]
    assert torch.equal(flipped.bitmaps[0, 0], plain.bitmaps[0, 0].flip(1))
    assert not torch.equal(flipped.bitmaps, plain.bitmaps)
    assert torch.equal(cropped.bitmaps, plain.bitmaps)


def test_errors_of_masks_name_the_file() -> None:
    sample = GeneratedImages(4)[3]
    for masks, message in (
        (sample.masks[:2], r"^3.jpg: 2 masks for 3 boxes"),
        (
            [np.ones((4, 4), bool)] * 3,
            r"^3.jpg: mask of object 0: expected the shape \(50, 50\) of the image, got \(4, 4\)",
        ),
    ):
        placed = PlacedSample(replace(sample, masks=masks), place((50, 50), (50, 50)), 0)
        with pytest.raises(ValueError, match=message):
            collate([placed], 1, (64, 64), 8, masks=True)


def test_without_slots_there_are_no_targets() -> None:
    batch = collate([PlacedSample(GeneratedImages(1)[0], place((40, 60), (40, 60)), 0)], 1, (64, 64), None)
    assert batch.targets is None


def test_in_a_worker_images_are_allocated_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = [PlacedSample(GeneratedImages(1)[0], place((40, 60), (40, 60)), 0)]
    in_main = collate(placed, 1, (64, 64), 8)
    monkeypatch.setattr("boxwright.data.collate.get_worker_info", lambda: "a worker")
    in_worker = collate(placed, 1, (64, 64), 8)
    assert not in_main.images.is_shared()
    assert in_worker.images.is_shared()
    assert in_worker.images.stride() == in_main.images.stride()
    assert torch.equal(in_worker.images, in_main.images)


def test_padding_is_zero_in_memory_that_was_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.full((2, 64, 96, 3), 77, dtype=torch.uint8)
    monkeypatch.setattr("boxwright.data.collate._canvases", lambda *_: memory)
    placements = place((40, 60), (50, 75)), place((40, 60), (64, 96), window=(10, 20, 30, 40), flipped=True)
    batch = collate([PlacedSample(GeneratedImages(1)[0], placement, 0) for placement in placements], 2, (64, 96), 8)
    for image, (height, width) in zip(batch.images, batch.image_sizes.tolist(), strict=True):
        outside = torch.ones(64, 96, dtype=torch.bool)
        outside[:height, :width] = False
        assert (image[:, outside] == 0).all()
        assert not (image == 77).all(dim=0).any(), "every visible pixel is written"


def test_an_image_that_does_not_fit_its_canvas_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0.jpg: the file has 60 x 40 pixels"):
        collate([PlacedSample(GeneratedImages(1)[0], place((40, 60), (40, 60)), 0)], 1, (64, 32), 8)


@pytest.mark.parametrize("image", [np.zeros((40, 60, 3), np.float32), np.zeros((40, 60), np.uint8)])
def test_an_image_that_is_not_uint8_rgb_is_an_error(image: np.ndarray) -> None:
    sample = replace(GeneratedImages(1)[0], image=image)
    with pytest.raises(ValueError, match=rf"^0.jpg: expected uint8 .*got {image.dtype} "):
        collate([PlacedSample(sample, place((40, 60), (40, 60)), 0)], 1, (64, 64), 8)


def test_more_objects_than_slots_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3.jpg: 3 objects"):
        collate([PlacedSample(GeneratedImages(4)[3], place((50, 50), (50, 50)), 0)], 1, (64, 64), 2)

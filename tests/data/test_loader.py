"""Batches are reproducible, workers end with their iterator, and errors of files reach the user."""

from __future__ import annotations

import gc
import time
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from boxwright.data.augment import Photometric
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Sample
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.structures import Batch, MaskGrids, Targets
from generated_images import SIZES, GeneratedImages, GeneratedImagesWithInfo

# PyTorch warns on machines with one core, and Python 3.12 warns about fork in a process with threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

RESIZE = Resize(64, 107)
AUGMENTATION = {field.name for field in fields(Augmentation)}


def training_loader(dataset: GeneratedImages | None = None, **changes: object) -> TrainingLoader:
    """Training loader; `changes` are arguments of the loader or fields of the augmentation."""
    augmentation = Augmentation(resize=RESIZE, scale_jitter=(0.7, 1.4), crop=0.7, photometric=Photometric())
    augmentation = replace(augmentation, **{name: changes.pop(name) for name in AUGMENTATION & set(changes)})
    arguments: dict = {"augmentation": augmentation, "batch_size": 4, "seed": 5, "num_workers": 0, **changes}
    return TrainingLoader(GeneratedImages(23) if dataset is None else dataset, **arguments)


def assert_equal(one: Batch | Targets | MaskGrids | None, two: Batch | Targets | MaskGrids | None) -> None:
    assert type(one) is type(two)
    if one is None or two is None:
        return
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert left.stride() == right.stride(), field.name
            assert torch.equal(left, right), field.name
        else:
            assert_equal(left, right)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in command(child)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def add_noise(sample: Sample) -> Sample:
    noise = torch.randint(0, 50, sample.image.shape, dtype=torch.uint8).numpy()
    return replace(sample, image=sample.image + noise)


def remove_row(sample: Sample) -> Sample:
    return replace(sample, image=sample.image[:-1])


SCALES = {
    "one scale": {},
    "list": {"scales": ((40, 80), (64, 107), (90, 107))},
    "range": {"scales": ((40, 80), (150, 300)), "scale_mode": "range"},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("scales", SCALES)
def test_resuming_gives_identical_batches(num_workers: int, scales: str) -> None:
    start = 5
    from_the_start = list(islice(training_loader(**SCALES[scales]).batches(0), start + 6))
    resumed = training_loader(num_workers=num_workers, **SCALES[scales]).batches(start)
    for batch, resumed_batch in zip(from_the_start[start:], resumed, strict=False):
        assert_equal(batch, resumed_batch)


def test_spawned_workers_give_identical_batches() -> None:
    spawned = training_loader(num_workers=1, start_method="spawn").batches(2)
    for one, two in zip(islice(spawned, 2), training_loader().batches(2), strict=False):
        assert_equal(one, two)


def test_masks_from_workers_equal_masks_from_the_main_process() -> None:
    in_main = list(islice(training_loader(masks=True).batches(), 3))
    for one, two in zip(in_main, training_loader(masks=True, num_workers=1).batches(), strict=False):
        assert_equal(one, two)
        assert torch.equal(one.targets.masks.valid, one.targets.valid & ~one.targets.crowd)
        frames, boxes = one.targets.masks.frames, one.targets.boxes
        contains = (frames[..., :2] <= boxes[..., :2] + 1e-4) & (frames[..., 2:] >= boxes[..., 2:] - 1e-4)
        assert contains[one.targets.masks.valid].all()


class WithoutMasks(GeneratedImagesWithInfo):
    annotations = "boxes_only.json"

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), masks=None)


def test_a_data_set_without_masks_is_an_error_before_training() -> None:
    with pytest.raises(ValueError, match=r"^boxes_only.json: no object has a mask.*`segmentation`"):
        training_loader(WithoutMasks(5), masks=True)
    training_loader(WithoutMasks(5))


@pytest.mark.parametrize("scales", SCALES)
def test_batches_of_two_ranks_equal_the_batch_of_one_process(scales: str) -> None:
    whole = islice(training_loader(batch_size=4, **SCALES[scales]).batches(), 8)
    parts = [training_loader(batch_size=2, rank=rank, world_size=2, **SCALES[scales]).batches() for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=False):
        assert first.images.shape == second.images.shape
        for field in fields(batch):
            if field.name not in ("targets", "proposals"):
                concatenated = torch.cat([getattr(first, field.name), getattr(second, field.name)])
                assert torch.equal(getattr(batch, field.name), concatenated)


def test_an_epoch_contains_every_image_with_one_seed_per_epoch() -> None:
    loader = training_loader()
    seeds: dict[int, int] = {}
    for epoch in range(2):
        seen = set()
        for batch in islice(loader.batches(epoch * loader.steps_per_epoch), loader.steps_per_epoch):
            assert batch.images.shape[0] == 4
            assert all(side % 32 == 0 for side in batch.images.shape[2:])
            for image_id, seed in zip(batch.image_ids.tolist(), batch.seeds.tolist(), strict=True):
                seen.add(image_id)
                assert seeds.setdefault((epoch, image_id), seed) == seed
        assert seen == {100 + i for i in range(23)}
    assert len(set(seeds.values())) == 46


def plain_batches(scales: str, count: int) -> list[Batch]:
    """Batches without scale jitter and crop, so that each image has the size drawn for it."""
    return list(islice(training_loader(scale_jitter=None, crop=None, **SCALES[scales]).batches(), count))


def test_with_a_list_all_images_of_a_batch_have_one_scale() -> None:
    drawn = set()
    for batch in plain_batches("list", 60):
        originals = batch.original_sizes.numpy()
        fitting = [
            scale
            for scale in SCALES["list"]["scales"]
            if (Resize(*scale).sizes(originals) == batch.image_sizes.numpy()).all()
        ]
        assert fitting
        drawn.add(fitting[0])
    assert drawn == set(SCALES["list"]["scales"])


def test_with_a_range_each_image_draws_its_size() -> None:
    shorts, canvases = [], set()
    for batch in plain_batches("range", 150):
        canvases.add(tuple(batch.images.shape[2:]))
        # Among these image shapes, only the most elongated one reaches the limit of the long side.
        shorts += batch.image_sizes.min(dim=1).values[batch.original_sizes.min(dim=1).values >= 40].tolist()
    assert min(shorts) < 45
    assert max(shorts) > 145
    assert np.mean(shorts) == pytest.approx(95, abs=4)
    assert len(set(shorts)) > 80
    assert len(canvases) <= 3 * 7


def test_boxes_match_the_pixels_of_objects_after_all_augmentations() -> None:
    checked = 0
    for batch in islice(training_loader(photometric=None).batches(), 12):
        assert batch.targets is not None
        for b in range(4):
            height, width = batch.image_sizes[b].tolist()
            assert (batch.images[b, :, height:] == 0).all()
            assert (batch.images[b, :, :, width:] == 0).all()
            for x1, y1, x2, y2 in batch.targets.boxes[b][batch.targets.valid[b]].tolist():
                assert 0 <= x1 < x2 <= width
                assert 0 <= y1 < y2 <= height
                inside = batch.images[b, 2, int(y1 + 1.5) : int(y2 - 0.5), int(x1 + 1.5) : int(x2 - 0.5)]
                assert (inside > 200).all()
                checked += inside.numel() > 0
    assert checked > 20


def test_the_transforms_of_a_batch_map_boxes_to_the_canvas() -> None:
    dataset = GeneratedImages(23)
    batch = next(training_loader(scale_jitter=None, crop=None, flip=0.5).batches(3))
    assert batch.targets is not None
    for b in range(4):
        sample = dataset[int(batch.image_ids[b]) - 100]
        (a, _, c), (_, e, f) = batch.transforms[b].tolist()
        for box, expected in zip(sample.boxes, batch.targets.boxes[b][batch.targets.valid[b]], strict=True):
            xs, ys = sorted([box[0] * a + c, box[2] * a + c]), sorted([box[1] * e + f, box[3] * e + f])
            np.testing.assert_allclose(expected, [xs[0], ys[0], xs[1], ys[1]], atol=1e-4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_transforms_are_repeatable_and_leave_the_global_generator_unchanged(num_workers: int) -> None:
    torch.manual_seed(0)
    one = next(training_loader(transform=add_noise).batches(4))
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert_equal(one, next(training_loader(transform=add_noise, num_workers=num_workers).batches(4)))
    assert torch.rand(()) == drawn


def test_a_transform_that_changes_the_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"jpg: the transform changed the image shape from"):
        next(training_loader(transform=remove_row).batches())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_file_keeps_its_type_and_message(num_workers: int) -> None:
    loader = training_loader(GeneratedImagesWithInfo(23, broken=7), num_workers=num_workers)
    message = r"^broken/7.jpg: cannot be decoded \(position 7 of the data set\)$"
    with pytest.raises(ValueError, match=message) as caught:
        list(islice(loader.batches(), loader.steps_per_epoch))
    if num_workers:
        assert "__getitem__" in str(caught.value.__cause__)
    del caught
    assert_no_children()


def test_closing_the_generator_ends_all_workers() -> None:
    iterator = training_loader(num_workers=2).batches()
    next(iterator)
    assert len(children()) == 2
    iterator.close()
    assert_no_children()


def assert_no_children() -> None:
    gc.collect()
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("native", [False, True])
def test_evaluation_contains_each_image_once(world_size: int, native: bool) -> None:
    seen = []
    for rank in range(world_size):
        loader = EvaluationLoader(
            GeneratedImages(23),
            batch_size=4,
            resize=None if native else RESIZE,
            native=native,
            num_workers=0,
            rank=rank,
            world_size=world_size,
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [image_id for batch in batches for image_id in batch.image_ids.tolist()]
        assert all(batch.targets is None for batch in batches)
    assert sorted(seen) == [100 + i for i in range(23)]


def test_native_evaluation_only_pads() -> None:
    dataset = GeneratedImages(12)
    for batch in EvaluationLoader(dataset, batch_size=4, native=True, num_workers=0):
        for b, image_id in enumerate(batch.image_ids.tolist()):
            height, width = SIZES[(image_id - 100) % len(SIZES)]
            assert batch.image_sizes[b].tolist() == [height, width]
            assert batch.images.shape[2:] == (-(-height // 32) * 32, -(-width // 32) * 32)
            image = batch.images[b, :, :height, :width].permute(1, 2, 0)
            np.testing.assert_array_equal(image, dataset[image_id - 100].image)
            assert batch.transforms[b].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_an_evaluation_loader_can_be_iterated_twice_with_workers() -> None:
    loader = EvaluationLoader(GeneratedImages(9), batch_size=4, resize=RESIZE, num_workers=1)
    in_main = EvaluationLoader(GeneratedImages(9), batch_size=4, resize=RESIZE, num_workers=0)
    for _ in range(2):
        for one, two in zip(loader, in_main, strict=True):
            assert_equal(one, two)


def test_invalid_arguments_are_an_error() -> None:
    with pytest.raises(ValueError, match="either resize or native=True, got neither"):
        EvaluationLoader(GeneratedImages(3), batch_size=1, num_workers=0)
    with pytest.raises(ValueError, match="no images"):
        training_loader(GeneratedImages(0))
    with pytest.raises(ValueError, match=r"batch_size\S*: expected a whole number, at least 1"):
        training_loader(batch_size=0)


@pytest.mark.parametrize(("folder", "num_images"), [("coco_mini", 206), ("bccd", 87)])
def test_loaders_on_public_data_sets(data_dir: Path, folder: str, num_images: int) -> None:
    split = find_layout(data_dir / folder)["val"]
    dataset = IndexedDataset(split.annotations, split.images)
    assert len(dataset) == num_images
    resize = Resize(160, 267)
    seen = []
    for batch in EvaluationLoader(dataset, batch_size=8, resize=resize, num_workers=2):
        seen += batch.image_ids.tolist()
        # Original sizes are read from the files; the canvases were planned from the annotated sizes.
        np.testing.assert_array_equal(resize.sizes(batch.original_sizes.numpy()), batch.image_sizes)
    assert sorted(seen) == sorted(dataset.image_ids.tolist())

    augmentation = Augmentation(resize=resize, scale_jitter=(0.8, 1.2))
    loader = TrainingLoader(dataset, augmentation=augmentation, batch_size=4, seed=0, num_workers=2)
    num_objects = 0
    for batch in islice(loader.batches(), 10):
        assert batch.targets is not None
        valid, boxes = batch.targets.valid, batch.targets.boxes
        assert (boxes[..., 2:] > boxes[..., :2])[valid].all()
        limits = batch.image_sizes.flip(1)[:, None].expand(-1, boxes.shape[1], -1)
        assert (boxes[..., 2:] <= limits)[valid].all()
        assert (batch.targets.labels[valid] < len(dataset.categories)).all()
        num_objects += int(valid.sum())
    assert num_objects > 40


def test_deprecated_arguments_of_the_training_loader_work() -> None:
    with pytest.warns(DeprecationWarning, match=r"TrainingLoader\(flip=..., resize=...\) is deprecated"):
        deprecated = TrainingLoader(GeneratedImages(6), flip=1.0, resize=RESIZE, batch_size=2, seed=5, num_workers=0)
    augmentation = Augmentation(flip=1.0, resize=RESIZE)
    loader = TrainingLoader(GeneratedImages(6), augmentation=augmentation, batch_size=2, seed=5, num_workers=0)
    assert_equal(next(deprecated.batches()), next(loader.batches()))


def test_an_unknown_argument_of_the_training_loader_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"TrainingLoader.*unexpected keyword argument 'flipped'"):
        TrainingLoader(GeneratedImages(6), flipped=True, batch_size=2, seed=5, num_workers=0)

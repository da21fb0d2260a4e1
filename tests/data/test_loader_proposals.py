"""Precomputed proposals are added to the batch of their image, and augmented like its objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.data.proposals import ImageProposals, ProposalFile, write_proposals
from boxwright.structures import Batch
from generated_images import GeneratedImages, GeneratedImagesWithInfo

DATASET = GeneratedImagesWithInfo(12)
RESIZE = Resize(64, 107)
AUGMENTATION = Augmentation(resize=RESIZE, scale_jitter=(0.7, 1.6), crop=0.6)


@pytest.fixture
def file(tmp_path: Path) -> ProposalFile:
    """For each image, a box of the whole image, followed by the boxes of its objects."""
    images = {}
    for number in range(len(DATASET)):
        sample = DATASET[number]
        height, width = sample.image.shape[:2]
        whole = np.array([[0, 0, width, height]], np.float32)
        boxes = np.concatenate([whole, sample.boxes]).clip(0, [width, height, width, height]).astype(np.float32)
        images[sample.image_id] = ImageProposals(boxes, np.linspace(1, 0.5, len(boxes)).astype(np.float32))
    images[7] = ImageProposals(
        np.ones((5, 4), np.float32), np.zeros(5, np.float32)
    )  # of an image that the data set lacks
    write_proposals(
        tmp_path / "proposals",
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        metadata={"splits": [{"name": "train", "images": len(images)}]},
    )
    return ProposalFile(tmp_path / "proposals", limit=4)


def batches(file: ProposalFile, num_workers: int = 0, start_method: str | None = None) -> list[Batch]:
    loader = TrainingLoader(
        DATASET,
        batch_size=3,
        augmentation=AUGMENTATION,
        seed=1,
        num_workers=num_workers,
        start_method=start_method,
        proposals=file,
    )
    steps = loader.batches()
    result = [next(steps) for _ in range(3 * loader.steps_per_epoch)]
    steps.close()
    return result


def test_proposals_are_augmented_like_objects(file: ProposalFile) -> None:
    compared, vanished = 0, 0
    for batch in batches(file):
        proposals, targets = batch.proposals, batch.targets
        assert proposals.boxes.shape == (3, 4, 4)
        assert proposals.sources.tolist() == [[0, 1, 2, 3]] * 3
        for image, size in enumerate(batch.image_sizes.tolist()):
            height, width = size
            assert proposals.boxes[image, 0].tolist() == [0, 0, width, height], "clipped to the visible part"
            assert proposals.scores[image, 0] == 1
            count = 1 + (int(batch.image_ids[image]) - 100) % 4
            assert not proposals.valid[image, count:].any()
            vanished += count - int(proposals.valid[image].sum())
            for box in targets.boxes[image][targets.valid[image]]:
                assert (proposals.boxes[image] - box).abs().amax(1).min() < 1e-4
                compared += 1
        assert (proposals.boxes[~proposals.valid] == 0).all()
    assert compared > 20
    assert vanished > 0, "some are outside their crop"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning", "ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_same_proposals(file: ProposalFile, start_method: str) -> None:
    for in_main, in_worker in zip(batches(file), batches(file, 1, start_method), strict=True):
        for name in ("boxes", "scores", "valid", "sources"):
            assert torch.equal(getattr(in_main.proposals, name), getattr(in_worker.proposals, name))


def test_evaluation_batches_have_proposals(file: ProposalFile) -> None:
    loader = EvaluationLoader(DATASET, batch_size=4, resize=RESIZE, num_workers=0, proposals=file)
    for batch in loader:
        assert batch.targets is None
        assert batch.proposals.valid.sum(1).tolist() == [1 + (i - 100) % 4 for i in batch.image_ids.tolist()]


def test_an_image_without_proposals_is_an_error_before_the_first_batch(file: ProposalFile) -> None:
    for dataset in (GeneratedImagesWithInfo(13), GeneratedImages(13)):
        with pytest.raises(ValueError, match=r"no proposals for 1 of 13 images \(for example image id 112\)"):
            TrainingLoader(dataset, augmentation=AUGMENTATION, batch_size=3, seed=1, num_workers=0, proposals=file)
        with pytest.raises(ValueError, match="image id 112"):
            EvaluationLoader(dataset, batch_size=3, resize=RESIZE, num_workers=0, proposals=file)

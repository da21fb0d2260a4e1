"""Given proposals reach the batch of their image and lie where its objects lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.data.proposals import GivenProposals, ProposalFile, write_proposals
from boxwright.structures import Batch
from pictures import Pictures, StatedPictures

PICTURES = StatedPictures(12)
RESIZE = Resize(64, 107)
AUGMENTATION = Augmentation(resize=RESIZE, scale_jitter=(0.7, 1.6), crop=0.6)


@pytest.fixture
def file(tmp_path: Path) -> ProposalFile:
    """The objects themselves as proposals, behind one box that is the whole picture."""
    images = {}
    for number in range(len(PICTURES)):
        sample = PICTURES[number]
        height, width = sample.image.shape[:2]
        whole = np.array([[0, 0, width, height]], np.float32)
        boxes = np.concatenate([whole, sample.boxes]).clip(0, [width, height, width, height]).astype(np.float32)
        images[sample.image_id] = GivenProposals(boxes, np.linspace(1, 0.5, len(boxes)).astype(np.float32))
    images[7] = GivenProposals(np.ones((5, 4), np.float32), np.zeros(5, np.float32))  # of no image here
    write_proposals(
        tmp_path / "proposals",
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        page={"splits": [{"name": "train", "images": len(images)}]},
    )
    return ProposalFile(tmp_path / "proposals", limit=4)


def batches(file: ProposalFile, num_workers: int = 0, start_method: str | None = None) -> list[Batch]:
    loader = TrainingLoader(
        PICTURES,
        batch_size=3,
        augmentation=AUGMENTATION,
        seed=1,
        num_workers=num_workers,
        start_method=start_method,
        proposals=file,
    )
    steps = loader.batches()
    found = [next(steps) for _ in range(3 * loader.steps_per_epoch)]
    steps.close()
    return found


def test_proposals_go_where_objects_go(file: ProposalFile) -> None:
    compared, vanished = 0, 0
    for batch in batches(file):
        given, targets = batch.proposals, batch.targets
        assert given.boxes.shape == (3, 4, 4)
        assert given.sources.tolist() == [[0, 1, 2, 3]] * 3
        for image, size in enumerate(batch.image_sizes.tolist()):
            height, width = size
            assert given.boxes[image, 0].tolist() == [0, 0, width, height], "clipped to what is visible"
            assert given.scores[image, 0] == 1
            count = 1 + (int(batch.image_ids[image]) - 100) % 4
            assert not given.valid[image, count:].any()
            vanished += count - int(given.valid[image].sum())
            for box in targets.boxes[image][targets.valid[image]]:
                assert (given.boxes[image] - box).abs().amax(1).min() < 1e-4
                compared += 1
        assert (given.boxes[~given.valid] == 0).all()
    assert compared > 20
    assert vanished > 0, "some lie outside of their crop"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning", "ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_same(file: ProposalFile, start_method: str) -> None:
    for here, there in zip(batches(file), batches(file, 1, start_method), strict=True):
        for name in ("boxes", "scores", "valid", "sources"):
            assert torch.equal(getattr(here.proposals, name), getattr(there.proposals, name))


def test_evaluation_has_them_too(file: ProposalFile) -> None:
    loader = EvaluationLoader(PICTURES, batch_size=4, resize=RESIZE, num_workers=0, proposals=file)
    for batch in loader:
        assert batch.targets is None
        assert batch.proposals.valid.sum(1).tolist() == [1 + (i - 100) % 4 for i in batch.image_ids.tolist()]


def test_an_image_without_a_row_is_told_before_the_first_batch(file: ProposalFile) -> None:
    for dataset in (StatedPictures(13), Pictures(13)):
        with pytest.raises(ValueError, match=r"no proposals for 1 of 13 images \(for example image id 112\)"):
            TrainingLoader(dataset, augmentation=AUGMENTATION, batch_size=3, seed=1, num_workers=0, proposals=file)
        with pytest.raises(ValueError, match="image id 112"):
            EvaluationLoader(dataset, batch_size=3, resize=RESIZE, num_workers=0, proposals=file)

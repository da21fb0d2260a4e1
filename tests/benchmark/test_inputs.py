"""The generated dataset follows the `Dataset` protocol, and batches have the requested size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boxwright.benchmark.inputs import GeneratedDataset, make_batches, open_dataset, random_proposals
from boxwright.benchmark.plan import Plan
from boxwright.data.dataset import Dataset


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> GeneratedDataset:
    return GeneratedDataset(tmp_path_factory.mktemp("images"), (120, 160))


def test_samples_agree_with_the_attributes_of_the_dataset(generated: GeneratedDataset) -> None:
    assert isinstance(generated, Dataset)
    for position in (0, 5, len(generated) - 1):
        sample = generated[position]
        assert sample.image.shape == (120, 160, 3)
        assert sample.image_id == generated.image_ids[position]
        assert 1 <= len(sample.boxes) == len(sample.labels) == len(sample.masks) <= generated.max_objects
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= np.array([160, 120, 160, 120]) + 1e-3).all()
        assert (sample.labels < len(generated.categories)).all()


def test_the_dataset_is_deterministic(generated: GeneratedDataset, tmp_path: Path) -> None:
    again = GeneratedDataset(tmp_path, (120, 160))
    assert np.array_equal(again[3].image, generated[3].image)
    assert np.array_equal(again[3].boxes, generated[3].boxes)


@pytest.mark.parametrize(("size", "canvas"), [((64, 64), (64, 64)), ((96, 160), (96, 160)), ((160, 90), (160, 96))])
def test_images_have_the_requested_size(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    plan = Plan(recipe="mask_rcnn_r18_fpn_small", size=size, batch=2)
    experiment = plan.experiment()
    with open_dataset(plan) as dataset:
        for training in (True, False):
            batches = make_batches(plan, experiment, dataset, training=training, masks=True, proposals=None)
            assert batches[0].images.shape == (2, 3, *canvas)
            assert batches[0].image_sizes.tolist() == [list(size)] * 2
            assert (batches[0].targets is not None) == training


def test_random_proposals_are_valid_boxes_inside_the_images() -> None:
    plan = Plan(recipe="fast_rcnn_r18_fpn_small", size=(64, 64), settings=["given_proposals=50"])
    experiment = plan.experiment()
    with open_dataset(plan) as dataset, random_proposals(dataset, experiment) as file:
        proposals = file.of(7, (640, 640))  # raises if a box exceeds the image
        assert len(proposals.boxes) == 50
        assert (proposals.boxes[:, 2:] > proposals.boxes[:, :2]).all()


def test_a_given_dataset_is_opened_from_its_folder(data_dir: Path) -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", data=str(data_dir / "bccd"))
    with open_dataset(plan) as dataset:
        assert {category.name for category in dataset.categories} == {"RBC", "WBC", "Platelets"}

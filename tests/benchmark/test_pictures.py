"""Generated pictures are what a data set is, and come in the canvas that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boxwright.benchmark.pictures import GeneratedPictures, given_proposals, kept_batches, open_pictures
from boxwright.benchmark.plan import Plan
from boxwright.data.dataset import Dataset


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> GeneratedPictures:
    return GeneratedPictures(tmp_path_factory.mktemp("pictures"), (120, 160))


def test_samples_are_what_the_data_set_says_of_them(pictures: GeneratedPictures) -> None:
    assert isinstance(pictures, Dataset)
    for position in (0, 5, len(pictures) - 1):
        sample = pictures[position]
        assert sample.image.shape == (120, 160, 3)
        assert sample.image_id == pictures.image_ids[position]
        assert 1 <= len(sample.boxes) == len(sample.labels) == len(sample.masks) <= pictures.max_objects
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= np.array([160, 120, 160, 120]) + 1e-3).all()
        assert (sample.labels < len(pictures.categories)).all()


def test_another_call_draws_the_same(pictures: GeneratedPictures, tmp_path: Path) -> None:
    again = GeneratedPictures(tmp_path, (120, 160))
    assert np.array_equal(again[3].image, pictures[3].image)
    assert np.array_equal(again[3].boxes, pictures[3].boxes)


@pytest.mark.parametrize(("size", "canvas"), [((64, 64), (64, 64)), ((96, 160), (96, 160)), ((160, 90), (160, 96))])
def test_pictures_fill_the_size_that_was_asked_for(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    plan = Plan(recipe="mask_rcnn_r18_fpn_small", size=size, batch=2)
    experiment = plan.experiment()
    with open_pictures(plan) as dataset:
        for training in (True, False):
            batches = kept_batches(plan, experiment, dataset, training=training, masks=True, proposals=None)
            assert batches[0].images.shape == (2, 3, *canvas)
            assert batches[0].image_sizes.tolist() == [list(size)] * 2
            assert (batches[0].targets is not None) == training


def test_a_detector_without_an_rpn_gets_boxes_inside_the_pictures() -> None:
    plan = Plan(recipe="fast_rcnn_r18_fpn_small", size=(64, 64), settings=["given_proposals=50"])
    experiment = plan.experiment()
    with open_pictures(plan) as dataset, given_proposals(dataset, experiment, True) as file:
        assert file is not None
        found = file.of(7, (640, 640))  # checks that they are
        assert len(found.boxes) == 50
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_real_pictures_are_those_of_the_folder(data_dir: Path) -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", data=str(data_dir / "bccd"))
    with open_pictures(plan) as dataset:
        assert {category.name for category in dataset.categories} == {"RBC", "WBC", "Platelets"}

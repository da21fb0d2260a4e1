"""Samples of COCO data sets, and errors of data sets that cannot be used."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from boxwright.data.dataset import Category, Dataset
from boxwright.data.formats import find_layout
from boxwright.data.formats.fault import FaultyDataError
from boxwright.data.indexed_dataset import IndexedDataset
from coco_files import document, write


def open_dataset(folder: Path, content: dict | None = None, **options: object) -> IndexedDataset:
    return IndexedDataset(*write(folder, content), cache_dir=folder / "cache", **options)


def test_samples_match_the_files(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, Dataset)
    assert dataset.categories == (Category(2, "ant"), Category(90, "zebra"))
    assert (len(dataset), dataset.max_objects, dataset.dropped) == (2, 3, {})
    # Four objects: with polygons, without a mask, a crowd region, with run lengths.
    assert (dataset.num_masks, dataset.num_without_mask) == (2, 1)
    np.testing.assert_array_equal(dataset.image_ids, [7, 3])
    np.testing.assert_array_equal(dataset.image_sizes, [[40, 60], [40, 60]])
    sample = dataset[1]
    assert (sample.image_id, sample.file_name, sample.image.shape) == (3, "sub/b.png", (40, 60, 3))
    np.testing.assert_array_equal(sample.image[0, 0], [200, 100, 1])
    np.testing.assert_array_equal(sample.boxes, [[10, 5, 30, 15], [0, 0, 1, 40], [0, 0, 1, 40]])
    np.testing.assert_array_equal(sample.labels, [1, 0, 0])
    np.testing.assert_array_equal(sample.crowd, [False, True, False])
    np.testing.assert_array_equal(dataset.index.annotation_ids[sample.object_ids], [11, 13, 14])
    assert [array.dtype for array in (sample.boxes, sample.labels, sample.crowd, sample.object_ids)] == [
        np.float32,
        np.int64,
        np.bool_,
        np.int64,
    ]
    # A sample is a copy, so changing it does not change the shared index.
    sample.boxes[:] = 0
    assert dataset[1].boxes[0, 0] == 10


def test_masks_match_the_file(tmp_path: Path) -> None:
    dataset = IndexedDataset(*write(tmp_path), cache_dir=tmp_path)
    (none,), (polygons, crowd, runs) = dataset[0].masks, dataset[1].masks
    assert none is None
    assert [polygon.tolist() for polygon in polygons] == [
        [[10, 5], [30, 5], [20, 15]],
        [[1.5, 2], [3, 4], [5, 6.25], [7, 8]],
    ]
    assert runs == b"0X1hY2"
    assert crowd == b"0X1hY2"


def test_a_data_set_is_pickled_as_paths(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path)
    data = pickle.dumps(dataset)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data)[1].boxes, dataset[1].boxes)


def test_images_without_objects_are_kept_or_dropped(tmp_path: Path) -> None:
    content = document()
    del content["annotations"][1]
    all_images = open_dataset(tmp_path, content)
    assert len(all_images) == 2
    assert all_images[0].boxes.shape == (0, 4)
    with_objects = open_dataset(tmp_path, content, keep_empty=False)
    assert with_objects.image_ids.tolist() == [3]
    assert with_objects[0].file_name == "sub/b.png"
    assert with_objects.dropped == {"images without objects": 1}
    with pytest.raises(ValueError, match="no image has objects"):
        open_dataset(tmp_path, content | {"annotations": []}, keep_empty=False)


def test_small_images_are_dropped_as_in_mmdetection_0_5(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["height"] = 31
    assert open_dataset(tmp_path, content, keep_empty=False).dropped == {"images under 32 pixels": 1}


@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "/etc/passwd", "sub/../a.png", "a\0.png"])
def test_file_names_that_lead_out_of_the_folder_are_an_error(tmp_path: Path, name: str) -> None:
    content = document()
    content["images"][0]["file_name"] = name
    with pytest.raises(FaultyDataError, match=r"image 7: the file name .* leads out of the image folder"):
        open_dataset(tmp_path, content)


def test_links_that_lead_out_of_the_folder_are_an_error(tmp_path: Path) -> None:
    annotations, images = write(tmp_path)
    (images / "a.png").rename(tmp_path / "a.png")
    (images / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(FaultyDataError, match="image 7: the file is a link that leads out"):
        IndexedDataset(annotations, images, cache_dir=tmp_path / "cache")
    (images / "a.png").unlink()
    (images / "a.png").symlink_to(images / "sub" / "b.png")
    assert len(IndexedDataset(annotations, images, cache_dir=tmp_path / "cache")) == 2
    (images / "sub").rename(tmp_path / "sub")
    (images / "sub").symlink_to(tmp_path / "sub")
    with pytest.raises(FaultyDataError, match="image 3: the file is a link that leads out"):
        IndexedDataset(annotations, images, cache_dir=tmp_path / "cache")
    # The image folder itself may be a link.
    (tmp_path / "link").symlink_to(images)
    (images / "sub").unlink()
    (tmp_path / "sub").rename(images / "sub")
    assert len(IndexedDataset(annotations, tmp_path / "link", cache_dir=tmp_path / "cache")) == 2


def test_missing_images_are_listed(tmp_path: Path) -> None:
    content = document()
    content["images"] += [{"id": n, "file_name": f"none/{n}.png", "width": 5, "height": 5} for n in range(100, 120)]
    with pytest.raises(FaultyDataError, match="20 faults") as caught:
        open_dataset(tmp_path, content)
    assert "none/109.png: image 109: the file is missing. Add the file" in str(caught.value)
    assert "and 10 more" in str(caught.value)
    with pytest.raises(ValueError, match="no such image folder"):
        IndexedDataset(tmp_path / "instances_train.json", tmp_path / "none", cache_dir=tmp_path / "cache")


def test_a_backslash_in_a_missing_file_name_is_explained(tmp_path: Path) -> None:
    content = document()
    content["images"][1]["file_name"] = "sub\\b.png"
    with pytest.raises(FaultyDataError, match="Separate folders by /"):
        open_dataset(tmp_path, content)


def test_images_above_the_pixel_limit_are_an_error(tmp_path: Path) -> None:
    assert len(open_dataset(tmp_path, max_pixels=2400)) == 2
    with pytest.raises(FaultyDataError, match="2400 pixels exceed the limit of 2399"):
        open_dataset(tmp_path, max_pixels=2399)


def test_a_size_that_differs_from_the_file_is_an_error(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["width"] = 61
    with pytest.raises(FaultyDataError, match=r"a\.png: image 7: the file has 60 x 40 .* state 61 x 40"):
        open_dataset(tmp_path, content)[0]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    annotations, images = write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60), "red").save(images / "a.png", format="JPEG", exif=exif)
    dataset = IndexedDataset(annotations, images, cache_dir=tmp_path / "cache")
    assert dataset[0].image.shape == (40, 60, 3)
    Image.new("RGB", (60, 40), "red").save(images / "a.png", format="JPEG", exif=exif)
    with pytest.raises(FaultyDataError, match="EXIF orientation"):
        dataset[0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_images_of_all_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    annotations, images = write(tmp_path)
    Image.new("RGB", (60, 40), "white").convert(mode).save(images / "a.png")
    image = IndexedDataset(annotations, images, cache_dir=tmp_path / "cache")[0].image
    np.testing.assert_array_equal(image, np.full((40, 60, 3), 255))


def test_an_image_that_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path)
    (dataset.images / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png: image 7: cannot be decoded: .*\. Replace the file"):
        dataset[0]


@pytest.mark.parametrize("name", ["coco_mini", "bccd", "nuclei"])
def test_samples_of_public_data_sets(data_dir: Path, tmp_path: Path, name: str) -> None:
    for split in find_layout(data_dir / name).values():
        dataset = IndexedDataset(*split, cache_dir=tmp_path)
        assert dataset.dropped == {}
        for position in (0, len(dataset) - 1):
            sample = dataset[position]
            assert sample.image.shape[:2] == tuple(dataset.image_sizes[position])
            assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
            assert cv2.imread(str(split.images / sample.file_name)) is not None

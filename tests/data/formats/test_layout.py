"""The usual layouts of COCO data sets are found, and what was looked for is told where none is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from boxwright.data.formats.layout import find_layout
from voc_files import write_voc

LAYOUTS = {
    "coco": ("annotations/instances_train2017.json", "train2017", "a.jpg"),
    "coco under images": ("annotations/instances_train2017.json", "images/train2017", "a.jpg"),
    "annotations by split": ("annotations/train.json", "images", "a.jpg"),
    "split folders of images": ("annotations/instances_train.json", "train/images", "a.jpg"),
    "root, images": ("instances_train.json", "images", "a.jpg"),
    "root, JPEGImages": ("instances_train.json", "JPEGImages", "a.jpg"),
    "root, beside": ("train.json", ".", "a.jpg"),
    "roboflow": ("train/_annotations.coco.json", "train", "a.jpg"),
    "split folder": ("train/annotations.json", "train/images", "a.jpg"),
    "sub-folders": ("annotations/instances_train.json", "train", "sub/a.jpg"),
    "named from the root": ("annotations/instances_train.json", ".", "train/a.jpg"),
    "one piece": ("annotations.json", "images", "a.jpg"),
    "one piece, beside": ("_annotations.coco.json", ".", "a b\u00e9.jpg"),
}


def make(folder: Path, annotations: str, images: str, file_name: str) -> None:
    for path in (folder / annotations, folder / images / file_name):
        path.parent.mkdir(parents=True, exist_ok=True)
    (folder / annotations).write_text(json.dumps({"images": [{"file_name": file_name}]}))
    (folder / images / file_name).touch()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    annotations, images, file_name = LAYOUTS[layout]
    make(tmp_path, annotations, images, file_name)
    assert find_layout(tmp_path) == {"train": (tmp_path / annotations, tmp_path / images)}


def test_all_splits(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        make(tmp_path, f"{name}/_annotations.coco.json", name, "a.jpg")
    assert {split: found.images.name for split, found in find_layout(tmp_path).items()} == {
        "train": "train",
        "val": "valid",
        "test": "test",
    }


def test_the_folder_that_holds_the_images_wins(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json", "images", "a.jpg")
    (tmp_path / "train").mkdir()
    assert find_layout(tmp_path)["train"].images == tmp_path / "images"


def test_without_any_image_the_most_special_folder_is_taken(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json", "train", "a.jpg")
    (tmp_path / "train" / "a.jpg").unlink()
    assert find_layout(tmp_path)["train"].images == tmp_path / "train"
    (tmp_path / "annotations" / "instances_train.json").write_text("")
    assert find_layout(tmp_path)["train"].images == tmp_path / "train"


def test_other_json_files_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_val2017.json", "val2017", "a.jpg")
    for name in ("captions_train2017.json", "person_keypoints_val2017.json", "instances_val2017_results.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    assert list(find_layout(tmp_path)) == ["val"]


def test_two_candidates(tmp_path: Path) -> None:
    for year in (2014, 2017):
        make(tmp_path, f"annotations/instances_train{year}.json", f"train{year}", "a.jpg")
    with pytest.raises(ValueError, match=r"instances_train2014\.json, .*instances_train2017\.json could be the train"):
        find_layout(tmp_path)


def test_two_candidates_in_one_piece(tmp_path: Path) -> None:
    for name in ("annotations.json", "instances.json"):
        make(tmp_path, name, "images", "a.jpg")
    with pytest.raises(ValueError, match=r"each of annotations\.json, instances\.json could be the train split"):
        find_layout(tmp_path)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "images", "a.jpg")
    with pytest.raises(ValueError, match="it is a file: give its folder"):
        find_layout(tmp_path / "train.json")


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Looked for annotations/instances_SPLIT\.json"):
        find_layout(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_layout(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "splits", "images"),
    [("coco_mini", 2, "train2017"), ("bccd", 3, "JPEGImages"), ("nuclei", 2, "images")],
)
def test_real_data(data_dir: Path, name: str, splits: int, images: str) -> None:
    layout = find_layout(data_dir / name)
    assert len(layout) == splits
    assert layout["train"].images == data_dir / name / images


def test_voc_is_found_where_there_is_no_coco_file(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    assert find_layout(tmp_path) == {"train": (image_set, images)}
    val, _ = write_voc(tmp_path, split="val")
    write_voc(tmp_path, split="trainval")
    assert find_layout(tmp_path) == {"train": (image_set, images), "val": (val, images)}
    make(tmp_path, "instances_val.json", "JPEGImages", "a.jpg")
    assert find_layout(tmp_path) == {"val": (tmp_path / "instances_val.json", images)}


def test_vocs_trainval_is_learnt_from_where_it_stands_alone(tmp_path: Path) -> None:
    trainval, images = write_voc(tmp_path, split="trainval")
    test, _ = write_voc(tmp_path, split="test")
    assert find_layout(tmp_path) == {"train": (trainval, images), "test": (test, images)}

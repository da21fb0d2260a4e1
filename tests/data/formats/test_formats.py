"""`find_layout` recognises common folder layouts, and every listed format can be opened."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from boxwright.data import formats
from boxwright.data.formats import find_layout, format_of, read_index
from boxwright.data.formats.check import check
from boxwright.data.formats.columns import Annotation, Columns, add_annotation
from boxwright.data.formats.fault import Fault
from boxwright.data.formats.format import Format, NoMatch, Split
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.evaluation.ground_truth import GroundTruth
from voc_files import write_voc

LAYOUTS = {
    "coco": ("annotations/instances_train2017.json", "train2017", "a.jpg"),
    "coco under images": ("annotations/instances_train2017.json", "images/train2017", "a.jpg"),
    "annotations by split": ("annotations/train.json", "images", "a.jpg"),
    "image folders by split": ("annotations/instances_train.json", "train/images", "a.jpg"),
    "root, images": ("instances_train.json", "images", "a.jpg"),
    "root, JPEGImages": ("instances_train.json", "JPEGImages", "a.jpg"),
    "images beside the file": ("train.json", ".", "a.jpg"),
    "roboflow": ("train/_annotations.coco.json", "train", "a.jpg"),
    "folders by split": ("train/annotations.json", "train/images", "a.jpg"),
    "subfolders": ("annotations/instances_train.json", "train", "sub/a.jpg"),
    "file names relative to the root": ("annotations/instances_train.json", ".", "train/a.jpg"),
    "no splits": ("annotations.json", "images", "a.jpg"),
    "no splits, images beside the file": ("_annotations.coco.json", ".", "a b\u00e9.jpg"),
}


def make(folder: Path, annotations: str, images: str, file_name: str) -> None:
    for path in (folder / annotations, folder / images / file_name):
        path.parent.mkdir(parents=True, exist_ok=True)
    (folder / annotations).write_text(json.dumps({"images": [{"file_name": file_name}]}))
    (folder / images / file_name).touch()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised(tmp_path: Path, layout: str) -> None:
    annotations, images, file_name = LAYOUTS[layout]
    make(tmp_path, annotations, images, file_name)
    assert find_layout(tmp_path) == {"train": (tmp_path / annotations, tmp_path / images)}


def test_all_splits_are_recognised(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        make(tmp_path, f"{name}/_annotations.coco.json", name, "a.jpg")
    assert {split: paths.images.name for split, paths in find_layout(tmp_path).items()} == {
        "train": "train",
        "val": "valid",
        "test": "test",
    }


def test_the_folder_that_contains_the_images_is_selected(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json", "images", "a.jpg")
    (tmp_path / "train").mkdir()
    assert find_layout(tmp_path)["train"].images == tmp_path / "images"


def test_without_images_the_most_specific_folder_is_selected(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json", "train", "a.jpg")
    (tmp_path / "train" / "a.jpg").unlink()
    assert find_layout(tmp_path)["train"].images == tmp_path / "train"
    (tmp_path / "annotations" / "instances_train.json").write_text("")
    assert find_layout(tmp_path)["train"].images == tmp_path / "train"


def test_other_json_files_are_ignored(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_val2017.json", "val2017", "a.jpg")
    for name in ("captions_train2017.json", "person_keypoints_val2017.json", "instances_val2017_results.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    assert list(find_layout(tmp_path)) == ["val"]


def test_two_files_for_one_split_are_an_error(tmp_path: Path) -> None:
    for year in (2014, 2017):
        make(tmp_path, f"annotations/instances_train{year}.json", f"train{year}", "a.jpg")
    with pytest.raises(
        ValueError, match=r"match the train split: .*instances_train2014\.json, .*instances_train2017\.json"
    ):
        find_layout(tmp_path)


def test_two_files_without_splits_are_an_error(tmp_path: Path) -> None:
    for name in ("annotations.json", "instances.json"):
        make(tmp_path, name, "images", "a.jpg")
    with pytest.raises(ValueError, match=r"several files match the train split: annotations\.json, instances\.json"):
        find_layout(tmp_path)


def test_a_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "train.json", "images", "a.jpg")
    with pytest.raises(ValueError, match="expected a folder, got a file"):
        find_layout(tmp_path / "train.json")


def test_an_unknown_layout_is_an_error_that_lists_what_each_format_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"COCO: looked for annotations/instances_SPLIT\.json.* VOC: looked for Image"):
        find_layout(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_layout(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "splits", "images"),
    [("coco_mini", 2, "train2017"), ("bccd", 3, "JPEGImages"), ("nuclei", 2, "images")],
)
def test_public_data_sets_are_recognised(data_dir: Path, name: str, splits: int, images: str) -> None:
    layout = find_layout(data_dir / name)
    assert len(layout) == splits
    assert layout["train"].images == data_dir / name / images


def test_voc_is_recognised_if_there_is_no_coco_file(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    assert find_layout(tmp_path) == {"train": (image_set, images)}
    val, _ = write_voc(tmp_path, split="val")
    write_voc(tmp_path, split="trainval")
    assert find_layout(tmp_path) == {"train": (image_set, images), "val": (val, images)}
    make(tmp_path, "instances_val.json", "JPEGImages", "a.jpg")
    assert find_layout(tmp_path) == {"val": (tmp_path / "instances_val.json", images)}


def test_trainval_of_voc_is_the_training_split_if_train_and_val_are_missing(tmp_path: Path) -> None:
    trainval, images = write_voc(tmp_path, split="trainval")
    test, _ = write_voc(tmp_path, split="test")
    assert find_layout(tmp_path) == {"train": (trainval, images), "test": (test, images)}


class TableFormat:
    """A third-party format: `SPLIT.csv` with `file,class,x1,y1,x2,y2` per object.

    The table does not contain image sizes, so the reader opens the images.
    """

    name = "table"

    def detect(self, folder: Path) -> dict[str, Split] | NoMatch:
        splits = {split: Split(folder / f"{split}.csv", folder / "images") for split in ("train", "val")}
        splits = {split: paths for split, paths in splits.items() if paths.annotations.is_file()}
        return splits or NoMatch("train.csv and val.csv")

    def reads(self, annotations: Path) -> bool:
        return annotations.suffix == ".csv"

    def content_hash(self, split: Split) -> str:
        return split.annotations.read_bytes().hex()

    def read(self, split: Split) -> tuple[Columns, list[Fault]]:
        columns, faults = Columns(box_form="x1, y1, x2, y2 in pixels"), list[Fault]()
        with split.annotations.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns.file_names = sorted({row["file"] for row in rows})
        columns.category_names = sorted({row["class"] for row in rows})
        columns.category_ids.extend(range(1, len(columns.category_names) + 1))
        for image_id, name in enumerate(columns.file_names, 1):
            columns.image_ids.append(image_id)
            columns.image_sizes.extend(cv2.imread(str(split.images / name)).shape[:2])
        for number, row in enumerate(rows, 1):
            x1, y1, x2, y2 = (float(row[side]) for side in ("x1", "y1", "x2", "y2"))
            annotation = Annotation(
                id=number,
                image_id=1 + columns.file_names.index(row["file"]),
                category_id=1 + columns.category_names.index(row["class"]),
                bbox=(x1, y1, x2 - x1, y2 - y1),
            )
            add_annotation(columns, annotation, str(split.annotations), faults)
        return columns, faults


@pytest.fixture
def table_format(monkeypatch: pytest.MonkeyPatch) -> Format:
    table, listed = TableFormat(), formats.formats()
    monkeypatch.setattr(formats, "formats", lambda: (*listed, table))
    return table


def write_table(folder: Path, *rows: str) -> Path:
    (folder / "images").mkdir()
    for name, size in (("a.png", (30, 40)), ("b.png", (50, 20))):
        cv2.imwrite(str(folder / "images" / name), np.zeros((*size, 3), np.uint8))
    table = folder / "train.csv"
    table.write_text("\n".join(["file,class,x1,y1,x2,y2", "b.png,wasp,1,2,11,22", "a.png,ant,5,6,7.5,8", *rows]))
    return table


@pytest.mark.usefixtures("table_format")
def test_a_third_party_format_works_for_layouts_data_sets_and_evaluation(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    layout = find_layout(tmp_path)
    assert layout == {"train": (table, tmp_path / "images")}
    dataset = IndexedDataset(*layout["train"], cache_dir=tmp_path / "cache")
    assert [category.name for category in dataset.categories] == ["ant", "wasp"]
    np.testing.assert_array_equal(dataset.image_sizes, [[30, 40], [50, 20]])
    sample = dataset[1]
    assert (sample.file_name, sample.labels.tolist()) == ("b.png", [1])
    np.testing.assert_array_equal(sample.boxes, [[1, 2, 11, 22]])
    boxes = [entry["bbox"] for entry in GroundTruth(dataset).coco.load_anns([1, 2])]
    np.testing.assert_array_equal(boxes, [[1, 2, 10, 20], [5, 6, 2.5, 2]])


@pytest.mark.usefixtures("table_format")
def test_common_checks_apply_to_a_third_party_format(tmp_path: Path) -> None:
    table = write_table(tmp_path, "a.png,ant,100,0,110,9", "a.png,ant,nan,0,1,1")
    faults = check(table, tmp_path / "images")
    assert [(fault.severity, fault.object) for fault in faults] == [
        ("error", "annotation 4 (image 1)"),
        ("dropped", "annotation 3 (image 1)"),
    ]
    assert "x1, y1, x2, y2 in pixels" in str(faults[-1])


def test_two_formats_never_share_a_cached_index(
    tmp_path: Path, table_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path)
    first = read_index(table, tmp_path / "images", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(table_format, "name", "table 2")
    second = read_index(table, tmp_path / "images", cache_dir=tmp_path / "cache")
    assert first.folder != second.folder


def test_annotations_in_an_unknown_format_are_an_error(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    with pytest.raises(ValueError, match=r"train\.csv: unknown annotation format\. Supported formats: COCO, VOC"):
        read_index(table)
    with pytest.raises(FileNotFoundError, match=r"no such annotation file.*nowhere\.csv"):
        read_index(tmp_path / "nowhere.csv")


def test_a_coco_file_is_recognised_by_name_or_content(tmp_path: Path) -> None:
    file = tmp_path / "annotations.coco"
    file.write_bytes(b'\xef\xbb\xbf\n {"images": []}')
    assert format_of(file).name == "COCO"
    assert format_of(tmp_path / "missing.JSON").name == "COCO"
    assert format_of(tmp_path / "list.txt").name == "VOC"


def test_deprecated_import_paths_warn_and_work() -> None:
    with pytest.warns(DeprecationWarning, match=r"indexed_dataset\.IndexedDataset"):
        from boxwright.data.coco import CocoDataset
    with pytest.warns(DeprecationWarning, match=r"boxwright\.data\.formats\.find_layout"):
        from boxwright.data.layout import find_layout as old_find_layout
    with pytest.warns(DeprecationWarning, match=r"boxwright\.data\.formats\.Split"):
        from boxwright.data.layout import Split as OldSplit
    assert (CocoDataset, old_find_layout, OldSplit) == (IndexedDataset, find_layout, Split)
    with pytest.raises(ImportError, match="nonsense"):
        from boxwright.data.coco import nonsense  # noqa: F401

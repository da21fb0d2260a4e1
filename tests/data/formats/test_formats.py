"""Data sets are found in the usual layouts, and opened in any format of the list."""

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
    with pytest.raises(ValueError, match=r"COCO: looked for annotations/instances_SPLIT\.json.* VOC: looked for Image"):
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


class TableFormat:
    """A third format as another package would write it: `SPLIT.csv` with `file,class,x1,y1,x2,y2` per object.

    The table does not state the image sizes, so the reader needs the image folder.
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
    third, known = TableFormat(), formats.formats()
    monkeypatch.setattr(formats, "formats", lambda: (*known, third))
    return third


def write_table(folder: Path, *rows: str) -> Path:
    (folder / "images").mkdir()
    for name, size in (("a.png", (30, 40)), ("b.png", (50, 20))):
        cv2.imwrite(str(folder / "images" / name), np.zeros((*size, 3), np.uint8))
    table = folder / "train.csv"
    table.write_text("\n".join(["file,class,x1,y1,x2,y2", "b.png,wasp,1,2,11,22", "a.png,ant,5,6,7.5,8", *rows]))
    return table


@pytest.mark.usefixtures("table_format")
def test_a_third_format_is_found_opened_and_measured(tmp_path: Path) -> None:
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
def test_the_checks_of_a_third_format_are_the_common_ones(tmp_path: Path) -> None:
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


def test_annotations_in_no_known_format(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    with pytest.raises(ValueError, match=r"train\.csv: these annotations are in no known format \(COCO, VOC\)"):
        read_index(table)
    with pytest.raises(FileNotFoundError, match=r"no such annotation file.*nowhere\.csv"):
        read_index(tmp_path / "nowhere.csv")


def test_a_coco_file_is_known_by_its_content_too(tmp_path: Path) -> None:
    file = tmp_path / "annotations.coco"
    file.write_bytes(b'\xef\xbb\xbf\n {"images": []}')
    assert format_of(file).name == "COCO"
    assert format_of(tmp_path / "not there.JSON").name == "COCO"
    assert format_of(tmp_path / "list.txt").name == "VOC"


def test_old_import_paths_warn_and_work() -> None:
    with pytest.warns(DeprecationWarning, match=r"indexed_dataset\.IndexedDataset"):
        from boxwright.data.coco import CocoDataset
    with pytest.warns(DeprecationWarning, match=r"boxwright\.data\.formats\.find_layout"):
        from boxwright.data.layout import find_layout as old_find_layout
    with pytest.warns(DeprecationWarning, match=r"boxwright\.data\.formats\.Split"):
        from boxwright.data.layout import Split as OldSplit
    assert (CocoDataset, old_find_layout, OldSplit) == (IndexedDataset, find_layout, Split)
    with pytest.raises(ImportError, match="nonsense"):
        from boxwright.data.coco import nonsense  # noqa: F401

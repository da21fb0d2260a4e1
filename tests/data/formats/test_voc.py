"""VOC's XML files give what COCO's file would, and all that is wrong in them is told by file and object."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from boxwright.data.formats.check import check
from boxwright.data.formats.fault import FaultyDataError
from boxwright.data.formats.voc import image_id
from boxwright.data.indexed_dataset import IndexedDataset
from voc_files import PICTURES, page, write_voc


def test_samples_are_as_the_files_say(tmp_path: Path) -> None:
    dataset = IndexedDataset(*write_voc(tmp_path), cache_dir=tmp_path / "cache")
    assert [(category.id, category.name) for category in dataset.categories] == [(1, "ant"), (2, "zebra")]
    first, empty, last = (dataset[i] for i in range(3))
    # The first pixel is 1 and the last one belongs to the box.
    assert first.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]  # difficult
    assert empty.boxes.shape == (0, 4)
    assert last.boxes.tolist() == [[4, 5, 7.5, 8]]
    assert [sample.file_name for sample in (first, empty, last)] == [f"{name}.png" for name in PICTURES]
    assert (first.image_id, empty.image_id) == (7, 2008000003)
    assert dataset.max_objects == 2
    assert pickle.loads(pickle.dumps(dataset))[0].boxes.tolist() == first.boxes.tolist()


def test_an_images_number_depends_on_its_name_alone() -> None:
    assert image_id("000005") == 5
    assert image_id("2012_004331") == 2012004331
    names = [f"BloodImage_{number:05d}" for number in range(1000)] + ["5", "00005", "0000_000005", "\u0660" * 6]
    numbers = [image_id(name) for name in names]
    assert len(set(numbers)) == len(names)
    assert all(2**48 <= number < 2**49 for number in numbers)


def test_all_splits_have_the_classes_of_all_files(tmp_path: Path) -> None:
    train, images = write_voc(tmp_path, {"a": [("zebra", (1, 1, 9, 9), 0)]})
    val, _ = write_voc(tmp_path, {"b": [("ant", (1, 1, 9, 9), 0)]}, "val")
    sets = [IndexedDataset(split, images, cache_dir=tmp_path / "cache") for split in (train, val)]
    assert [[category.name for category in each.categories] for each in sets] == [["ant", "zebra"]] * 2
    assert [each[0].labels.tolist() for each in sets] == [[1], [0]]


def test_classes_can_be_stated_in_an_order(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    (tmp_path / "classes.txt").write_text("zebra\n\nbee\nant\n")
    dataset = IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")
    assert [category.name for category in dataset.categories] == ["zebra", "bee", "ant"]
    assert dataset[0].labels.tolist() == [0, 2]
    (tmp_path / "classes.txt").write_text("zebra\n")
    with pytest.raises(FaultyDataError, match=r"000007\.xml: object 2 \(ant\): classes\.txt has no class 'ant'"):
        IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_edited_files_are_read_anew(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    assert len(IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].boxes) == 2
    (tmp_path / "Annotations" / "000007.xml").write_text(page("000007", PICTURES["000007"][:1]))
    assert len(IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].boxes) == 1


@pytest.mark.parametrize(
    ("stated", "taken"), [("b.PNG", "b.PNG"), ("c.png", "b.jpg"), ("x/b.png", "b.jpg"), ("", "b.jpg")]
)
def test_the_list_names_the_picture_and_the_file_its_ending(tmp_path: Path, stated: str, taken: str) -> None:
    image_set, images = write_voc(tmp_path, {"b": [("ant", (1, 1, 9, 9), 0)]})
    (images / "b.png").rename(images / taken)
    file = tmp_path / "Annotations" / "b.xml"
    file.write_text(file.read_text().replace("b.png", stated))
    assert IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].file_name == taken


def one_page(content: str) -> str:
    return page("b", [("ant", (2, 3, 9, 9), 0)]).replace("</annotation>", content + "</annotation>")


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]>'
BROKEN = {
    "cut short": (one_page("")[:-30], "error: b.xml: file: no valid XML: "),
    "empty": ("", "error: b.xml: file: no valid XML: "),
    "no XML": ("{}", "error: b.xml: file: no valid XML: "),
    "unknown encoding": ('<?xml version="1.0" encoding="none"?><annotation/>', "error: b.xml: file: no valid XML: "),
    "entities": (BOMB + one_page("<a>&c;</a>"), "error: b.xml: file: no valid XML: it declares a document type"),
    "outer entity": ('<!DOCTYPE a SYSTEM "file:///x">' + one_page(""), "error: b.xml: file: no valid XML: it declares"),
    "another format": ("<svg/>", "error: b.xml: file: no VOC annotation: it holds <svg>"),
    "no size": (
        one_page("").replace("size>", "sizes>"),
        "error: b.xml: image b: `size` is height missing, width missi",
    ),
    "no height": (one_page("").replace(">40<", ">0<"), "error: b.xml: image b: `size` is height 0, width 60"),
    "endless height": (one_page("").replace(">40<", f">{'9' * 5000}<"), "error: b.xml: image b: `size` is height 999"),
    "infinite": (
        page("b", [("ant", (-1e308, 3, 1e308, 9), 0)]),
        "error: b.xml: object 1 (ant): `bbox` holds NaN or infinity: correct it",
    ),
    "no name": (one_page("").replace(">ant<", "><"), "error: b.xml: object 1: `name` is missing: name its class"),
    "no box": (
        one_page("")
        .replace("<bndbox><xmin>2</xmin><ymin>", "<box><xmin>2</xmin><ymin>")
        .replace("</bndbox></object>", "</box></object>"),
        "error: b.xml: object 1 (ant): `bndbox` is xmin missing, ymin missing, xmax missing, ymax missing",
    ),
    "no number": (
        one_page("").replace(">3<", ">three<"),
        "error: b.xml: object 1 (ant): `bndbox` is xmin 2, ymin three",
    ),
    "NaN": (one_page("").replace("<ymin>3", "<ymin>nan"), "error: b.xml: object 1 (ant): `bndbox` is xmin 2, ymin nan"),
    "difficult": (
        one_page("").replace("<difficult>0", "<difficult>no"),
        "error: b.xml: object 1 (ant): `difficult` is",
    ),
    "a point": (
        one_page("").replace(">9<", ">2<", 1),
        "dropped: b.xml: object 1 (ant): its box [2, 3, 2, 9] has no area in its image of 60 x 40 pixels: bndbox is xm",
    ),
    "turned round": (
        one_page("").replace(">2<", ">12<"),
        "dropped: b.xml: object 1 (ant): its box [12, 3, 9, 9] has no a",
    ),
    "outside": (
        page("b", [("ant", (62, 3, 70, 9), 0)]),
        "dropped: b.xml: object 1 (ant): its box [62, 3, 70, 9] lies outside its image",
    ),
    "beyond": (
        page("b", [("ant", (50, 3, 70, 9), 0)]),
        "clipped: b.xml: object 1 (ant): its box [50, 3, 70, 9] reaches beyond its image",
    ),
    "another size": (
        page("b", [("ant", (1, 3, 7, 9), 0)], size=(60, 40)),
        f"error: b.png: image {image_id('b')}: its file holds 60 x 40 pixels",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_faults_name_file_object_and_mend(tmp_path: Path, case: str) -> None:
    content, told = BROKEN[case]
    image_set, images = write_voc(tmp_path, {"a": [("ant", (1, 1, 9, 9), 0)], "b": []})
    (tmp_path / "Annotations" / "b.xml").write_text(content)
    faults = check(image_set, images)
    assert [
        f"{fault.severity}: {fault}".replace(f"{Path(fault.file).parent}/", "")[: len(told)] for fault in faults
    ] == [told]
    assert Path(faults[0].file).is_file()
    assert faults[0].mend
    if faults[0].severity == "error" and not faults[0].file.endswith(".png"):
        with pytest.raises(FaultyDataError):
            IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_faults_of_the_list(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    image_set.write_text("000007\n000007\n../000007\nnone\n")
    (images / "000007.png").unlink()
    assert [(Path(fault.file).name, fault.object, fault.what) for fault in check(image_set, images)] == [
        ("train.txt", "image 000007", "2 lines name it"),
        ("train.txt", "image '../000007'", "is no plain name"),
        ("none.xml", "image none", "is missing"),
        ("000007.png", "image 7", "is missing"),
    ]
    for content, what in ((b"\n", "it names no image"), (b"\xff\xfe", "not UTF-8 text")):
        image_set.write_bytes(content)
        faults = check(image_set, images)
        assert [fault.object for fault in faults] == ["file"]
        assert what in faults[0].what


def test_files_without_any_object(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path, {"a": [], "b": []})
    with pytest.raises(FaultyDataError, match="its files name no object: add what is to be learnt"):
        IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_a_list_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"there is no folder .*Annotations: a list of VOC pictures lies in ImageSets"):
        IndexedDataset(tmp_path / "train.txt", tmp_path)


@pytest.mark.parametrize(("split", "num_flat"), [("train", 1), ("val", 1), ("test", 0)])
def test_blood_cells_are_those_of_the_coco_file(data_dir: Path, tmp_path: Path, split: str, num_flat: int) -> None:
    root = data_dir / "bccd"
    ours = IndexedDataset(root / "ImageSets" / "Main" / f"{split}.txt", root / "JPEGImages", cache_dir=tmp_path)
    theirs = IndexedDataset(root / f"instances_{split}.json", root / "JPEGImages", cache_dir=tmp_path)
    rows = range(len(theirs))
    assert [ours.index.file_name(row) for row in rows] == [theirs.index.file_name(row) for row in rows]
    np.testing.assert_array_equal(ours.image_sizes, theirs.image_sizes)
    np.testing.assert_array_equal(ours.index.object_offsets, theirs.index.object_offsets)
    names = [[each.categories[label].name for label in each.index.labels] for each in (ours, theirs)]
    assert names[0] == names[1]
    # Whoever made the COCO file took VOC's first pixel for 0, so that its boxes start one pixel late.
    np.testing.assert_array_equal(ours.index.boxes + np.float32([1, 1, 0, 0]), theirs.index.boxes)
    # The degenerate box is left out of both, here with a word.
    assert ours.dropped == ({"boxes without area": num_flat} if num_flat else {})
    assert theirs.dropped == {}

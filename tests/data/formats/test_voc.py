"""Reading VOC annotations: samples, classes, and a fault with file and object for every error."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from boxwright.data.formats.check import check
from boxwright.data.formats.fault import FaultyDataError
from boxwright.data.formats.voc import image_id
from boxwright.data.indexed_dataset import IndexedDataset
from voc_files import IMAGES, annotation_xml, write_voc


def test_samples_match_the_xml_files(tmp_path: Path) -> None:
    dataset = IndexedDataset(*write_voc(tmp_path), cache_dir=tmp_path / "cache")
    assert [(category.id, category.name) for category in dataset.categories] == [(1, "ant"), (2, "zebra")]
    first, empty, last = (dataset[i] for i in range(3))
    # VOC counts pixels from 1, and a box includes its last row and column.
    assert first.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]  # difficult
    assert empty.boxes.shape == (0, 4)
    assert last.boxes.tolist() == [[4, 5, 7.5, 8]]
    assert [sample.file_name for sample in (first, empty, last)] == [f"{name}.png" for name in IMAGES]
    assert (first.image_id, empty.image_id) == (7, 2008000003)
    assert dataset.max_objects == 2
    assert pickle.loads(pickle.dumps(dataset))[0].boxes.tolist() == first.boxes.tolist()


def test_the_image_id_depends_only_on_the_name() -> None:
    assert image_id("000005") == 5
    assert image_id("2012_004331") == 2012004331
    names = [f"BloodImage_{number:05d}" for number in range(1000)] + ["5", "00005", "0000_000005", "\u0660" * 6]
    ids = [image_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(2**48 <= hashed < 2**49 for hashed in ids)


def test_all_splits_have_the_classes_of_all_xml_files(tmp_path: Path) -> None:
    train, images = write_voc(tmp_path, {"a": [("zebra", (1, 1, 9, 9), 0)]})
    val, _ = write_voc(tmp_path, {"b": [("ant", (1, 1, 9, 9), 0)]}, "val")
    sets = [IndexedDataset(split, images, cache_dir=tmp_path / "cache") for split in (train, val)]
    assert [[category.name for category in each.categories] for each in sets] == [["ant", "zebra"]] * 2
    assert [each[0].labels.tolist() for each in sets] == [[1], [0]]


def test_classes_txt_defines_classes_and_their_order(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    (tmp_path / "classes.txt").write_text("zebra\n\nbee\nant\n")
    dataset = IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")
    assert [category.name for category in dataset.categories] == ["zebra", "bee", "ant"]
    assert dataset[0].labels.tolist() == [0, 2]
    (tmp_path / "classes.txt").write_text("zebra\n")
    with pytest.raises(FaultyDataError, match=r"000007\.xml: object 2 \(ant\): classes\.txt has no class 'ant'"):
        IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_edited_files_are_read_again(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    assert len(IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].boxes) == 2
    (tmp_path / "Annotations" / "000007.xml").write_text(annotation_xml("000007", IMAGES["000007"][:1]))
    assert len(IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].boxes) == 1


@pytest.mark.parametrize(
    ("stated", "expected"), [("b.PNG", "b.PNG"), ("c.png", "b.jpg"), ("x/b.png", "b.jpg"), ("", "b.jpg")]
)
def test_the_file_name_has_the_stem_of_the_list_and_the_suffix_of_the_xml_file(
    tmp_path: Path, stated: str, expected: str
) -> None:
    image_set, images = write_voc(tmp_path, {"b": [("ant", (1, 1, 9, 9), 0)]})
    (images / "b.png").rename(images / expected)
    file = tmp_path / "Annotations" / "b.xml"
    file.write_text(file.read_text().replace("b.png", stated))
    assert IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")[0].file_name == expected


def with_element(content: str) -> str:
    """XML file of image b with one object and further content."""
    return annotation_xml("b", [("ant", (2, 3, 9, 9), 0)]).replace("</annotation>", content + "</annotation>")


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]>'
BROKEN = {
    "cut short": (with_element("")[:-30], "error: b.xml: file: not valid XML: "),
    "empty": ("", "error: b.xml: file: not valid XML: "),
    "not XML": ("{}", "error: b.xml: file: not valid XML: "),
    "unknown encoding": ('<?xml version="1.0" encoding="none"?><annotation/>', "error: b.xml: file: not valid XML: "),
    "entities": (BOMB + with_element("<a>&c;</a>"), "error: b.xml: file: not valid XML: a document type"),
    "external entity": (
        '<!DOCTYPE a SYSTEM "file:///x">' + with_element(""),
        "error: b.xml: file: not valid XML: a document",
    ),
    "another format": (
        "<svg/>",
        "error: b.xml: file: not a VOC annotation: expected the root element <annotation>, got <svg>",
    ),
    "no size": (
        with_element("").replace("size>", "sizes>"),
        "error: b.xml: image b: `size` is height missing, width missi",
    ),
    "no height": (with_element("").replace(">40<", ">0<"), "error: b.xml: image b: `size` is height 0, width 60"),
    "huge height": (with_element("").replace(">40<", f">{'9' * 5000}<"), "error: b.xml: image b: `size` is height 999"),
    "infinite": (
        annotation_xml("b", [("ant", (-1e308, 3, 1e308, 9), 0)]),
        "error: b.xml: object 1 (ant): `bbox` contains NaN or infinity. Correct `bbox`",
    ),
    "no name": (
        with_element("").replace(">ant<", "><"),
        "error: b.xml: object 1: `name` is missing. Add the class name",
    ),
    "no box": (
        with_element("")
        .replace("<bndbox><xmin>2</xmin><ymin>", "<box><xmin>2</xmin><ymin>")
        .replace("</bndbox></object>", "</box></object>"),
        "error: b.xml: object 1 (ant): `bndbox` is xmin missing, ymin missing, xmax missing, ymax missing",
    ),
    "not a number": (
        with_element("").replace(">3<", ">three<"),
        "error: b.xml: object 1 (ant): `bndbox` is xmin 2, ymin three",
    ),
    "NaN": (
        with_element("").replace("<ymin>3", "<ymin>nan"),
        "error: b.xml: object 1 (ant): `bndbox` is xmin 2, ymin nan",
    ),
    "difficult": (
        with_element("").replace("<difficult>0", "<difficult>no"),
        "error: b.xml: object 1 (ant): `difficult` is",
    ),
    "no width": (
        with_element("").replace(">9<", ">2<", 1),
        "dropped: b.xml: object 1 (ant): the box [2, 3, 2, 9] has no area. Correct the box (`bndbox`",
    ),
    "swapped corners": (
        with_element("").replace(">2<", ">12<"),
        "dropped: b.xml: object 1 (ant): the box [12, 3, 9, 9] has no a",
    ),
    "outside": (
        annotation_xml("b", [("ant", (62, 3, 70, 9), 0)]),
        "dropped: b.xml: object 1 (ant): the box [62, 3, 70, 9] is outside its image",
    ),
    "beyond": (
        annotation_xml("b", [("ant", (50, 3, 70, 9), 0)]),
        "clipped: b.xml: object 1 (ant): the box [50, 3, 70, 9] extends beyond its image",
    ),
    "another size": (
        annotation_xml("b", [("ant", (1, 3, 7, 9), 0)], size=(60, 40)),
        f"error: b.png: image {image_id('b')}: the file has 60 x 40 pixels",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_faults_name_the_file_the_object_and_the_fix(tmp_path: Path, case: str) -> None:
    content, expected = BROKEN[case]
    image_set, images = write_voc(tmp_path, {"a": [("ant", (1, 1, 9, 9), 0)], "b": []})
    (tmp_path / "Annotations" / "b.xml").write_text(content)
    faults = check(image_set, images)
    assert [
        f"{fault.severity}: {fault}".replace(f"{Path(fault.file).parent}/", "")[: len(expected)] for fault in faults
    ] == [expected]
    assert Path(faults[0].file).is_file()
    assert faults[0].fix
    if faults[0].severity == "error" and not faults[0].file.endswith(".png"):
        with pytest.raises(FaultyDataError):
            IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_faults_of_the_image_list(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path)
    image_set.write_text("000007\n000007\n../000007\nnone\n")
    (images / "000007.png").unlink()
    assert [(Path(fault.file).name, fault.object, fault.what) for fault in check(image_set, images)] == [
        ("train.txt", "image 000007", "2 lines have this name"),
        ("train.txt", "image '../000007'", "expected a name without folder"),
        ("none.xml", "image none", "the file is missing"),
        ("000007.png", "image 7", "the file is missing"),
    ]
    for content, what in ((b"\n", "the list has no image"), (b"\xff\xfe", "not UTF-8 text")):
        image_set.write_bytes(content)
        faults = check(image_set, images)
        assert [fault.object for fault in faults] == ["file"]
        assert what in faults[0].what


def test_a_data_set_without_objects_is_an_error(tmp_path: Path) -> None:
    image_set, images = write_voc(tmp_path, {"a": [], "b": []})
    with pytest.raises(FaultyDataError, match=r"no XML file has an object\. Annotate the objects"):
        IndexedDataset(image_set, images, cache_dir=tmp_path / "cache")


def test_an_image_list_without_an_annotations_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"there is no folder .*Annotations\. Move the image list to ImageSets"):
        IndexedDataset(tmp_path / "train.txt", tmp_path)


@pytest.mark.parametrize(("split", "num_flat"), [("train", 1), ("val", 1), ("test", 0)])
def test_bccd_in_voc_format_equals_bccd_in_coco_format(
    data_dir: Path, tmp_path: Path, split: str, num_flat: int
) -> None:
    root = data_dir / "bccd"
    voc = IndexedDataset(root / "ImageSets" / "Main" / f"{split}.txt", root / "JPEGImages", cache_dir=tmp_path)
    coco = IndexedDataset(root / f"instances_{split}.json", root / "JPEGImages", cache_dir=tmp_path)
    rows = range(len(coco))
    assert [voc.index.file_name(row) for row in rows] == [coco.index.file_name(row) for row in rows]
    np.testing.assert_array_equal(voc.image_sizes, coco.image_sizes)
    np.testing.assert_array_equal(voc.index.object_offsets, coco.index.object_offsets)
    names = [[each.categories[label].name for label in each.index.labels] for each in (voc, coco)]
    assert names[0] == names[1]
    # The COCO file was converted without subtracting 1 from xmin and ymin, so its boxes start one pixel late.
    np.testing.assert_array_equal(voc.index.boxes + np.float32([1, 1, 0, 0]), coco.index.boxes)
    # Both lack the degenerate box: the VOC reader drops it, and the COCO file does not contain it.
    assert voc.dropped == ({"boxes without area": num_flat} if num_flat else {})
    assert coco.dropped == {}

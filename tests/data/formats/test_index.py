"""Reading COCO annotations: contents of the index, cache, and a fault for every error."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from boxwright.data.dataset import Category
from boxwright.data.formats import index as index_module
from boxwright.data.formats import read_annotations, read_index
from boxwright.data.formats.fault import FaultyDataError
from boxwright.data.formats.index import AnnotationIndex
from coco_files import document, write


@pytest.fixture
def index(tmp_path: Path) -> AnnotationIndex:
    return read_index(write(tmp_path)[0], cache_dir=tmp_path / "cache")


def test_images_and_objects(index: AnnotationIndex) -> None:
    assert index.categories == (Category(2, "ant"), Category(90, "zebra"))
    assert [index.file_name(row) for row in range(len(index))] == ["a.png", "sub/b.png"]
    np.testing.assert_array_equal(index.image_ids, [7, 3])
    np.testing.assert_array_equal(index.image_sizes, [[40, 60], [40, 60]])
    np.testing.assert_array_equal(index.annotation_ids, [12, 11, 13, 14])
    assert [index.objects(0), index.objects(1)] == [slice(0, 1), slice(1, 4)]
    np.testing.assert_array_equal(index.boxes[:2], [[0.5, 1.5, 4.5, 6.5], [10, 5, 30, 15]])
    np.testing.assert_array_equal(index.labels, [0, 1, 0, 0])
    np.testing.assert_array_equal(index.crowd, [False, False, True, False])
    np.testing.assert_array_equal(index.areas, [20, 150.5, 40, 40])
    assert index.dropped == {}


def test_polygons_and_run_lengths(index: AnnotationIndex) -> None:
    np.testing.assert_array_equal(index.segmentation, [0, 1, 2, 2])
    assert [polygon.tolist() for polygon in index.polygons(1)] == [
        [[10, 5], [30, 5], [20, 15]],
        [[1.5, 2], [3, 4], [5, 6.25], [7, 8]],
    ]
    assert index.polygons(0) == index.polygons(2) == []
    # Annotation 13 has a list of runs, annotation 14 the same mask as COCO's characters.
    assert index.rle(2) == index.rle(3) == b"0X1hY2"
    assert index.rle(1) == b""


def test_an_index_is_pickled_as_a_path(index: AnnotationIndex) -> None:
    data = pickle.dumps(index)
    assert len(data) < 500
    unpickled = pickle.loads(data)
    assert isinstance(unpickled.boxes, np.memmap)
    np.testing.assert_array_equal(unpickled.boxes, index.boxes)


@pytest.mark.parametrize("name", ["train", "val"])
def test_the_index_equals_the_coco_api(data_dir: Path, tmp_path: Path, name: str) -> None:
    annotations = data_dir / "coco_mini" / "annotations" / f"instances_{name}2017.json"
    index, coco = read_index(annotations, cache_dir=tmp_path), COCO(str(annotations))
    assert [category.id for category in index.categories] == coco.getCatIds()
    assert len(index) == len(coco.imgs)
    for row, image_id in enumerate(index.image_ids.tolist()):
        objects = index.objects(row)
        expected = coco.imgToAnns[image_id]
        assert index.annotation_ids[objects].tolist() == [annotation["id"] for annotation in expected]
        ids = [index.categories[label].id for label in index.labels[objects]]
        assert ids == [annotation["category_id"] for annotation in expected]
        corners = np.array([annotation["bbox"] for annotation in expected]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        # Some annotated boxes are rounded and extend beyond the image by less than a pixel.
        np.testing.assert_allclose(index.boxes[objects], corners, atol=1.0)
        for object_row, annotation in zip(range(objects.start, objects.stop), expected, strict=True):
            if annotation["iscrowd"]:
                assert index.rle(object_row) == coco.annToRLE(annotation)["counts"]
            else:
                polygons = [polygon.ravel() for polygon in index.polygons(object_row)]
                outlines = np.concatenate(annotation["segmentation"]).astype(np.float32)
                assert np.array_equal(np.concatenate(polygons), outlines)


def _change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a value in the document by a path such as "images.0.width"; `KeyError` deletes it."""

    def apply(content: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        parent: Any = content
        for part in parents:
            parent = parent[part]
        if value is KeyError:
            del parent[last]
        else:
            parent[last] = value

    return apply


ERRORS = [
    ("images.0.id", "7", 'image "7"', "Expected `int`, got `str`"),
    ("images.0.id", 7.0, "image 7.0", "Expected `int`, got `float`"),
    ("images.0.id", KeyError, "image number 1", "`id` is missing"),
    ("images.0.id", 3, "image 3", "2 entries have this id"),
    ("images.0.id", 2**70, f"image {2**70}", "<="),
    ("images.0.id", -1, "image -1", ">= 0"),
    ("images.0.id", 2**53 + 1, f"image {2**53 + 1}", "<="),
    ("images.0.file_name", KeyError, "image 7", "`file_name` is missing"),
    ("images.0.file_name", None, "image 7", "Expected `str`, got `null`"),
    ("images.0.width", 0, "image 7", ">= 1"),
    ("images.0.width", float("nan"), "image 7", "Expected `int`, got `float`"),
    ("images.0", "a.png", "image number 1", 'expected a JSON object, got "a.png"'),
    ("images", [], "file", "no images"),
    ("categories", [], "file", "no categories"),
    ("categories.0.id", 2, "category 2", "2 entries have this id"),
    ("categories.0.name", "\ud800", "category 90", "not valid Unicode"),
    ("categories.0.name", "", "category 90", "length >= 1"),
    ("categories.0.name", KeyError, "category 90", "`name` is missing"),
    ("annotations", KeyError, "file", "missing required field `annotations`"),
    ("annotations.0.id", 12, "annotation 12", "2 entries have this id"),
    ("annotations.0.id", KeyError, "annotation number 1", "`id` is missing"),
    ("annotations.0.image_id", 99, "annotation 11", "no image with the id 99"),
    ("annotations.0.image_id", "3", "annotation 11", "Expected `int`, got `str`"),
    ("annotations.0.category_id", 1, "annotation 11", "no category with the id 1"),
    ("annotations.0.bbox", [1, 2, 3], "annotation 11", "length 4"),
    ("annotations.0.bbox", KeyError, "annotation 11", "`bbox` is missing"),
    ("annotations.0.bbox.2", float("nan"), "annotation 11", "`bbox` contains NaN"),
    ("annotations.0.bbox.2", float("inf"), "annotation 11", "`bbox` contains NaN or infinity"),
    ("annotations.0.bbox.1", "5", "annotation 11", "`bbox[1]`: Expected `float`, got `str`"),
    ("annotations.0.area", float("nan"), "annotation 11", "`area` contains NaN"),
    ("annotations.0.iscrowd", 2, "annotation 11", "`iscrowd`"),
    ("annotations.0.segmentation.1.3", float("nan"), "annotation 11", "`segmentation` contains NaN"),
    ("annotations.0.segmentation.1.3", "4", "annotation 11", "`segmentation[1][3]`: Expected `float`"),
    ("annotations.2.segmentation.counts", [0, 40], "annotation 13", "pixels in total, got 40"),
    ("annotations.3.segmentation.counts", "?", "annotation 14", "expected runs of"),
    ("annotations.3.segmentation.size", [60, 40], "annotation 14", "`segmentation.size` is [60, 40]"),
]


@pytest.mark.parametrize(("path", "value", "place", "what"), ERRORS)
def test_each_error_names_the_entry_and_raises(tmp_path: Path, path: str, value: Any, place: str, what: str) -> None:
    content = document()
    _change(path, value)(content)
    annotations = write(tmp_path, content)[0]
    faults = read_annotations(annotations).faults
    matching = [fault for fault in faults if fault.object.startswith(place) and what in fault.what]
    assert len(matching) == 1, faults
    assert matching[0].severity == "error"
    assert matching[0].file == str(annotations)
    assert matching[0].fix
    with pytest.raises(FaultyDataError, match="in the data set"):
        read_index(annotations, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_all_faults_are_reported_in_one_pass(tmp_path: Path) -> None:
    content = document()
    for path, value in [
        ("images.0.width", "60"),
        ("images.0.height", None),
        ("annotations.0.bbox.0", float("nan")),
        ("annotations.2.category_id", 5),
        ("categories.0.name", 3),
    ]:
        _change(path, value)(content)
    faults = read_annotations(write(tmp_path, content)[0]).faults
    messages = "\n".join(map(str, faults))
    for part in ("`width`", "`height`", "`bbox` contains NaN", "no category with the id 5", "`name`"):
        assert messages.count(part) == 1
    # Annotations that refer to an invalid image or category get no fault.
    assert len(faults) == 5


@pytest.mark.parametrize(
    ("bbox", "severity", "counted", "expected"),
    [
        ([10, 5, 0, 10], "dropped", {"boxes without area": 1}, None),
        ([10, 5, -3, 10], "dropped", {"boxes without area": 1}, None),
        ([61, 5, 10, 10], "dropped", {"boxes outside their image": 1}, None),
        ([60, 5, 10, 10], "dropped", {"boxes outside their image": 1}, None),
        ([-20, 5, 10, 10], "dropped", {"boxes outside their image": 1}, None),
        ([50, 30, 20, 20], "clipped", {"boxes clipped to their image": 1}, [50, 30, 60, 40]),
        ([-5, -6, 20, 20], "clipped", {"boxes clipped to their image": 1}, [0, 0, 15, 14]),
        ([-0.5, 0, 61, 40.25], None, {}, [0, 0, 60, 40]),
    ],
)
def test_boxes_without_visible_area_are_dropped_and_others_clipped(
    tmp_path: Path, bbox: list[float], severity: str | None, counted: dict[str, int], expected: list[float] | None
) -> None:
    content = document()
    content["annotations"][0]["bbox"] = bbox
    annotations = write(tmp_path, content)[0]
    assert [fault.severity for fault in read_annotations(annotations).faults] == ([severity] if severity else [])
    index = read_index(annotations, cache_dir=tmp_path / "cache")
    assert index.dropped == counted
    boxes = index.boxes[index.annotation_ids == 11]
    np.testing.assert_array_equal(boxes, np.zeros((0, 4)) if expected is None else [expected])


def test_invalid_polygons_are_dropped(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["segmentation"][0] = [1, 2, 3, 4]
    annotations = write(tmp_path, content)[0]
    (fault,) = read_annotations(annotations).faults
    assert fault.severity == "dropped"
    index = read_index(annotations, cache_dir=tmp_path / "cache")
    assert index.dropped == {"polygons with fewer than three points": 1}
    assert [len(polygon) for polygon in index.polygons(1)] == [4]
    content["annotations"][0]["segmentation"] = [[]]
    index = read_index(write(tmp_path, content)[0], cache_dir=tmp_path / "cache")
    assert index.polygons(1) == []
    assert index.segmentation[1] == 0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps(document())[:-200], "truncated"),
        ("", "truncated"),
        (json.dumps(document())[:100], "truncated"),
        ('{"images": [}', "not valid JSON: .*line 1 column 13"),
        ("[1, 2]", "not COCO annotations: Expected `object`, got `array`"),
        ('{"images": {}, "annotations": [], "categories": []}', "Expected `array`, got `object`"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_a_file_that_is_not_coco_is_an_error(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(FaultyDataError, match=what):
        read_index(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("old", "new", "place", "what"),
    [
        (b"a.png", "\u00e9.png".encode("latin1"), "image number 1", "can't decode byte"),
        (b"a.png", b"\\x.png", "file", "Invalid .escape"),
        (b"a.png", b"\\ud800.png", "image 7", "not valid Unicode"),
        (b"150.5", b"1e400", "annotation number 1", "out of range"),
    ],
)
def test_invalid_text_names_the_entry(tmp_path: Path, old: bytes, new: bytes, place: str, what: str) -> None:
    annotations = write(tmp_path)[0]
    annotations.write_bytes(annotations.read_bytes().replace(old, new))
    with pytest.raises(FaultyDataError, match=rf"{place}.*: .*{what}"):
        read_index(annotations, cache_dir=tmp_path / "cache")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    annotations = write(tmp_path)[0]
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    assert len(read_index(annotations, cache_dir=tmp_path / "cache")) == 2


def test_an_index_without_annotations(tmp_path: Path) -> None:
    content = document() | {"annotations": []}
    index = read_index(write(tmp_path, content)[0], cache_dir=tmp_path / "cache")
    assert index.boxes.shape == (0, 4)
    assert len(pickle.loads(pickle.dumps(index))) == 2


def test_the_message_lists_the_first_faults_and_counts_the_rest(tmp_path: Path) -> None:
    content = document()
    content["annotations"] = [{"id": number} for number in range(30)]
    with pytest.raises(FaultyDataError, match="90 faults") as caught:
        read_index(write(tmp_path, content)[0], cache_dir=tmp_path / "cache")
    assert str(caught.value).count("\n") == 11
    assert "and 80 more" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_cache_is_used_until_the_content_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write(tmp_path)[0]
    first = read_index(annotations, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.delattr(index_module, "check_columns")
        assert read_index(annotations, cache_dir=tmp_path / "cache").folder == first.folder
    content = document()
    content["annotations"][1]["category_id"] = 90
    before = annotations.stat()
    annotations.write_text(json.dumps(content))
    os.utime(annotations, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_index(annotations, cache_dir=tmp_path / "cache").labels[0] == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_cached_index_is_rebuilt(tmp_path: Path, damage: str) -> None:
    annotations = write(tmp_path)[0]
    index = read_index(annotations, cache_dir=tmp_path / "cache")
    boxes, path = np.array(index.boxes), index.folder / "boxes.npy"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -8 if damage == "cut" else 0])
    np.testing.assert_array_equal(read_index(annotations, cache_dir=tmp_path / "cache").boxes, boxes)
    assert [entry.name for entry in index.folder.parent.iterdir()] == [index.folder.name]


def test_the_cache_folder_depends_on_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write(tmp_path)[0]
    monkeypatch.delenv("BOXWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert read_index(annotations).folder.is_relative_to(tmp_path / "xdg" / "boxwright")
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "explicit"))
    assert read_index(annotations).folder.is_relative_to(tmp_path / "explicit")
    # A file instead of the folder makes it unwritable; file modes would not stop root.
    (tmp_path / "file").touch()
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert read_index(annotations).folder.is_relative_to(tmp_path / "temporary")


def _read_at(start: float, annotations: Path, cache: Path) -> int:
    time.sleep(max(0.0, start - time.time()))
    return len(read_index(annotations, cache_dir=cache).boxes)


def test_two_processes_build_an_index_at_the_same_time(tmp_path: Path) -> None:
    annotations = write(tmp_path)[0]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        start = time.time() + 1.5
        jobs = [pool.submit(_read_at, start, annotations, tmp_path / "cache") for _ in range(2)]
        assert [job.result() for job in jobs] == [4, 4]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


def test_a_box_that_overflows_is_dropped_without_a_warning(tmp_path: Path) -> None:
    content = document()
    content["annotations"][1] |= {"bbox": [1e308, 1e308, 1e308, 1e308], "area": 1}
    (fault,) = read_annotations(write(tmp_path, content)[0]).faults
    assert "is outside its image of 60 x 40 pixels" in fault.what
    assert fault.severity == "dropped"

"""`check` reports faults of annotations, file names and image files in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from boxwright.data.formats import find_layout
from boxwright.data.formats.check import check
from boxwright.data.formats.fault import Fault, FaultyDataError
from boxwright.data.indexed_dataset import IndexedDataset
from coco_files import document, write


def test_a_valid_data_set_has_no_faults(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert check(*write(tmp_path), progress=lambda done, total: calls.append((done, total))) == []
    assert calls == [(1, 2), (2, 2)]


def test_all_kinds_of_faults_are_reported_together(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    content["annotations"][1]["bbox"] = [1, 2, 0, 4]
    content["images"] += [
        {"id": 20, "file_name": "none.png", "width": 5, "height": 5},
        {"id": 21, "file_name": "../none.png", "width": 5, "height": 5},
        {"id": 22, "file_name": "broken.png", "width": 60, "height": 40},
        {"id": 23, "file_name": "sub/b.png", "width": 40, "height": 60},
    ]
    annotations, images = write(tmp_path, content)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:-30])
    faults = check(annotations, images)
    assert [(fault.object, fault.severity) for fault in faults] == [
        ("annotation 11 (image 3)", "error"),
        ("annotation 12 (image 7)", "dropped"),
        ("image 20", "error"),
        ("image 21", "error"),
        ("image 22", "error"),
        ("image 23", "error"),
    ]
    assert faults[4].file == str(images / "broken.png")
    assert all(fault.what and fault.fix for fault in faults)


def test_the_deprecated_name_of_the_fix_works() -> None:
    fault = Fault("a.json", "image 7", "the file is missing", "Add the file")
    assert fault.mend == fault.fix == "Add the file"
    assert str(fault) == "a.json: image 7: the file is missing. Add the file"


def test_images_above_the_pixel_limit_are_faults(tmp_path: Path) -> None:
    faults = check(*write(tmp_path), max_pixels=2399)
    assert [fault.object for fault in faults] == ["image 7", "image 3"]


def test_truncated_json_is_reported(tmp_path: Path) -> None:
    annotations, images = write(tmp_path)
    annotations.write_text(annotations.read_text()[:-5])
    (fault,) = check(annotations, images)
    assert "the JSON is truncated" in fault.what


@pytest.mark.parametrize("name", ["coco_mini", "bccd", "nuclei"])
def test_public_data_sets_have_no_faults(data_dir: Path, name: str) -> None:
    assert check(*find_layout(data_dir / name)["val"]) == []


def test_broken_and_circular_links_are_missing_files(tmp_path: Path) -> None:
    annotations, images = write(tmp_path)
    (images / "a.png").unlink()
    (images / "a.png").symlink_to("a.png")
    (images / "sub" / "b.png").unlink()
    (images / "sub" / "b.png").symlink_to("none.png")
    faults = check(annotations, images)
    assert [(fault.object, fault.what) for fault in faults] == [
        ("image 7", "the file is missing"),
        ("image 3", "the file is missing"),
    ]
    with pytest.raises(FaultyDataError, match="2 faults"):
        IndexedDataset(annotations, images)


def test_a_folder_name_that_is_too_long_is_a_missing_file(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["file_name"] = "a" * 300 + "/a.png"
    (fault,) = check(*write(tmp_path, content))
    assert (fault.object, fault.what) == ("image 7", "the file is missing")

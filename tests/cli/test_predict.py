"""`boxwright predict` draws detections, keeps subfolders, overwrites no input and skips unreadable files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.cli.predict import name_outputs
from boxwright.data.dataset import Category
from boxwright.data.decode import decode_image
from boxwright.data.masks import Masks
from boxwright.detectors.rcnn import RCNN
from boxwright.predictor import Prediction, Predictor
from small_model import detect_with_masks, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), [Category(id=4, name="cell"), Category(id=2, name="dust")])


def test_a_folder_with_an_unreadable_file(run: Path, data_dir: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    first, second, third = sorted((data_dir / "bccd" / "JPEGImages").iterdir())[:3]
    for name, source in {"a/x.jpg": first, "b/x.jpg": second, "b/deep/Y.JPG": third}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    cv2.imwrite(str(folder / "b" / "x.png"), np.zeros((40, 50, 3), dtype=np.uint8))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    for _ in range(2):  # the second time, files that the first call wrote are not inputs
        arguments = ["predict", str(run), str(folder), "--out", str(out), "--score", "0", "--device", "cpu"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, result.output
        assert "broken.jpg" in result.stderr
        assert "4 images" in result.stdout
        assert "1 failed" in result.stdout
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {"a/x.jpg", "b/x.jpg", "b/x.png", "b/deep/Y.JPG", "detections.json"}
    assert decode_image(out / "a" / "x.jpg").shape == (480, 640, 3)
    rows = json.loads((out / "detections.json").read_text())
    assert set(rows[0]) == {"file_name", "image_id", "category_id", "category_name", "bbox", "score"}
    assert {row["file_name"] for row in rows} >= {"a/x.jpg", "b/x.jpg", "b/deep/Y.JPG"}
    assert len({row["image_id"] for row in rows}) == len({row["file_name"] for row in rows})
    assert {(row["category_id"], row["category_name"]) for row in rows} <= {(4, "cell"), (2, "dust")}


def test_masks_are_drawn_and_written(
    run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = min((data_dir / "bccd" / "JPEGImages").iterdir())
    arguments = ["predict", str(run), str(source), "--score", "0", "--device", "cpu", "--out"]
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "boxes")]).exit_code == 0
    monkeypatch.setattr(RCNN, "detect", detect_with_masks)
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "masks")]).exit_code == 0
    boxes, rows = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("boxes", "masks"))
    assert [row["bbox"] for row in rows] == [row["bbox"] for row in boxes]
    masks = Masks.of([row["segmentation"]["counts"].encode() for row in rows], rows[0]["segmentation"]["size"])
    assert rows
    for row, mask in zip(rows, masks, strict=True):
        assert mask.shape == (480, 640)
        x, y, width, height = row["bbox"]
        assert mask.sum() == mask[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1].sum()
    without, drawn = (decode_image(tmp_path / name / source.name) for name in ("boxes", "masks"))
    assert (without != drawn).any()


def test_input_images_are_not_overwritten(run: Path, data_dir: Path, tmp_path: Path) -> None:
    source = min((data_dir / "bccd" / "JPEGImages").iterdir())
    copy = Path(shutil.copy(source, tmp_path / "x.jpg"))
    result = CliRunner().invoke(app, ["predict", str(run), str(copy), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "would be overwritten" in result.stderr
    assert copy.read_bytes() == source.read_bytes()


def test_native_and_a_single_file(run: Path, data_dir: Path, tmp_path: Path) -> None:
    source = min((data_dir / "bccd" / "JPEGImages").iterdir())
    arguments = ["predict", str(run), str(source), "--out", str(tmp_path), "--native", "--score", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert (tmp_path / source.name).exists()


def test_equal_names_are_numbered() -> None:
    names = [Path("x.jpg"), Path("X.jpg"), Path("x.jpg"), Path("x-2.jpg"), Path("a/x.jpg"), Path("x.gif")]
    written = [path.as_posix() for path in name_outputs(names, Path("out"))]
    assert written == ["out/x.jpg", "out/X-2.jpg", "out/x-3.jpg", "out/x-2-2.jpg", "out/a/x.jpg", "out/x.gif.jpg"]


def test_broken_links_fail_and_names_that_are_not_utf8_are_escaped(run: Path, data_dir: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "nowhere.jpg").symlink_to("none.jpg")
    shutil.copy(min((data_dir / "bccd" / "JPEGImages").iterdir()), os.fsencode(folder) + b"/\xff.jpg")
    arguments = ["predict", str(run), str(folder), str(folder / "circle.jpg"), "--out", str(out), "--score", "0"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "1 image," in result.stdout
    assert "2 failed" in result.stdout
    assert {row["file_name"] for row in json.loads((out / "detections.json").read_text())} == {"\ufffd.jpg"}


def test_an_unknown_device_is_an_error(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(run), str(tmp_path), "--out", "out", "--device", "gpu"])
    assert result.exit_code == 1
    (tmp_path / "a.jpg").touch()
    result = CliRunner().invoke(app, ["predict", str(run), str(tmp_path), "--out", "out", "--device", "gpu"])
    assert "boxwright: device: expected cpu, cuda or cuda:N, got 'gpu'" in result.stderr


def test_an_image_whose_drawing_cannot_be_written_is_skipped(run: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (48, 32)).save(folder / name)
    Image.new("RGB", (40, 16_500)).save(folder / "b.webp", "PNG")
    arguments = ["predict", str(run), str(folder), "--out", str(out), "--score", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert re.search(
        r"boxwright: .*b\.webp: an image of .* cannot be written as \.webp: WebP holds at most", result.stderr
    )
    assert "1 failed" in result.stdout
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "detections.json"}
    assert {row["file_name"] for row in json.loads((out / "detections.json").read_text())} == {"a.png", "c.png"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_detections_before_an_interrupt_or_an_error_are_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    predict, calls = Predictor.predict, []

    def predict_once(self: Predictor, image: np.ndarray, **options: Any) -> Prediction:
        calls.append(image)
        if len(calls) > 1:
            raise error
        return predict(self, image, **options)

    monkeypatch.setattr(Predictor, "predict", predict_once)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 32)).save(folder / name)
    arguments = ["predict", str(run), str(folder), "--out", str(out), "--score", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert {row["file_name"] for row in json.loads((out / "detections.json").read_text())} == {"a.png"}
    if isinstance(error, RuntimeError):
        assert "b.png: prediction failed" in result.stderr

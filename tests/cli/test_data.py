"""`boxwright data`, and options and errors of all commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import boxwright
from boxwright.cli.main import app
from coco_files import document, write

run = CliRunner().invoke


def test_check_of_a_valid_folder(tmp_path: Path) -> None:
    write(tmp_path)
    result = run(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 0
    assert "train: " in result.stdout
    assert "no faults" in result.stdout


def test_check_lists_faults_with_file_id_and_fix(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"][0] = float("nan")
    content["annotations"][1]["bbox"] = [70, 2, 3, 4]
    annotations, images = write(tmp_path, content)
    (images / "a.png").unlink()
    result = run(app, ["data", "check", "--annotations", str(annotations), "--images", str(images)])
    assert result.exit_code == 1
    assert (
        f"error: {annotations}: annotation 11 (image 3): `bbox` contains NaN or infinity. Correct `bbox`"
        in result.stdout
    )
    assert f"dropped: {annotations}: annotation 12 (image 7): the box [70, 2, 3, 4] is outside" in result.stdout
    assert f"error: {images / 'a.png'}: image 7: the file is missing. Add the file" in result.stdout
    assert "2 errors, 1 dropped" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "there is no such folder"),
        (["{}"], "the folder is not in a known format (COCO, VOC)"),
        ([], "use either a folder, or --annotations"),
        (["--annotations", "{}/a.json"], "use either a folder, or --annotations"),
        (["--annotations", "{}/a.json", "--images", "{}"], "a.json"),
    ],
)
def test_errors_are_one_line_and_status_1(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(app, ["data", "check", *(argument.format(tmp_path) for argument in arguments)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("boxwright: ")
    assert result.stderr.count("\n") == 1


def test_traceback_if_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_TRACEBACK", "1")
    assert isinstance(run(app, ["data", "check", str(tmp_path)]).exception, ValueError)


def test_shapes(tmp_path: Path) -> None:
    result = run(app, ["data", "shapes", str(tmp_path / "new"), "--train", "2", "--val", "1", "--seed", "5"])
    assert result.exit_code == 0
    images = json.loads((tmp_path / "new/annotations/instances_train.json").read_text())["images"]
    assert len(images) == 2
    assert run(app, ["data", "check", str(tmp_path / "new")]).exit_code == 0
    assert run(app, ["data", "shapes", str(tmp_path / "new")]).exit_code == 1


def test_version() -> None:
    assert run(app, ["--version"]).stdout == f"boxwright {boxwright.__version__}\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; import boxwright.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_warnings_of_pillow_are_hidden(tmp_path: Path) -> None:
    content = document()
    content["images"][0] |= {"file_name": "wide.png"}
    annotations, images = write(tmp_path, content)
    Image.new("1", (90_000, 1_000)).save(images / "wide.png")
    command = ["data", "check", "--annotations", str(annotations), "--images", str(images)]
    result = subprocess.run([sys.executable, "-m", "boxwright", *command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert "error: " in result.stdout
    assert "image is too large (90000 x 1000 pixels" in result.stdout

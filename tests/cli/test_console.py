"""Names that users choose are printed literally, even if they are markup of rich or HTML."""

from __future__ import annotations

import io
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from boxwright.cli.console import ImageProgress, print_table
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.weights import fetch
from small_model import small_run

NAMES = ["x[/]", "[bold]y", "stop[red]", ":car:", "</script><b>", "a\"'&{z}", "[link=http://a]c"]


def test_class_names_are_printed_and_reported_as_they_are(tmp_path: Path) -> None:
    categories = [Category(id=i, name=name) for i, name in enumerate(NAMES, 1)]
    run = small_run(tmp_path / "run", categories)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(images / "[red].png")
    annotations = {
        "images": [{"id": 1, "file_name": "[red].png", "width": 64, "height": 48}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": i, "bbox": [i, i, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(1, len(NAMES) + 1)
        ],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
    }
    (tmp_path / "[val].json").write_text(json.dumps(annotations))
    arguments = ["test", str(run), "--annotations", str(tmp_path / "[val].json"), "--images", str(images)]
    result = CliRunner().invoke(app, [*arguments, "--workers", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (report_file,) = (run / "evaluation").glob("*/report.html")
    report = report_file.read_text()
    for name in NAMES:
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines()), name
        assert escape(name) in report
    for name in NAMES[4:6]:
        assert name not in report


def test_a_table_prints_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["[class]", "n"], [[name, "1"] for name in NAMES])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["[class]", "n"], *([*name.split(), "1"] for name in NAMES)]


@pytest.mark.parametrize("name", ["[/red]", "{x}: proposing"])
def test_progress_shows_names_of_splits_and_files_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr("rich.get_console", lambda: Console(file=output, force_terminal=True, width=120))
    monkeypatch.setattr("rich.progress.get_console", lambda: Console(file=output, force_terminal=True, width=120))
    with ImageProgress(name, 2, 1, shown=True) as progress:
        progress.advance(2)
    assert name in output.getvalue()


def test_a_download_shows_its_file_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=120)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with fetch._progress_bar("weights[/bold].pth") as progress:
        progress(1, 2)
    assert "weights[/bold].pth" in output.getvalue()

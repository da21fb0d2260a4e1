"""`boxwright benchmark` prints tables and writes files, errors are one line; `zoo page` writes the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from boxwright.benchmark.report import read_report
from boxwright.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_prints_tables_and_writes_files(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("x.json", "x.md")]
    code, out, _ = run(
        *("benchmark", "rpn_r18_fpn_small", "retinanet_r18_fpn_small", "--phases", "infer", "--size", "64x96"),
        *("--iterations", "1", "--warmup", "0", "--json", files[0], "--markdown", files[1], "--device", "cpu"),
        *("--set", "model.backbone.channels=32"),
    )
    assert code == 0
    report = read_report(Path(files[0]))
    assert [t.case.recipe for t in report.timings] == ["rpn_r18_fpn_small", "retinanet_r18_fpn_small"]
    assert report.timings[0].case.settings == ["model.backbone.channels=32"]
    assert report.timings[0].case.size == (64, 96)
    assert out == Path(files[1]).read_text("utf-8")
    assert report.machine["processor"] in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "big"), "--size: expected HEIGHTxWIDTH"),
        (("--phases", "training"), "there is no phase 'training'"),
        (("--precision", "half"), "there is no precision 'half'"),
        (("--against", "detectron2"), "--peer-python"),
        (("--set", "optimizer.speed=3"), "speed"),
    ],
)
def test_errors_are_one_line(words: tuple[str, ...], message: str) -> None:
    code, _, error = run("benchmark", "rpn_r18_fpn_small", *words)
    assert code == 1
    assert error.startswith("boxwright: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_committed_page_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("BOXWRIGHT_ZOO", raising=False)
    out = tmp_path / "benchmark.md"
    code, printed, _ = run("zoo", "page", "--out", str(out))
    assert (code, printed.strip()) == (0, str(out))
    assert out.read_text("utf-8") == (ROOT / "docs" / "model_zoo" / "benchmark.md").read_text("utf-8"), (
        "run: boxwright zoo page --out docs/model_zoo/benchmark.md"
    )


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    code, _, error = run("zoo", "page", "--out", str(tmp_path / "x.md"), "--measured", str(tmp_path / "none"))
    assert code == 1
    assert "folder not found" in error

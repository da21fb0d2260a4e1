from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.data.shapes import write_shapes
from boxwright.weights.ours import load_weights
from voc_files import write_voc

TINY = "training.runs:tiny_experiment"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, train=12, val=5)
    return folder


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.output


def test_trains_evaluates_and_reports(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    status, output = run(TINY, "--data", shapes, "--out", out, "--set", "epochs=2", "--workers", "0")
    assert status == 0, output
    assert f"train: {shapes / 'annotations' / 'instances_train.json'}, images in {shapes / 'train'}" in output
    assert re.search(r"train: \d+ images \(0 empty\), \d+ objects \| val: \d+ images", output)
    tensors, metadata = load_weights(out / "weights.safetensors")
    assert "body.weight" in tensors
    assert [category["id"] for category in metadata["categories"]] == [1, 2, 3]
    assert metadata["experiment"]["arguments"]["epochs"] == 2
    assert metadata["versions"]["torch"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3, 6]
    assert "AP50" in lines[-1]["metrics"]
    assert "Loss" in (out / "report.html").read_text()
    folder = out / "evaluation" / "val"
    assert (folder / "results.json").is_file()
    assert (folder / "report.html").read_bytes() == (out / "report.html").read_bytes()
    evaluation = json.loads((folder / "evaluation.json").read_bytes())
    assert (evaluation["data"], evaluation["split"], evaluation["step"]) == (shapes.name, "val", 6)
    assert evaluation["metrics"] == pytest.approx(lines[-1]["metrics"])
    assert "--data" in json.loads((out / "experiment.json").read_text())["command"] or sys.argv
    # As if the run was killed between its last evaluation and its report: --resume writes the report.
    (out / "report.html").unlink()
    status, output = run(TINY, "--data", shapes, "--out", out, "--set", "epochs=2", "--workers", "0", "--resume")
    assert status == 0, output
    assert (out / "report.html").is_file()


def test_several_folders_are_trained_on_together(shapes: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "run"
    write_shapes(other, train=8, val=3, seed=1)
    arguments = ["--data", shapes, "--data", other, "--out", out, "--set", "epochs=1", "--workers", "0"]
    status, output = run(TINY, *arguments)
    assert status == 0, output
    assert output.count("train: ") == 3
    assert output.count("val: ") == 2
    assert re.search(r"train: 20 images .* \| val: 5 images", output)
    assert json.loads((out / "experiment.json").read_text())["steps_per_epoch"] == 5


def test_folders_with_other_classes_or_without_train_split_are_errors(shapes: Path, tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {name: [("ant", (1, 1, 30, 30), 0)] for name in "ab"})
    status, output = run(TINY, "--data", shapes, "--data", tmp_path / "voc", "--out", tmp_path / "run")
    assert (status, output.count("Only in")) == (1, 2)
    assert f"Only in {shapes / 'annotations' / 'instances_train.json'} (3 categories): circle" in output
    write_voc(tmp_path / "no_train", split="test")
    status, output = run(TINY, "--data", shapes, "--data", tmp_path / "no_train")
    assert (status, len(output.splitlines())) == (1, 1)
    assert f"{tmp_path / 'no_train'} has no train split" in output


def test_trains_on_voc_files(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {name: [("ant", (1, 1, 30, 30), 0)] for name in "abcd"})
    status, output = run(TINY, "--data", tmp_path / "voc", "--out", tmp_path / "run", "--workers", "0")
    assert status == 0, output
    assert "train: 4 images (0 empty), 4 objects" in output


def test_show_prints_the_experiment() -> None:
    status, output = run(TINY, "--set", "optimizer.lr=0.5", "--show")
    assert status == 0
    assert "lr = 0.5" in output


def test_errors_are_one_line(shapes: Path, tmp_path: Path) -> None:
    status, output = run(TINY, "--out", tmp_path)
    assert (status, len(output.splitlines())) == (1, 1)
    assert "--data" in output
    status, output = run(TINY, "--data", shapes, "--set", "optimizer.lrr=1")
    assert (status, len(output.splitlines())) == (1, 1)
    assert "did you mean 'lr'" in output
    status, output = run(TINY, "--train-images", tmp_path)
    assert (status, len(output.splitlines())) == (1, 1)
    assert "--train-annotations" in output


def test_a_model_that_cannot_be_rebuilt_is_an_error_before_the_first_step(shapes: Path, tmp_path: Path) -> None:
    status, output = run("training.own_parts:experiment_of_a_lambda", "--data", shapes, "--out", tmp_path / "run")
    assert status == 1
    assert "model.backbone: training.own_parts.experiment_of_a_lambda.<locals>.<lambda> cannot be imported" in " ".join(
        output.split()
    )
    assert not (tmp_path / "run").exists()


def test_init_classes_needs_init() -> None:
    status, output = run(TINY, "--init-classes")
    assert status == 1
    assert "--init-classes needs --init WEIGHTS" in " ".join(output.split())


def test_sigterm_saves_a_checkpoint_and_sets_the_exit_status(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tests = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "boxwright", "train", TINY, "--data", str(shapes), "--out", str(out)]
        + ["--set", "epochs=5000", "--workers", "1", "--log-every", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in output
    assert list((out / "checkpoints").glob("step_*"))

"""`boxwright test` prints metrics and writes results and a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.detectors.rcnn import RCNN
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.results import read_results
from boxwright.evaluation.voc import Interpolation, voc_metrics
from small_model import detect_with_masks, small_run

CELLS = [Category(id=1, name="RBC"), Category(id=2, name="WBC"), Category(id=3, name="Platelets")]


@pytest.fixture
def few_cells(data_dir: Path, tmp_path: Path) -> Path:
    """Data set of the first six validation images of BCCD."""
    source = data_dir / "bccd"
    annotations = json.loads((source / "instances_val.json").read_text())
    annotations["images"] = annotations["images"][:6]
    image_ids = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [
        annotation for annotation in annotations["annotations"] if annotation["image_id"] in image_ids
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "instances_val.json").write_text(json.dumps(annotations))
    (folder / "JPEGImages").symlink_to(source / "JPEGImages")
    return folder


def test_metrics_results_and_report(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", CELLS[::-1])  # the same names in another order
    arguments = ["test", str(run), "--data", str(few_cells), "--workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("AP50", "ARl", "Platelets", "objects", "results.json", "report.html"):
        assert word in result.stdout
    dataset = IndexedDataset(few_cells / "instances_val.json", few_cells / "JPEGImages")
    results = read_results(run / "evaluation" / "val" / "results.json", dataset.categories, dataset.image_ids.tolist())
    assert len(results)
    summary = coco_metrics(dataset, results).summary
    assert f"AR100 {100 * summary['AR100']:.1f}" in result.stdout
    assert "<h2>Worst images</h2>" in (run / "evaluation" / "val" / "report.html").read_text()


@pytest.mark.parametrize("metric", ["voc07", "voc12"])
def test_voc_metrics(few_cells: Path, tmp_path: Path, metric: Interpolation) -> None:
    run = small_run(tmp_path / "run", CELLS)
    arguments = ["test", str(run), "--data", str(few_cells), "--workers", "0", "--device", "cpu", "--metric", metric]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    dataset = IndexedDataset(few_cells / "instances_val.json", few_cells / "JPEGImages")
    folder = run / "evaluation" / f"val_{metric}"
    results = read_results(folder / "results.json", dataset.categories, dataset.image_ids.tolist())
    expected = voc_metrics(dataset, results, interpolation=metric)
    assert f"mAP of {metric} {100 * expected.mean:.1f}" in result.stdout
    for category, count, value in zip(expected.categories, expected.num_objects, expected.per_class, strict=True):
        assert f"{category.name} {count} {100 * value:.1f}" in " ".join(result.stdout.split())
    report = (folder / "report.html").read_text()
    assert "<h2>Pascal VOC</h2>" in report
    assert f"<b>{100 * expected.mean:.1f}</b><span>mAP</span>" in report


def test_proposals_have_no_voc_metrics(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", CELLS, proposals=True)
    result = CliRunner().invoke(app, ["test", str(run), "--data", str(few_cells), "--metric", "voc07"])
    assert result.exit_code == 1
    assert "is an RPN, whose proposals are evaluated by recall" in result.stderr


def test_masks_are_evaluated_and_printed(few_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RCNN, "detect", detect_with_masks)
    file = few_cells / "instances_val.json"
    annotations = json.loads(file.read_text())
    for annotation in annotations["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    file.write_text(json.dumps(annotations))
    run = small_run(tmp_path / "run", CELLS)
    arguments = ["test", str(run), "--data", str(few_cells), "--workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    shown = re.split(r"^masks ", result.stdout, flags=re.MULTILINE)[1]
    dataset = IndexedDataset(file, few_cells / "JPEGImages")
    folder = run / "evaluation" / "val"
    results = read_results(folder / "results.json", dataset.categories, dataset.image_ids.tolist())
    metrics = coco_metrics(dataset, results)
    assert metrics.masks is not None
    assert metrics.masks.summary["AR100"] > 0
    assert f"AR100 {100 * metrics.masks.summary['AR100']:.1f}" in shown
    assert "<h3>Masks</h3>" in (folder / "report.html").read_text()


def test_all_detections_of_the_model_are_evaluated(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", CELLS, max_detections=150)
    arguments = ["test", str(run), "--data", str(few_cells), "--workers", "0", "--device", "cpu"]
    assert "AR150" in CliRunner().invoke(app, arguments).stdout
    assert "AR120" in CliRunner().invoke(app, [*arguments, "--max-detections", "120"]).stdout


def test_each_evaluation_has_its_own_folder(few_cells: Path, tmp_path: Path) -> None:
    """Another split, data set or option has another folder. Only the same evaluation replaces a folder."""
    run = small_run(tmp_path / "run", CELLS)
    (run / "report.html").write_text("the report of training")
    annotations = json.loads((few_cells / "instances_val.json").read_text())
    annotations["images"] = annotations["images"][:2]
    annotations["annotations"] = [
        annotation
        for annotation in annotations["annotations"]
        if annotation["image_id"] in {1, annotations["images"][0]["id"]}
    ]
    (few_cells / "instances_test.json").write_text(json.dumps(annotations))
    other = few_cells.with_name("other")
    other.mkdir()
    (other / "instances_val.json").write_text(json.dumps(annotations))
    (other / "JPEGImages").symlink_to(few_cells / "JPEGImages")
    options = ["--workers", "0", "--device", "cpu"]

    def measure(*words: object) -> Path:
        result = CliRunner().invoke(app, ["test", str(run), *map(str, words), *options])
        assert result.exit_code == 0, result.output
        return Path(result.stdout.splitlines()[-1]).parent

    val = measure("--data", few_cells)
    first = (val / "report.html").read_bytes()
    folders = [
        val,
        measure("--data", few_cells, "--split", "test"),
        measure("--data", other),
        measure("--data", few_cells, "--precision", "bfloat16"),
        measure("--data", few_cells, "--max-detections", 50),
        measure("--annotations", other / "instances_val.json", "--images", other / "JPEGImages"),
    ]
    names = ["val", "test", "other_val", "val_bfloat16", "data_val", "instances_val"]
    assert folders == [run / "evaluation" / name for name in names]
    assert (val / "report.html").read_bytes() == first
    assert (run / "report.html").read_text() == "the report of training"
    assert measure("--data", few_cells) == val
    about = [json.loads((folder / "evaluation.json").read_bytes()) for folder in folders]
    assert [each["split"] for each in about] == ["val", "test", "val", "val", "val", "instances_val"]
    assert [each["data"] for each in about] == ["data", "data", "other", "data", "data", "instances_val.json"]
    assert about[0]["metrics"] != about[1]["metrics"]
    assert "test</dd>" in (folders[1] / "report.html").read_text()


def test_proposals(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", CELLS, proposals=True)
    out = tmp_path / "out"
    arguments = ["test", str(run), "--data", str(few_cells), "--workers", "0", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "AR@1000" in result.stdout
    assert (out / "results.json").exists()
    assert (out / "report.html").exists()


def test_other_categories_are_an_error_that_lists_both(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [*CELLS[:2], Category(id=3, name="dust")])
    result = CliRunner().invoke(app, ["test", str(run), "--data", str(few_cells), "--device", "cpu"])
    assert result.exit_code == 1
    assert "Only in the model (3 categories): dust" in result.stderr
    assert "Only in the data set (3 categories): Platelets" in result.stderr
    result = CliRunner().invoke(app, ["test", str(run), "--data", str(few_cells), "--split", "test"])
    assert "no split 'test'; it has val" in result.stderr


def test_detections_of_several_views_are_merged(few_cells: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", CELLS)
    arguments = [
        "test",
        str(run),
        "--data",
        str(few_cells),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--tta-short",
        "96,128",
    ]
    result = CliRunner().invoke(app, [*arguments, "--tta"])
    assert result.exit_code == 0, result.output
    assert (
        "short sides 96, 96 mirrored, 128, 128 mirrored" in (run / "evaluation" / "val_tta" / "report.html").read_text()
    )
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "need --tta" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "--tta", "--tta-short", "96,high"])
    assert "--tta-short: expected short sides in pixels" in result.stderr
    proposals = small_run(tmp_path / "rpn", CELLS, proposals=True)
    result = CliRunner().invoke(app, ["test", str(proposals), "--data", str(few_cells), "--device", "cpu", "--tta"])
    assert "--tta: " in result.stderr


def test_a_model_at_a_url_needs_out() -> None:
    result = CliRunner().invoke(app, ["test", "http://models.example/mine.safetensors", "--data", "anywhere"])
    assert result.exit_code == 1
    assert "use --out" in result.stderr

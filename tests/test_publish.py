"""A published model loads with equal detections, and its model card has the metrics of the run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

import boxwright
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.data.shapes import write_shapes
from boxwright.publish import About, publish
from boxwright.report.evaluations import Evaluation
from boxwright.weights.ours import load_weights
from small_model import small_run
from weights.hosts import serve, whole

ABOUT = About(name="cells", licence="CC-BY-4.0", data='BCCD: "train", val | test')
COMMAND = "boxwright train small --data bccd"
FIGURES = {"AP": 0.41234, "AP50": 0.7, "AP_large": -1.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was evaluated at steps 6 and 12, its last."""
    folder = small_run(tmp_path / "cells", [Category(id=4, name="cell"), Category(id=2, name="größe")])
    experiment = {"experiment": {}, "command": COMMAND, "versions": {"boxwright": "0"}}
    (folder / "experiment.json").write_text(json.dumps(experiment), "utf-8")
    lines = [
        {"kind": "evaluation", "step": 6, "metrics": {"AP": 0.1}},
        {"kind": "evaluation", "step": 12, "metrics": FIGURES},
        {"kind": "train", "step": 12, "total": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (folder / "results.json").write_text("[]", "utf-8")
    (folder / "checkpoints" / "step_12").mkdir(parents=True)
    (folder / "checkpoints" / "step_12" / "optimizer.safetensors").write_bytes(b"momenta")
    return folder


def header_of(card: Path) -> dict:
    return yaml.safe_load(card.read_text("utf-8").split("---\n")[1])


def test_names_and_contents(run: Path, tmp_path: Path) -> None:
    files = publish(run, tmp_path / "out", ABOUT)
    weights, results, log, card = files
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)
    match = re.fullmatch(r"cells_(20\d{6})-([0-9a-f]{8})\.safetensors", weights.name)
    assert match
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert sha256.startswith(match[2])
    assert results.name == f"cells_{match[1]}_results.json"
    assert results.read_text() == "[]"
    assert log.name == f"cells_{match[1]}_log.jsonl"
    assert log.read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert sha256 in card.read_text("utf-8")
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
    with safe_open(run / "weights.safetensors", "pt") as file:
        assert names == set(file.keys())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_loads_back_by_path_folder_and_url(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    weights = publish(run, tmp_path / "out", ABOUT)[0]
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    expected = boxwright.load(run).predict(image)
    assert len(expected)
    with serve() as host:
        url = host.answer(weights.name, whole(weights.read_bytes()))
        for place in (weights, weights.parent, url):
            model = boxwright.load(place)
            actual = model.predict(image)
            np.testing.assert_array_equal(actual.boxes, expected.boxes)
            np.testing.assert_array_equal(actual.scores, expected.scores)
            assert actual.names == expected.names
            assert model.metadata["metrics"] == FIGURES
            assert (model.metadata["licence"], model.metadata["data"]) == (ABOUT.licence, ABOUT.data)
            assert model.metadata["step"] == 12
        # A file that was changed by the host does not have the hash in its name.
        host.answer(weights.name, whole(weights.read_bytes()[:-1] + b"?"))
        monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "other"))
        with pytest.raises(OSError, match="SHA-256 mismatch"):
            boxwright.load(url)


def test_the_card_has_metrics_data_and_command(run: Path, tmp_path: Path) -> None:
    card = publish(run, tmp_path / "out", ABOUT)[-1]
    header = header_of(card)
    assert header["license"] == "cc-by-4.0"
    assert header["library_name"] == "boxwright"
    assert header["pipeline_tag"] == "object-detection"
    (entry,) = header["model-index"]
    assert entry["name"] == "cells"
    assert entry["results"][0]["dataset"]["name"] == f"{ABOUT.data} (val)"
    measured = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert measured == {"AP": 41.2, "AP50": 70.0}  # AP_large is undefined without large objects
    text = card.read_text("utf-8")
    for part in (COMMAND, ABOUT.data, "CC-BY-4.0", "| AP | 41.2 |", "cell, größe", "12 steps", "boxwright 0"):
        assert part in text


def test_huggingface_hub_reads_the_card(run: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(publish(run, tmp_path / "out", ABOUT)[-1]).data
    assert data.model_name == "cells"
    assert data.license == "cc-by-4.0"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"AP": 41.2, "AP50": 70.0}


def test_metrics_and_results_of_other_weights_are_omitted(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 6, "metrics": {"AP": 0.1}}\n', "utf-8")
    os.utime(run / "results.json", (1, 1))
    files = publish(run, tmp_path / "out", ABOUT)
    assert [path.suffix for path in files] == [".safetensors", ".jsonl", ".md"]
    assert "model-index" not in header_of(files[-1])
    assert "Not evaluated." in files[-1].read_text("utf-8")
    assert boxwright.load(files[0]).metadata["metrics"] == {}


def evaluate(run: Path, name: str, split: str, ap: float, weights: str | None = None) -> None:
    """Write an evaluation into a run."""
    folder = run / "evaluation" / name
    folder.mkdir(parents=True)
    actual = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    Evaluation(
        data="streets", split=split, annotations=f"/{name}.json", step=12, weights=weights or actual, metrics={"AP": ap}
    ).write(folder)
    (folder / "results.json").write_text(json.dumps([name]))


def test_every_evaluation_is_published_under_its_own_name(run: Path, tmp_path: Path) -> None:
    """The validation comes first. Evaluations of other weights are omitted."""
    evaluate(run, "test", "test", 0.25)
    evaluate(run, "val", "val", 0.5)
    evaluate(run, "old", "old", 0.75, weights="0" * 64)
    weights, *others, _, card = publish(run, tmp_path / "out", ABOUT)
    assert [path.name[14:] for path in others] == ["_results.json", "_results_test.json"]
    assert [json.loads(path.read_text()) for path in others] == [["val"], ["test"]]
    (entry,) = header_of(card)["model-index"]
    shown = [(r["dataset"]["name"], r["dataset"]["split"], r["metrics"][0]["value"]) for r in entry["results"]]
    assert shown == [("streets (val)", "val", 50.0), ("streets (test)", "test", 25.0)]
    text = card.read_text("utf-8")
    assert text.index("On streets (val):") < text.index("| AP | 50.0 |") < text.index("On streets (test):")
    assert "75.0" not in text
    metadata = load_weights(weights)[1]
    assert metadata["metrics"] == {"AP": 0.5}
    assert [(each["split"], each["metrics"]) for each in metadata["evaluations"]] == [
        ("val", {"AP": 0.5}),
        ("test", {"AP": 0.25}),
    ]


def test_a_test_of_a_run_by_an_earlier_version_does_not_replace_its_validation(run: Path, tmp_path: Path) -> None:
    evaluate(run, "test", "test", 0.25)
    files = publish(run, tmp_path / "out", ABOUT)
    assert [json.loads(path.read_text()) for path in files if path.suffix == ".json"] == [[], ["test"]]
    text = files[-1].read_text("utf-8")
    assert text.index(f"On {ABOUT.data} (val):") < text.index("| AP | 41.2 |") < text.index("On streets (test):")


def test_results_of_an_unknown_split_from_an_earlier_version_are_omitted(run: Path, tmp_path: Path) -> None:
    (run / "report.html").write_text("<dl><div><dt>data</dt><dd>instances_test.json</dd></div></dl>")
    files = publish(run, tmp_path / "out", ABOUT)
    assert [path.suffix for path in files] == [".safetensors", ".jsonl", ".md"]
    assert "| AP | 41.2 |" in files[-1].read_text("utf-8")


def test_a_damaged_evaluation_is_an_error(run: Path, tmp_path: Path) -> None:
    evaluate(run, "val", "val", 0.5)
    (run / "evaluation" / "val" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        publish(run, tmp_path / "out", ABOUT)


def test_existing_files_are_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(run, tmp_path / "out", ABOUT)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="Use another folder"):
        publish(run, tmp_path / "out", ABOUT)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_incomplete_runs_and_invalid_names_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Use the folder of a run"):
        publish(tmp_path, tmp_path / "out", ABOUT)
    with pytest.raises(ValueError, match="name: expected only letters"):
        publish(run, tmp_path / "out", About(name="a/b", licence="MIT", data="x"))
    (run / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        publish(run, tmp_path / "out", ABOUT)
    assert not (tmp_path / "out").exists()


def test_publishes_a_run_of_boxwright_train(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", train=8, val=4)
    out = tmp_path / "run"
    words = ["training.runs:tiny_experiment", "--data", str(tmp_path / "shapes"), "--out", str(out), "--workers", "0"]
    result = CliRunner().invoke(app, ["train", *words, "--set", "epochs=1"])
    assert result.exit_code == 0, result.output
    weights, results, log, card = publish(out, tmp_path / "out", ABOUT, trusted_modules=["training"])
    assert json.loads(results.read_text("utf-8")) == json.loads(
        (out / "evaluation" / "val" / "results.json").read_text("utf-8")
    )
    last = json.loads(log.read_text("utf-8").splitlines()[-1])
    assert load_weights(weights)[1]["metrics"] == last["metrics"]
    assert json.loads((out / "experiment.json").read_text("utf-8"))["command"] in card.read_text("utf-8")


def test_the_command_names_the_model_after_its_run(run: Path, tmp_path: Path) -> None:
    words = ["zoo", "publish", str(run), "--out", str(tmp_path / "out"), "--data", "BCCD", "--licence", "MIT"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert all(path.is_file() for path in paths)
    assert paths[0].name.startswith("cells_")

"""Publish a run: weights with their hash in the file name, results, log and a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from boxwright.predictor import Predictor, load
from boxwright.report.evaluations import FOLDER, Evaluation, read_evaluations
from boxwright.report.html import percent
from boxwright.training.metrics import read_lines
from boxwright.training.run_folder import RunFolder
from boxwright.weights.download import sha256_of
from boxwright.weights.fetch import is_file_name
from boxwright.weights.ours import save_weights


@dataclass(frozen=True, kw_only=True)
class About:
    """Facts about a model that the run folder does not contain."""

    name: str
    """Name of the model; the names of the published files begin with it."""
    licence: str
    """Licence of the weights, as an SPDX identifier such as Apache-2.0."""
    data: str
    """Short description of the data set that the model was trained and evaluated on."""


def publish(run: Path, out: Path, about: About, *, trusted_modules: Collection[str] = ()) -> list[Path]:
    """Write a folder that is ready to be uploaded. If publishing fails, no folder is written.

    The folder contains `NAME_YYYYMMDD-<first 8 digits of its SHA-256>.safetensors`, the weights without optimizer
    state; `NAME_YYYYMMDD_results.json`, the results of the validation (or of the first evaluation, if there was no
    validation); `NAME_YYYYMMDD_results_EVALUATION.json`, the results of each other evaluation of these weights;
    `NAME_YYYYMMDD_log.jsonl`; and the model card `README.md`, which states data set and split of all metrics. Results
    and log are omitted if the run has none.

    Args:
        run: Run folder.
        out: Folder to create; it may exist if it is empty.
        about: Facts that the run folder does not contain.
        trusted_modules: Your own modules that define parts of the model.

    Returns:
        Paths of the files, the weights first and the model card last.

    Raises:
        ValueError: `run` is not a run folder, its weights cannot be loaded, or `out` is not empty.
        OSError: A file cannot be read or written.
    """
    if not is_file_name(about.name):
        raise ValueError(f"name: expected only letters, digits, _, -, + and dots, got {about.name!r}. Use --name NAME.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty. Use another folder.")
    folder = RunFolder(run)
    if not folder.experiment.is_file() or not folder.weights.is_file():
        raise ValueError(
            f"{run} is not a run folder: it needs experiment.json and weights.safetensors. Use the folder of a run."
        )
    # Load the weights instead of copying the file, to publish only weights that can be loaded.
    predictor = load(run, trusted_modules=trusted_modules)
    command = _command(folder.experiment)
    step = predictor.metadata.get("step")
    evaluations = read_evaluations(run, sha256_of(folder.weights))
    metrics_of_run = _metrics_of(run, step)
    if metrics_of_run and "val" not in evaluations:  # a run of an earlier version
        val = Evaluation(data="", split="val", annotations="", step=step, metrics=metrics_of_run)
        evaluations = {"val": val, **evaluations}
    metrics = next(iter(evaluations.values())).metrics if evaluations else {}
    date = datetime.now(timezone.utc).strftime("%Y%m%d")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        draft = Path(temporary) / out.name
        unnamed = draft / "weights.safetensors"
        facts = {
            "name": about.name,
            "licence": about.licence,
            "data": about.data,
            "metrics": metrics,
            "evaluations": [
                {"data": each.data, "split": each.split, "conditions": each.conditions, "metrics": each.metrics}
                for each in evaluations.values()
            ],
        }
        save_weights(unnamed, predictor.detector.state_dict(), {**predictor.metadata, **facts})
        sha256 = sha256_of(unnamed)
        files = [unnamed.rename(draft / f"{about.name}_{date}-{sha256[:8]}.safetensors")]
        log = run / "metrics.jsonl"
        for name, results in _results(folder, evaluations).items():
            ending = "results" if name == next(iter(evaluations), name) else f"results_{name}"
            files.append(Path(shutil.copyfile(results, draft / f"{about.name}_{date}_{ending}.json")))
        if log.is_file():
            files.append(Path(shutil.copyfile(log, draft / f"{about.name}_{date}_log.jsonl")))
        card = draft / "README.md"
        card.write_text(model_card(predictor, about, list(evaluations.values()), command=command, files=files), "utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    return [out / path.name for path in [*files, card]]


def _command(path: Path) -> str:
    """The command in `experiment.json`; empty if there is none."""
    try:
        experiment = json.loads(path.read_text("utf-8"))
        return str(experiment.get("command", ""))
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Restore the file that training wrote.") from None


def model_card(
    predictor: Predictor, about: About, evaluations: Sequence[Evaluation], *, command: str, files: Collection[Path]
) -> str:
    """Model card: Markdown with a YAML header in the format of the Hugging Face hub.

    Args:
        predictor: The model.
        about: Facts that the run folder does not contain.
        evaluations: Evaluations of the model, the validation first.
        command: Training command.
        files: Published files, the weights first.
    """
    all_percentages = [_percentages(evaluation) for evaluation in evaluations]
    has_masks = any(name.startswith("mask_") for evaluation in evaluations for name in evaluation.metrics)
    task = "image-segmentation" if has_masks else "object-detection"
    header: dict[str, Any] = {
        "license": about.licence.lower(),
        "library_name": "boxwright",
        "pipeline_tag": task,
        "tags": ["object-detection", "boxwright"],
    }
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": _name(about, evaluation), "type": "coco-style", "split": evaluation.split},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in percentages.items()],
        }
        for evaluation, percentages in zip(evaluations, all_percentages, strict=True)
        if percentages
    ]
    if results:
        header["model-index"] = [{"name": about.name, "results": results}]
    # Every JSON document is valid YAML, so the text needs no other escaping.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    weights = next(iter(files))
    tables: list[str] = []
    for evaluation, percentages in zip(evaluations, all_percentages, strict=True):
        if percentages:
            tables += [f"On {_name(about, evaluation)}:", "", "| metric | percent |", "| --- | --- |"]
            tables += [*(f"| {name} | {value} |" for name, value in percentages.items()), ""]
    versions = ", ".join(f"{name} {version}" for name, version in predictor.metadata.get("versions", {}).items())
    step = predictor.metadata.get("step")
    num_parameters = sum(parameter.numel() for parameter in predictor.detector.parameters())
    return f"""---
{yaml}
---

# {about.name}

A Boxwright model with {num_parameters / 1e6:.2f} million parameters.

```python
import boxwright

prediction = boxwright.load("{weights.name}").predict("photo.jpg", score=0.5)
```

## Metrics

{chr(10).join(tables).rstrip() or "Not evaluated."}

## Data

{about.data}

{len(predictor.categories)} classes: {", ".join(category.name for category in predictor.categories)}.

## Training

```
{command or "(not recorded)"}
```

{f"{step:,} steps" if step is not None else "Steps not recorded"}; {versions or "versions not recorded"}. The metadata
of the weights file contains the complete experiment.

## Files

| file | SHA-256 |
| --- | --- |
{chr(10).join(f"| {path.name} | {sha256_of(path)} |" for path in files)}

## Licence

{about.licence}
"""


def _percentages(evaluation: Evaluation) -> dict[str, float]:
    """Metrics in percent, without undefined metrics (-1: no ground truth to evaluate on)."""
    return {name: float(percent(value)) for name, value in evaluation.metrics.items() if value >= 0}


def _name(about: About, evaluation: Evaluation) -> str:
    """Data set and split of an evaluation."""
    return evaluation.title if evaluation.data else f"{about.data} ({evaluation.split})"


def _results(folder: RunFolder, evaluations: Collection[str]) -> dict[str, Path]:
    """Results files of the evaluations, by the name of their folder.

    A run of an earlier version has one results file next to its weights. It is omitted if it is older than the weights,
    or if it was written by `boxwright test`, which wrote its report there too, because its split is then unknown.
    """
    files = {name: folder.path / FOLDER / name / "results.json" for name in evaluations}
    files = {name: file for name, file in files.items() if file.is_file()}
    old, report = folder.path / "results.json", folder.path / "report.html"
    if "val" not in files and old.is_file() and old.stat().st_mtime >= folder.weights.stat().st_mtime:
        tested = report.is_file() and "<dt>data</dt>" in report.read_text("utf-8", errors="replace")
        files = files if tested else {"val": old, **files}
    return files


def _metrics_of(run: Path, step: int | None) -> dict[str, float]:
    """Metrics of the run's evaluation of exactly these weights; empty if there was none."""
    log = run / "metrics.jsonl"
    lines = read_lines(log) if log.is_file() else []
    metrics = [line["metrics"] for line in lines if line["kind"] == "evaluation" and line["step"] == step]
    return metrics[-1] if metrics else {}

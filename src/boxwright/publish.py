"""A run's results made ready for others: weights with their hash in the name, results, log and a model card."""

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
    """What a run does not know of itself."""

    name: str
    """Of the model; the files' names begin with it."""
    licence: str
    """Of the weights, as an SPDX identifier such as Apache-2.0."""
    data: str
    """What was learnt from and measured with, in a few words."""


def publish(run: Path, out: Path, about: About, *, trusted_modules: Collection[str] = ()) -> list[Path]:
    """Write a folder to be put on the network, whole or not at all.

    It holds `NAME_YYYYMMDD-<first 8 digits of its SHA-256>.safetensors`, which has no optimizer state;
    `NAME_YYYYMMDD_results.json` of the validation (or the first evaluation there is),
    `NAME_YYYYMMDD_results_EVALUATION.json` of each other evaluation of these weights, and `NAME_YYYYMMDD_log.jsonl`,
    where the run has them; and the card, `README.md`, which states the data set and the split of all metrics.

    Args:
        run: The run's folder.
        out: The folder to make; it may be there if it is empty.
        about: What the run does not know of itself.
        trusted_modules: Modules of your own that the model's parts come from.

    Returns:
        The files, the weights first and the card last.

    Raises:
        ValueError: It is no run's folder, its weights cannot be loaded, or `out` holds something.
        OSError: A file cannot be read or written.
    """
    if not is_file_name(about.name):
        raise ValueError(f"{about.name!r} cannot begin a file's name: give letters, digits, _, -, + and dots")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty: name another folder")
    folder = RunFolder(run)
    if not folder.experiment.is_file() or not folder.weights.is_file():
        raise ValueError(f"{run} holds no experiment.json and weights.safetensors: give a run's folder")
    # Loaded, and not copied: what cannot be loaded here is of no use to others.
    predictor = load(run, trusted_modules=trusted_modules)
    command = _command(folder.experiment)
    step = predictor.metadata.get("step")
    evaluations = read_evaluations(run, sha256_of(folder.weights))
    figures = _measured(run, step)
    if figures and "val" not in evaluations:  # of a run by an earlier version
        val = Evaluation(data="", split="val", annotations="", step=step, metrics=figures)
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
    """The command in `experiment.json`; empty where it has none."""
    try:
        page = json.loads(path.read_text("utf-8"))
        return str(page.get("command", ""))
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): put back the file that training wrote") from None


def model_card(
    predictor: Predictor, about: About, evaluations: Sequence[Evaluation], *, command: str, files: Collection[Path]
) -> str:
    """A page in Markdown with a YAML header, as the Hugging Face hub reads it.

    Args:
        predictor: The model.
        about: What it does not know of itself.
        evaluations: What was measured, the validation first.
        command: What trained it.
        files: What is published, the weights first.
    """
    measured = [_percentages(evaluation) for evaluation in evaluations]
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
            "metrics": [{"type": name, "name": name, "value": value} for name, value in numbers.items()],
        }
        for evaluation, numbers in zip(evaluations, measured, strict=True)
        if numbers
    ]
    if results:
        header["model-index"] = [{"name": about.name, "results": results}]
    # JSON is YAML, whatever stands in the text.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    weights = next(iter(files))
    figures: list[str] = []
    for evaluation, numbers in zip(evaluations, measured, strict=True):
        if numbers:
            figures += [f"On {_name(about, evaluation)}:", "", "| measured | percent |", "| --- | --- |"]
            figures += [*(f"| {name} | {value} |" for name, value in numbers.items()), ""]
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

found = boxwright.load("{weights.name}").predict("photo.jpg", score=0.5)
```

## What it measured

{chr(10).join(figures).rstrip() or "It was not measured."}

## Data

{about.data}

It finds {len(predictor.categories)} classes: {", ".join(category.name for category in predictor.categories)}.

## Training

```
{command or "(not recorded)"}
```

{f"{step:,} steps" if step is not None else "Steps not recorded"}; {versions or "versions not recorded"}. The whole
experiment stands in the weights file's metadata.

## Files

| file | SHA-256 |
| --- | --- |
{chr(10).join(f"| {path.name} | {sha256_of(path)} |" for path in files)}

## Licence

{about.licence}
"""


def _percentages(evaluation: Evaluation) -> dict[str, float]:
    """The metrics for which there was something to measure with."""
    return {name: float(percent(value)) for name, value in evaluation.metrics.items() if value >= 0}


def _name(about: About, evaluation: Evaluation) -> str:
    """Data set and split in a few words."""
    return evaluation.title if evaluation.data else f"{about.data} ({evaluation.split})"


def _results(folder: RunFolder, evaluations: Collection[str]) -> dict[str, Path]:
    """The results files of the evaluations, by the name of their folder.

    A run by an earlier version has one file beside its weights. It is left out if it is older than the weights, or
    comes from `boxwright test`, which wrote its report there too: its split is then unknown.
    """
    files = {name: folder.path / FOLDER / name / "results.json" for name in evaluations}
    files = {name: file for name, file in files.items() if file.is_file()}
    old, report = folder.path / "results.json", folder.path / "report.html"
    if "val" not in files and old.is_file() and old.stat().st_mtime >= folder.weights.stat().st_mtime:
        tested = report.is_file() and "<dt>data</dt>" in report.read_text("utf-8", errors="replace")
        files = files if tested else {"val": old, **files}
    return files


def _measured(run: Path, step: int | None) -> dict[str, float]:
    """What the run's evaluation of just these weights gave; nothing if there was none."""
    log = run / "metrics.jsonl"
    lines = read_lines(log) if log.is_file() else []
    found = [line["metrics"] for line in lines if line["kind"] == "evaluation" and line["step"] == step]
    return found[-1] if found else {}

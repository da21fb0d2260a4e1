"""A run's results made ready for others: weights with their hash in the name, results, log and a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from boxwright.predictor import Predictor, load
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
    `NAME_YYYYMMDD_results.json` and `NAME_YYYYMMDD_log.jsonl`, where the run has them; and the card, `README.md`.

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
    metrics = _measured(run, predictor.metadata.get("step"))
    date = datetime.now(timezone.utc).strftime("%Y%m%d")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        draft = Path(temporary) / out.name
        unnamed = draft / "weights.safetensors"
        facts = {"name": about.name, "licence": about.licence, "data": about.data, "metrics": metrics}
        save_weights(unnamed, predictor.detector.state_dict(), {**predictor.metadata, **facts})
        sha256 = sha256_of(unnamed)
        files = [unnamed.rename(draft / f"{about.name}_{date}-{sha256[:8]}.safetensors")]
        results, log = run / "results.json", run / "metrics.jsonl"
        # Results that are older than the weights are of others.
        if results.is_file() and results.stat().st_mtime >= folder.weights.stat().st_mtime:
            files.append(Path(shutil.copyfile(results, draft / f"{about.name}_{date}_results.json")))
        if log.is_file():
            files.append(Path(shutil.copyfile(log, draft / f"{about.name}_{date}_log.jsonl")))
        card = draft / "README.md"
        card.write_text(model_card(predictor, about, metrics, command=command, files=files), "utf-8")
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
    predictor: Predictor, about: About, metrics: Mapping[str, float], *, command: str, files: Collection[Path]
) -> str:
    """A page in Markdown with a YAML header, as the Hugging Face hub reads it.

    Args:
        predictor: The model.
        about: What it does not know of itself.
        metrics: What was measured, by name, in 0..1, below 0 where there was nothing to measure with.
        command: What trained it.
        files: What is published, the weights first.
    """
    measured = {name: float(percent(value)) for name, value in metrics.items() if value >= 0}
    task = "image-segmentation" if any(name.startswith("mask_") for name in metrics) else "object-detection"
    header: dict[str, Any] = {
        "license": about.licence.lower(),
        "library_name": "boxwright",
        "pipeline_tag": task,
        "tags": ["object-detection", "boxwright"],
    }
    if measured:
        result = {
            "task": {"type": task},
            "dataset": {"name": about.data, "type": "coco-style"},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in measured.items()],
        }
        header["model-index"] = [{"name": about.name, "results": [result]}]
    # JSON is YAML, whatever stands in the text.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    weights = next(iter(files))
    table = [f"| {name} | {value} |" for name, value in measured.items()]
    numbers = ["| measured | percent |", "| --- | --- |", *table] if table else ["It was not measured."]
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

{chr(10).join(numbers)}

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


def _measured(run: Path, step: int | None) -> dict[str, float]:
    """What the run's evaluation of just these weights gave; nothing if there was none."""
    log = run / "metrics.jsonl"
    lines = read_lines(log) if log.is_file() else []
    found = [line["metrics"] for line in lines if line["kind"] == "evaluation" and line["step"] == step]
    return found[-1] if found else {}

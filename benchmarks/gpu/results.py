"""The files of a run: `run.json`, one JSON file per item, and `summary.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.summary import markdown
from benchmarks.gpu.worker import Outcome

FORMAT = "boxwright-gpu-1"


def write(folder: Path, outcomes: Sequence[Outcome], command: str, facts: dict[str, str]) -> None:
    """Write what is known so far; the files of earlier items stay as they are.

    Args:
        folder: Made if necessary.
        outcomes: In order; only the last one's file is written.
        command: The user's.
        facts: Machine and versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = asdict(outcomes[-1])
    _write_json(folder / f"{len(outcomes):02d}_{_slug(outcomes[-1].item)}.json", last)
    rows = [{key: value for key, value in asdict(outcome).items() if key != "result"} for outcome in outcomes]
    _write_json(folder / "run.json", {"format": FORMAT, "command": command, "facts": facts, "items": rows})
    (folder / "summary.md").write_text(markdown(outcomes, command, facts), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Round floats to six digits, which keeps the files small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")

"""The files on the guides to extending Boxwright are recipes whose models build and can be rebuilt from their JSON.

`tests/docs` also trains them. A Python block on a guide whose first line is `# NAME.py` is a file.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from boxwright.detectors.detector import as_detector
from boxwright.training.experiment import Experiment, build, from_json, require_rebuildable, to_json
from test_docs import ROOT, blocks

RECIPES = {
    "my_backbones:faster_rcnn_tiny": "add_backbone",
    "my_heads:faster_rcnn_dropout": "add_head",
    "my_losses:faster_rcnn_log_iou": "add_loss",
    "my_losses:faster_rcnn_focal": "add_loss",
    "my_points:points_r18": "add_detector",
    "my_augmentation:faster_rcnn_augmented": "add_augmentation",
}


@pytest.fixture
def find_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Callable[[], Experiment]]]:
    """Write the files of a recipe's guide into a folder of the import path, and return the recipe."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def find(name: str) -> Callable[[], Experiment]:
        module, function = name.split(":")
        for language, text in blocks(ROOT / "docs" / "guides" / f"{RECIPES[name]}.md"):
            file = re.match(r"# (\w+\.py)\n", text)
            if language == "python" and file:
                (tmp_path / file[1]).write_text(text, "utf-8")
        return getattr(importlib.import_module(module), function)

    yield find
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {path.stem for path in tmp_path.glob("*.py")}:
            del sys.modules[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_a_guide_can_be_rebuilt_once_its_module_is_trusted(
    name: str, find_recipe: Callable[[str], Callable[[], Experiment]]
) -> None:
    experiment = find_recipe(name)()
    require_rebuildable(experiment)
    with torch.device("meta"):
        assert as_detector(build(experiment.model, num_classes=2)).num_classes == 2
    with pytest.raises(ValueError, match="trusted_modules"):
        from_json(to_json(experiment))


def test_settings_of_a_head_reach_it(find_recipe: Callable[[str], Callable[[], Experiment]]) -> None:
    detector = build(find_recipe("my_heads:faster_rcnn_dropout")().model, num_classes=2)
    assert detector.box_head.dropout.p == 0.2

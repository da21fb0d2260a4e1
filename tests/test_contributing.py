"""The code on CONTRIBUTING.md runs: its backbone, head and detector train two steps, load and detect."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import boxwright
from boxwright.backbones.fpn import FPN
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.training.loop import train
from boxwright.training.parts import build
from factory import SMALL_BOX, SMALL_RPN
from test_docs import ROOT, blocks
from training.fakes import Pictures
from training.runs import tiny_experiment


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The page's modules by name, as files of a user."""
    folder = tmp_path / "modules"
    folder.mkdir()
    names = []
    for language, text in blocks(ROOT / "CONTRIBUTING.md"):
        if language == "python":
            name = "contributed_" + Path(text.splitlines()[0].split()[-1]).stem
            (folder / f"{name}.py").write_text(text, "utf-8")
            names.append(name)
    monkeypatch.syspath_prepend(folder)
    yield {name.removeprefix("contributed_"): importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def test_backbone_head_and_detector_train_and_load(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    backbone = partial(modules["tiny"].tiny_fpn, width=4, channels=8)
    same = partial(FPN, body=partial(modules["tiny"].TinyNet, width=4), channels=8)
    assert build(backbone).state_dict().keys() == build(same).state_dict().keys()
    head = partial(modules["my_heads"].DropoutBoxHead, dropout=0.5)
    for name, model in {
        "head": partial(faster_rcnn, backbone=same, rpn=SMALL_RPN, box=SMALL_BOX, box_head=head),
        "detector": partial(modules["points"].PointDetector, backbone=backbone),
    }.items():
        run = tmp_path / name
        experiment = replace(tiny_experiment(model=model), epochs=1, images_per_device=4)
        train(experiment, Pictures(8), run, num_workers=0)
        trusted = [module.__name__ for module in modules.values()]
        loaded = boxwright.load(run, trusted_modules=trusted)
        assert type(loaded.detector) is type(build(model, num_classes=2))
        assert len(loaded.predict(np.full((32, 32, 3), 120, np.uint8)))
        with pytest.raises(ValueError, match="trusted_modules"):
            boxwright.load(run)


def test_recipes_build(modules: dict[str, ModuleType]) -> None:
    detector = build(modules["my_heads"].faster_rcnn_dropout().model, num_classes=2)
    assert detector.box_head.dropout.p == 0.2
    assert build(modules["faster_rcnn"].faster_rcnn_r34_fpn_1x().model, num_classes=2).num_classes == 2

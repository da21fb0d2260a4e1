"""Random weights of peers are calibrated like Boxwright's, and adapters name the layers of their code bases."""

from __future__ import annotations

import fnmatch
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from benchmarks.peers import serve
from torch import Tensor, nn

IMPORTS = {
    "detectron2": ["", ".config", ".modeling", ".structures", ".utils", ".utils.events"],
    "mmdet": ["", ".registry", ".structures", ".structures.mask", ".utils"],
    "mmengine": ["", ".hub", ".logging", ".structures"],
    "mmcv": [""],
}
# Layer names in Detectron2 0.6 and mmdetection 3.3.0, by adapter and family.
WEAK = {"detectron2": "bottom_up.res2.0.conv3.norm.weight", "mmdetection": "layer1.0.bn3.weight"}
SPREAD = {
    ("detectron2", "rpn"): [
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
    ],
    ("detectron2", "faster_rcnn"): [
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ],
    ("detectron2", "retinanet"): ["head.cls_score", "head.bbox_pred"],
    ("mmdetection", "rpn"): ["bbox_head.rpn_cls", "bbox_head.rpn_reg"],
    ("mmdetection", "faster_rcnn"): [
        "rpn_head.rpn_cls",
        "rpn_head.rpn_reg",
        "roi_head.bbox_head.fc_cls",
        "roi_head.bbox_head.fc_reg",
    ],
    ("mmdetection", "retinanet"): ["bbox_head.retina_cls", "bbox_head.retina_reg"],
}


class Model(nn.Module):
    """A norm and a layer whose outputs differ between channels as much as in an untrained head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(image) + 10)


def adapter(**changes: Any) -> Any:
    made = {"WEAK": ["norm.weight"], "SPREAD": {"head": 0.4}, "BACKGROUND": "head", **changes}
    return SimpleNamespace(infer=lambda model, given: model(given), **made)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def test_calibrated_outputs_spread_over_all_channels_before_the_biases(image: Tensor) -> None:
    torch.manual_seed(0)
    model = Model().train()
    biases = model.head.bias[:-1].tolist()
    serve.settle(model, adapter(), image)
    assert model.training
    assert model.norm.weight.tolist() == [pytest.approx(0.2)] * 8
    assert model.head.bias.tolist() == [*biases, serve.BACKGROUND]
    answers = model.eval()(image) - model.head.bias[:, None, None]
    assert answers.std().item() == pytest.approx(0.4, rel=1e-3)
    # The spread within a channel is far smaller. If it were as large as the total spread, scores would be too high.
    assert answers.std((0, 2, 3)).max() < 0.1


@pytest.mark.parametrize("changes", [{"WEAK": ["bn3.weight"]}, {"SPREAD": {"rpn_head.rpn_cls": 1.0}}])
def test_an_adapter_that_names_no_layer_is_reported(image: Tensor, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the adapter's {next(iter(changes))} names nothing"):
        serve.settle(Model(), adapter(**changes), image)


@pytest.mark.parametrize(("name", "family"), SPREAD)
def test_adapters_name_each_layer_once(monkeypatch: pytest.MonkeyPatch, name: str, family: str) -> None:
    module = import_adapter(monkeypatch, name)
    assert family in module.CONFIGURATIONS
    assert any(fnmatch.fnmatchcase(f"backbone.{WEAK[name]}", pattern) for pattern in module.WEAK)
    for layer in SPREAD[name, family]:
        assert sum(fnmatch.fnmatchcase(layer, pattern) for pattern in module.SPREAD) == 1
        background = layer.startswith("roi_head") and layer.endswith(("cls_score", "fc_cls"))
        assert fnmatch.fnmatchcase(layer, module.BACKGROUND) == background


def import_adapter(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """An adapter without its code base."""
    for package, parts in IMPORTS.items():
        for part in parts:
            monkeypatch.setitem(sys.modules, package + part, MagicMock())
    monkeypatch.delitem(sys.modules, f"benchmarks.peers.{name}_peer", raising=False)
    module = importlib.import_module(f"benchmarks.peers.{name}_peer")
    monkeypatch.delitem(sys.modules, module.__name__)
    return module

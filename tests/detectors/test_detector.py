"""What a detector must have, and the defaults of what it may have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import boxwright
from boxwright.data.loader import EvaluationLoader
from boxwright.detectors.detector import Detector, as_detector
from boxwright.evaluation.evaluate import detect_dataset, evaluate
from boxwright.evaluation.views import view_suppression
from boxwright.predictor import Predictor
from boxwright.training.loop import train
from factory import DETECTORS, small_detector
from training.fakes import CATEGORIES, Pictures
from training.own_parts import AgnosticDetector, DerivedDetector, PlainDetector
from training.runs import tiny_experiment

OPTIONAL = {"needs_masks": False, "needs_proposals": False, "class_agnostic": False, "suppression": None}


def without(name: str) -> nn.Module:
    """A plain detector that lacks an attribute."""
    members = {key: value for key, value in vars(PlainDetector).items() if key != name}
    detector = type("Lacking", (nn.Module,), {**members, "__init__": nn.Module.__init__})()
    for key, value in vars(PlainDetector(2)).items():
        if key != name:
            detector.__dict__[key] = value
    return detector


def enter_training(_: nn.Module, out: Path) -> object:
    return train(tiny_experiment(), Pictures(2), out, num_workers=0)


def enter_predictor(detector: nn.Module, _: Path) -> object:
    return Predictor(detector, experiment=tiny_experiment(), categories=CATEGORIES)


def enter_evaluation(detector: nn.Module, _: Path) -> object:
    return evaluate(detector, Pictures(2), [], device="cpu")


@pytest.mark.parametrize("kind", [PlainDetector, DerivedDetector])
def test_defaults_of_the_optional_attributes(kind: type[nn.Module]) -> None:
    detector = kind(2)
    assert as_detector(detector) is detector
    assert {name: getattr(detector, name) for name in OPTIONAL} == OPTIONAL
    assert detector.state_dict().keys() == PlainDetector(2).state_dict().keys()


def test_what_a_plain_module_says_of_itself_stays() -> None:
    module = PlainDetector(2)
    module.needs_masks, module.class_agnostic = True, True
    detector = as_detector(module)
    assert (detector.needs_masks, detector.class_agnostic, detector.needs_proposals) == (True, True, False)


@pytest.mark.parametrize("kind", DETECTORS)
def test_boxwright_s_detectors_state_what_they_need(kind: str) -> None:
    detector = as_detector(small_detector(kind))
    assert isinstance(detector, Detector)
    assert detector.needs_masks == ("mask" in kind)
    assert detector.needs_proposals == kind.startswith("fast_")
    assert detector.class_agnostic == (kind == "rpn")
    assert (detector.suppression is None) == (kind == "rpn")


@pytest.mark.parametrize("name", ["losses", "detect", "num_classes", "max_detections"])
@pytest.mark.parametrize("enter", [enter_training, enter_predictor, enter_evaluation])
def test_a_module_that_lacks_what_a_detector_needs_is_refused(
    name: str, enter: Callable[[nn.Module, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = without(name)
    monkeypatch.setattr("boxwright.training.loop.build", lambda *_, **__: lacking)
    with pytest.raises(ValueError, match=rf"Lacking is no detector: it has no (method )?{name}"):
        enter(lacking, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("num_classes", 0), ("max_detections", 2.5), ("num_classes", None)])
def test_counts_that_are_none_are_refused(name: str, value: Any) -> None:
    detector = PlainDetector(2)
    setattr(detector, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {value}\. Set self\.{name}"):
        as_detector(detector)


def test_a_subclass_that_leaves_out_a_method_is_refused() -> None:
    class Half(Detector):
        num_classes, max_detections = 2, 3

        def losses(self, batch: object) -> dict[str, torch.Tensor]:
            return {}

    with pytest.raises(ValueError, match=r"Half is no detector: it has no method detect"):
        as_detector(Half())
    with pytest.raises(ValueError, match=r"expected a detector \(an nn\.Module\), got a value of type dict"):
        as_detector({})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [PlainDetector, DerivedDetector])
def test_plain_and_derived_detectors_train_load_and_are_evaluated(kind: type[nn.Module], tmp_path: Path) -> None:
    dataset = Pictures(8)
    metrics = []

    def measure(detector: nn.Module) -> dict[str, float]:
        loader = EvaluationLoader(dataset, batch_size=4, resize=experiment.resize, num_workers=0)
        results, coco = evaluate(detector, dataset, loader, device="cpu")
        metrics.append(coco)
        assert len(results.scores) == len(dataset)
        return coco.numbers

    experiment = tiny_experiment(model=kind, epochs=1)
    train(experiment, dataset, tmp_path, num_workers=0, evaluate=measure)
    assert len(metrics) == 1
    model = boxwright.load(tmp_path, trusted_modules=["training"])
    assert type(model.detector) is kind
    found = model.predict(np.zeros((32, 32, 3), np.uint8))
    assert found.boxes.tolist() == [[2, 3, 20, 30]]
    with pytest.raises(ValueError, match="has no `suppression`"):
        view_suppression(model.detector)
    with pytest.raises(ValueError, match="this model has its own RPN"):
        model.predict(np.zeros((32, 32, 3), np.uint8), proposals=np.zeros((1, 4)))


def test_a_class_agnostic_detector_of_any_kind_calls_its_objects_objects(tmp_path: Path) -> None:
    train(tiny_experiment(model=AgnosticDetector, epochs=1), Pictures(8), tmp_path, num_workers=0)
    found = boxwright.load(tmp_path, trusted_modules=[AgnosticDetector.__module__])
    assert [category.name for category in found.categories] == ["object"]


def test_detecting_leaves_the_mode_of_a_plain_detector(tmp_path: Path) -> None:
    detector = PlainDetector(2).train()
    detect_dataset(detector, [], device="cpu")
    assert detector.training

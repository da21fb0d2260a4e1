"""Required attributes of detectors, and defaults of optional attributes."""

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
from training.fakes import CATEGORIES, FakeImages
from training.own_parts import AgnosticDetector, DerivedDetector, PlainDetector
from training.runs import tiny_experiment

OPTIONAL = {"needs_masks": False, "needs_proposals": False, "class_agnostic": False, "suppression": None}


def without(name: str) -> nn.Module:
    """A plain detector without an attribute."""
    members = {key: value for key, value in vars(PlainDetector).items() if key != name}
    detector = type("Lacking", (nn.Module,), {**members, "__init__": nn.Module.__init__})()
    for key, value in vars(PlainDetector(2)).items():
        if key != name:
            detector.__dict__[key] = value
    return detector


def run_training(_: nn.Module, out: Path) -> object:
    return train(tiny_experiment(), FakeImages(2), out, num_workers=0)


def run_predictor(detector: nn.Module, _: Path) -> object:
    return Predictor(detector, experiment=tiny_experiment(), categories=CATEGORIES)


def run_evaluation(detector: nn.Module, _: Path) -> object:
    return evaluate(detector, FakeImages(2), [], device="cpu")


@pytest.mark.parametrize("kind", [PlainDetector, DerivedDetector])
def test_defaults_of_the_optional_attributes(kind: type[nn.Module]) -> None:
    detector = kind(2)
    assert as_detector(detector) is detector
    assert {name: getattr(detector, name) for name in OPTIONAL} == OPTIONAL
    assert detector.state_dict().keys() == PlainDetector(2).state_dict().keys()


def test_attributes_of_a_plain_module_override_the_defaults() -> None:
    module = PlainDetector(2)
    module.needs_masks, module.class_agnostic = True, True
    detector = as_detector(module)
    assert (detector.needs_masks, detector.class_agnostic, detector.needs_proposals) == (True, True, False)


@pytest.mark.parametrize("kind", DETECTORS)
def test_optional_attributes_of_the_built_in_detectors(kind: str) -> None:
    detector = as_detector(small_detector(kind))
    assert isinstance(detector, Detector)
    assert detector.needs_masks == ("mask" in kind)
    assert detector.needs_proposals == kind.startswith("fast_")
    assert detector.class_agnostic == (kind == "rpn")
    assert (detector.suppression is None) == (kind == "rpn")


@pytest.mark.parametrize("name", ["losses", "detect", "num_classes", "max_detections"])
@pytest.mark.parametrize("use", [run_training, run_predictor, run_evaluation])
def test_a_module_without_a_required_attribute_is_an_error(
    name: str, use: Callable[[nn.Module, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = without(name)
    monkeypatch.setattr("boxwright.training.loop.build", lambda *_, **__: lacking)
    with pytest.raises(ValueError, match=rf"Lacking is not a detector: it has no (method )?{name}"):
        use(lacking, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("num_classes", 0), ("max_detections", 2.5), ("num_classes", None)])
def test_invalid_counts_are_an_error(name: str, value: Any) -> None:
    detector = PlainDetector(2)
    setattr(detector, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {value}\. Set self\.{name}"):
        as_detector(detector)


def test_a_subclass_without_a_required_method_is_an_error() -> None:
    class Half(Detector):
        num_classes, max_detections = 2, 3

        def losses(self, batch: object) -> dict[str, torch.Tensor]:
            return {}

    with pytest.raises(ValueError, match=r"Half is not a detector: it has no method detect"):
        as_detector(Half())
    with pytest.raises(ValueError, match=r"detector: expected an nn\.Module, got a value of type dict"):
        as_detector({})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [PlainDetector, DerivedDetector])
def test_plain_and_derived_detectors_can_be_trained_evaluated_and_loaded(kind: type[nn.Module], tmp_path: Path) -> None:
    dataset = FakeImages(8)
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
    prediction = model.predict(np.zeros((32, 32, 3), np.uint8))
    assert prediction.boxes.tolist() == [[2, 3, 20, 30]]
    with pytest.raises(ValueError, match="has no `suppression`"):
        view_suppression(model.detector)
    with pytest.raises(ValueError, match="this model has its own RPN"):
        model.predict(np.zeros((32, 32, 3), np.uint8), proposals=np.zeros((1, 4)))


def test_the_category_of_a_class_agnostic_detector_is_object(tmp_path: Path) -> None:
    train(tiny_experiment(model=AgnosticDetector, epochs=1), FakeImages(8), tmp_path, num_workers=0)
    model = boxwright.load(tmp_path, trusted_modules=[AgnosticDetector.__module__])
    assert [category.name for category in model.categories] == ["object"]


def test_detect_dataset_restores_the_training_mode(tmp_path: Path) -> None:
    detector = PlainDetector(2).train()
    detect_dataset(detector, [], device="cpu")
    assert detector.training

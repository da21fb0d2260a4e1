"""Parts that are classes or factories can be trained, saved, resumed and loaded; others are refused before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import boxwright
from boxwright.backbones.fpn import FPN, resnet_fpn
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.shapes import write_shapes
from boxwright.detectors.cascade_rcnn import cascade_mask_rcnn, cascade_rcnn
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import fast_mask_rcnn, fast_rcnn, faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.box_head import BoxHead
from boxwright.heads.mask_head import MaskHead
from boxwright.heads.retina_head import RetinaHead
from boxwright.heads.rpn_head import RPNHead
from boxwright.training.experiment import Experiment, from_json, require_rebuildable, with_new_defaults
from boxwright.training.loop import train
from boxwright.training.parts import arguments_of, build, modules_of, not_pretrained, replaced_parts, to_json
from boxwright.training.settings import describe, with_settings
from factory import CASCADE_BOX, SMALL_BOX, SMALL_MASK, SMALL_RETINA, SMALL_RPN
from training.fakes import FakeImages, tiny_detector
from training.own_parts import Body, Doubled, PlainDetector, PlainRPN, ScaledBoxHead, doubled_detector, rcnn_of_parts
from training.runs import assert_same_run, start_python, tiny_experiment

MODULE = "training.own_parts"
SMALL_BODY = partial(FPN, body=partial(Body, width=4), channels=8)


def through_json(experiment: Experiment, *trusted: str) -> Experiment:
    return from_json(json.loads(json.dumps(to_json(experiment))), trusted_modules=trusted)


def rcnn_experiment(**changes: Any) -> Experiment:
    settings = {"model": rcnn_of_parts(rpn=SMALL_RPN, box=SMALL_BOX), "epochs": 2, "images_per_device": 8}
    return tiny_experiment(**{**settings, **changes})


class Nested:
    """A class with an inner class."""

    class Detector(PlainDetector):
        """Cannot be imported as `module.name`."""


def local_detector() -> Callable[..., nn.Module]:
    def inner(num_classes: int) -> nn.Module:
        return PlainDetector(num_classes)

    return inner


def main_detector(num_classes: int) -> nn.Module:
    return PlainDetector(num_classes)


main_detector.__module__ = "__main__"


def test_build_calls_complete_parts_and_passes_factories_on() -> None:
    received = {}

    def model(*, body: nn.Module, whole: type, head: object, num_classes: int) -> object:
        received.update(body=body, whole=whole, head=head)

    build(partial(model, body=partial(Body, width=4), whole=nn.Flatten, head=PlainRPN), num_classes=3)
    assert isinstance(received["body"], Body)
    assert received["head"] is PlainRPN
    assert isinstance(received["whole"], nn.Flatten), "a class without required parameters is complete"


def test_a_class_with_any_signature_can_replace_a_default_head() -> None:
    """The signature of `ScaledBoxHead` is `*arguments`, which does not show that it needs arguments."""
    detector = build(rcnn_of_parts(rpn=SMALL_RPN, box=SMALL_BOX), num_classes=5)
    assert isinstance(detector.backbone.body, Body)
    assert type(detector.rpn) is PlainRPN
    assert type(detector.box_head) is ScaledBoxHead
    assert len(detector.box_head.scale) == 3
    assert detector.box_head.config == SMALL_BOX
    assert detector.box_head.num_classes == 5


class CustomMaskHead(MaskHead):
    pass


class CustomRetinaHead(RetinaHead):
    pass


@pytest.mark.parametrize(
    ("builder", "settings", "heads"),
    [
        (proposal_network, {"rpn": SMALL_RPN}, {"rpn_head": PlainRPN}),
        (fast_rcnn, {"box": SMALL_BOX}, {"box_head": ScaledBoxHead}),
        (fast_mask_rcnn, {"box": SMALL_BOX}, {"box_head": ScaledBoxHead, "mask_head": CustomMaskHead}),
        (faster_rcnn, {"box": SMALL_BOX}, {"rpn_head": PlainRPN, "box_head": ScaledBoxHead}),
        (
            mask_rcnn,
            {"box": SMALL_BOX, "mask": SMALL_MASK},
            {"rpn_head": PlainRPN, "box_head": ScaledBoxHead, "mask_head": CustomMaskHead},
        ),
        (cascade_rcnn, {"box": CASCADE_BOX}, {"rpn_head": PlainRPN, "box_head": ScaledBoxHead}),
        (
            cascade_mask_rcnn,
            {"box": CASCADE_BOX, "mask": SMALL_MASK},
            {"rpn_head": PlainRPN, "box_head": ScaledBoxHead, "mask_head": CustomMaskHead},
        ),
        (retinanet, {"retina": SMALL_RETINA}, {"retina_head": CustomRetinaHead}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_head_of_every_detector_can_be_replaced(
    builder: Callable[..., nn.Module], settings: dict[str, Any], heads: dict[str, type]
) -> None:
    detector = build(partial(builder, backbone=SMALL_BODY, **settings, **heads), num_classes=3)
    stock = {RPNHead, BoxHead, MaskHead, RetinaHead}
    kinds = {type(module) for module in detector.modules()}
    assert not kinds & stock, "no head of a stock class may remain"
    assert set(heads.values()) <= kinds


def test_json_names_classes_with_the_arguments_that_their_caller_does_not_pass() -> None:
    data = to_json(rcnn_experiment())
    model = data["arguments"]["model"]["arguments"]
    assert model["backbone"]["call"] == "boxwright.backbones.fpn.FPN"
    assert model["backbone"]["arguments"]["body"] == {"call": f"{MODULE}.Body", "arguments": {"width": 4}}
    assert model["box_head"] == {"call": f"{MODULE}.ScaledBoxHead", "arguments": {"extra": 3}}
    assert model["rpn_head"] == {"call": f"{MODULE}.PlainRPN", "arguments": {}}
    stock = to_json(Experiment(model=partial(faster_rcnn, backbone=resnet_fpn)))["arguments"]["model"]["arguments"]
    assert stock["box_head"] == {"call": "boxwright.heads.box_head.BoxHead", "arguments": {}}


def test_round_trip_through_json() -> None:
    experiment = rcnn_experiment()
    loaded = through_json(experiment, MODULE)
    assert to_json(loaded) == to_json(experiment)
    detector = build(loaded.model, num_classes=2)
    assert type(detector.box_head) is ScaledBoxHead
    assert detector.box_head.config == SMALL_BOX
    assert modules_of(experiment) == {MODULE}


def test_experiments_saved_before_heads_were_replaceable_can_be_loaded() -> None:
    experiment = Experiment(model=partial(faster_rcnn, backbone=partial(resnet_fpn, depth=18), rpn=SMALL_RPN))
    old = to_json(experiment)
    for name in ("rpn_head", "box_head"):
        del old["arguments"]["model"]["arguments"][name]
    assert type(build(from_json(old).model, num_classes=2).box_head) is BoxHead
    assert with_new_defaults(old, experiment) == to_json(experiment)
    assert with_new_defaults({"call": "gone"}, experiment) == {"call": "gone"}


def test_a_run_of_an_older_version_resumes_with_the_defaults_of_new_parameters(tmp_path: Path) -> None:
    experiment = tiny_experiment(model=PlainDetector, epochs=2)
    train(experiment, FakeImages(8), tmp_path, num_workers=0)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "step_4")
    (file,) = (path for path in (checkpoints / "step_2").iterdir() if path.suffix == ".json")
    data = json.loads(file.read_text())
    del data["experiment"]["arguments"]["model"]["arguments"]["width"]
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"model\.width: 4 -> 5"):
        train(
            replace(experiment, model=partial(PlainDetector, width=5)),
            FakeImages(8),
            tmp_path,
            num_workers=0,
            resume=True,
        )
    train(experiment, FakeImages(8), tmp_path, num_workers=0, resume=True)
    assert (checkpoints / "step_4").is_dir()


def test_json_may_call_only_classes_of_model_modules_and_trusted_modules() -> None:
    for name, message in (
        ("torch.nn.modules.linear.Linear", r"trusted_modules=\['torch.nn.modules.linear'\].*--trust torch"),
        ("boxwright.training.ema.EMA", "neither a part of a model nor settings"),
        ("boxwright.training.step.Losses", "neither a part of a model nor settings"),
        ("boxwright.detectors.rcnn.BoxHead", "neither a part of a model nor settings"),
        (f"{MODULE}.Detections", "neither a part of a model nor settings"),
        ("my_models.Head", r"trusted module my_models cannot be imported \(No module named 'my_models'\)\. Install it"),
        (f"{MODULE}.Gone", f"{MODULE}.Gone does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json({"call": name, "arguments": {}}, trusted_modules=[MODULE, "my_models"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda num_classes: PlainDetector(num_classes),
            r"model: .*<lambda> cannot be imported by its name.*define it",
        ),
        (local_detector(), r"model: .*<locals>\.inner cannot be imported by its name.*define it at the top"),
        (partial(local_detector(), num_classes=2), r"<locals>\.inner cannot be imported"),
        (Nested.Detector, r"Nested\.Detector cannot be imported by its name"),
        (main_detector, r"model: __main__\.main_detector cannot be imported"),
        (PlainDetector(2), r"model: expected .*, got PlainDetector.*functools\.partial"),
        (partial(PlainDetector(2)), r"model: expected .*, got functools\.partial"),
        (partial(PlainDetector, width=torch.tensor(4)), r"model\.width: expected .*, got tensor\(4\)"),
        (partial(faster_rcnn, backbone=Body(4)), r"model\.backbone: expected .*, got Body"),
        (partial(faster_rcnn, backbone=partial(Body, 4)), r"binds \(4,\) by position.*partial\(Body, width=16\)"),
        (partial(faster_rcnn, backbone=SMALL_BODY, box_head=lambda *_: None), r"model\.box_head: .*<lambda>"),
    ],
    ids=["lambda", "local", "partial of local", "nested", "main", "object", "partial of object", "tensor"]
    + ["object as backbone", "by position", "lambda as head"],
)
def test_models_that_could_not_be_rebuilt_are_refused_before_training(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_experiment(model=model), FakeImages(), tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run").exists()


def test_settings_that_change_in_a_round_trip_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"read back from JSON, the experiment is .*Doubled.*\b4\b.* instead of .*\b2\b"
    ):
        require_rebuildable(tiny_experiment(model=partial(doubled_detector, options=Doubled(number=1))))


def test_arguments_of_classes_can_be_described_and_set() -> None:
    experiment = rcnn_experiment()
    text = describe(experiment).splitlines()
    for line in ("  box_head = ScaledBoxHead", "    extra = 3", "    body = Body", "      width = 4"):
        assert line in text, line
    start = text.index("  rpn_head = PlainRPN")
    assert not text[start + 1].startswith("    "), "arguments that faster_rcnn passes to its heads cannot be set"
    changed = with_settings(experiment, ["model.box_head.extra=5", "model.backbone.body.width=8"])
    detector = build(changed.model, num_classes=2)
    assert len(detector.box_head.scale) == 5
    assert detector.backbone.body.channels == [8, 16, 32]
    with pytest.raises(ValueError, match=r"model\.backbone\.body\.width: expected a whole number, got 'wide'"):
        with_settings(experiment, ["model.backbone.body.width=wide"])
    with pytest.raises(ValueError, match=r"model\.box_head has no 'config'"):
        with_settings(experiment, ["model.box_head.config.width=5"])


def test_pretrained_is_off_inside_classes() -> None:
    part = not_pretrained(partial(FPN, body=partial(resnet_fpn, pretrained=True)))
    assert part.keywords["body"].keywords == {"pretrained": False}


def test_replaced_parts_are_listed() -> None:
    assert replaced_parts(rcnn_of_parts()) == {
        "rpn_head": f"{MODULE}.PlainRPN",
        "box_head": f"{MODULE}.ScaledBoxHead",
    }
    assert replaced_parts(partial(faster_rcnn, backbone=resnet_fpn, box_head=BoxHead)) == {}


def test_arguments_of_a_model_include_all_defaults() -> None:
    """The model of an experiment is not a factory although it needs `num_classes`, which `build` passes by name."""
    data = to_json(tiny_experiment(model=PlainDetector))
    assert data["arguments"]["model"]["arguments"] == {"width": 4}
    assert arguments_of(tiny_detector) == {"dropout": 0.1, "norm": True}


FRESH_PROCESS = """
import sys
import numpy as np
import pytest
from typer.testing import CliRunner
import boxwright
from boxwright.cli.main import app
from pathlib import Path
from boxwright.publish import About, publish

run, data = {run!r}, {data!r}
with pytest.raises(ValueError, match="training.own_parts.*trusted_modules"):
    boxwright.load(run)
assert "training.own_parts" not in sys.modules
model = boxwright.load(run, trusted_modules=["training"])
assert type(model.detector.box_head).__name__ == "ScaledBoxHead"
prediction = model.predict(np.full((32, 32, 3), 90, np.uint8))
np.savez({out!r}, boxes=prediction.boxes, scores=prediction.scores, labels=prediction.labels)

def cli(*words, trust=True, status=0):
    result = CliRunner().invoke(app, [*words, *(["--trust", "training.own_parts"] if trust else [])])
    assert (result.exit_code == 0) == (status == 0), (words, result.output, result.exception)
    return result

cli("predict", run, data + "/val", "--out", run + "/drawn")
cli("weights", "inspect", run + "/weights.safetensors")
refused = cli("weights", "export", run, "--out", run + "/x.pth", status=1)
assert "ScaledBoxHead" in refused.output, refused.output
cli("predict", run, data + "/val", "--out", run + "/drawn", trust=False, status=1)
cli("test", run, "--data", data, "--workers", "0", "--out", run + "/tested")
about = About(name="x", licence="MIT", data="shapes")
files = publish(Path(run), Path(run) / "published", about, trusted_modules=["training"])
assert boxwright.load(files[0], trusted_modules=["training"]).predict(np.zeros((9, 9, 3), np.uint8)) is not None
"""


def test_parts_that_are_classes_from_training_to_a_fresh_process(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "shapes"
    write_shapes(data, train=8, val=2)
    dataset = IndexedDataset(data / "annotations" / "instances_train.json", data / "train")
    experiment = rcnn_experiment()
    train(experiment, dataset, run, num_workers=0)
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_2")
    train(experiment, dataset, resumed, num_workers=0, resume=True)
    assert_same_run(run, resumed)

    image = np.full((32, 32, 3), 90, np.uint8)
    expected = boxwright.load(run, trusted_modules=[MODULE]).predict(image)
    assert len(expected)
    out = tmp_path / "prediction.npz"
    process = start_python(FRESH_PROCESS.format(run=str(run), data=str(data), out=str(out)))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    prediction = np.load(out)
    for name in ("boxes", "scores", "labels"):
        assert np.array_equal(prediction[name], getattr(expected, name)), name

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from boxwright.backbones.backbone import CAFFE
from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.augment import Photometric
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.training import experiment as experiment_module
from boxwright.training.experiment import (
    SGD,
    AdamW,
    CosineSchedule,
    Experiment,
    StepSchedule,
    build,
    from_json,
    to_json,
)
from training.fakes import tiny_detector  # stands for a user's module


def head(*, width: int, num_classes: int, activation: str = "relu") -> dict[str, object]:
    return {"width": width, "num_classes": num_classes, "activation": activation}


def pair(*, left: object, right: object = 2) -> tuple[object, object]:
    return left, right


EXPERIMENT = Experiment(
    model=partial(
        faster_rcnn,
        backbone=partial(resnet_fpn, depth=18, channels=64),
        pixel_stats=CAFFE,
        rpn=RPNConfig(ratios=(1.0,), low_quality=None),
    ),
    scale_jitter=(0.8, 1.25),
    photometric=Photometric(brightness=0.1),
    optimizer=AdamW(),
    schedule=CosineSchedule(),
    ema_decay=0.999,
)


def through_json(experiment: Experiment, **options: object) -> Experiment:
    return from_json(json.loads(json.dumps(to_json(experiment))), **options)


def test_defaults_equal_those_of_mmdetection() -> None:
    experiment = Experiment(model=faster_rcnn)
    assert experiment.optimizer == SGD(lr=0.02, momentum=0.9, weight_decay=1e-4, decay_norm_and_bias=True)
    assert experiment.schedule == StepSchedule(epochs=(8, 11), factor=0.1, warmup_steps=500, warmup_factor=1 / 3)
    assert (experiment.epochs, experiment.batch_size, experiment.clip_norm) == (12, 16, 35.0)
    assert (experiment.resize.short, experiment.resize.long, experiment.flip) == (800, 1333, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate"),
        ({"cuda_graphs": True}, "compile=true as well"),
        ({"scale_mode": "range"}, "scale_mode: 'range' needs the two ends"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment(model=faster_rcnn, **settings)


def test_build_calls_inner_parts_first() -> None:
    part = partial(pair, left=partial(pair, left=partial(head, width=3, num_classes=1)))
    assert build(part) == (({"width": 3, "num_classes": 1, "activation": "relu"}, 2), 2)


def test_a_part_may_be_a_function() -> None:
    model = build(partial(proposal_network, backbone=partial(resnet_fpn, depth=18)), num_classes=5)
    assert isinstance(model, nn.Module)
    assert model.backbone.channels == [256] * 5


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (partial(head), "width"),
        (partial(head, width=3, colour="red"), "colour"),
        (partial(head, width=3, num_classes=4), "num_classes"),
        (partial(pair, 3), "by name"),
    ],
)
def test_build_names_the_wrong_argument(part: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(part, num_classes=2)


def test_json_includes_defaults() -> None:
    data = to_json(EXPERIMENT)
    assert data["call"] == "boxwright.training.experiment.Experiment"
    assert data["arguments"]["flip"] == 0.5
    model = data["arguments"]["model"]
    assert model["call"] == "boxwright.detectors.rcnn.faster_rcnn"
    assert model["arguments"]["backbone"]["arguments"] == {
        "depth": 18,
        "style": "pytorch",
        "norm": "frozen_bn",
        "frozen_stages": 1,
        "train_norm_affine": True,
        "out_stages": [2, 3, 4, 5],
        "groups": 1,
        "width_per_group": 64,
        "recompute": False,
        "channels": 64,
        "extra": "pool",
        "extra_relu": False,
        "fpn_norm": None,
    }
    assert model["arguments"]["box"]["arguments"]["stds"] == [0.1, 0.1, 0.2, 0.2]
    assert "num_classes" not in model["arguments"]


def test_json_round_trip() -> None:
    loaded = through_json(EXPERIMENT)
    assert to_json(loaded) == to_json(EXPERIMENT)
    assert replace(loaded, model=EXPERIMENT.model) == EXPERIMENT
    assert loaded.model.keywords["pixel_stats"] == CAFFE
    assert loaded.model.keywords["rpn"] == RPNConfig(ratios=(1.0,), low_quality=None)
    assert loaded.model.keywords["box"] == BoxConfig()


def test_a_module_of_the_user_must_be_trusted() -> None:
    experiment = Experiment(model=partial(tiny_detector, dropout=0.2))
    with pytest.raises(ValueError, match=r"training\.fakes\.tiny_detector is not Boxwright's"):
        through_json(experiment)
    loaded = through_json(experiment, trusted_modules=["training"])
    assert isinstance(loaded.model, partial)
    assert loaded.model.func is tiny_detector
    assert loaded.model.keywords == {"dropout": 0.2, "norm": True}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("os.system", {"command": "true"}, "not Boxwright's"),
        ("boxwrightx.model", {}, "not Boxwright's"),
        ("boxwright.training.run_folder.shutil.rmtree", {}, "neither a part"),
        ("boxwright.__main__.app", {}, "neither a part"),
        ("boxwright.training.run_folder.shutil", {}, "neither a part"),
        ("boxwright.training.experiment.field", {}, "neither a part"),
        ("boxwright.training.run_folder.write_json", {"path": "x", "data": {}}, "neither a part"),
        ("boxwright.detectors.rcnn.mask_rcnn_of_tomorrow", {}, "does not exist"),
        ("boxwright.detectors.rcnn.faster_rcnn", {"backbones": 1}, "did you mean 'backbone'"),
        ("boxwright.heads.rpn_head.RPNConfig", {"nms_iuo": 1}, "did you mean 'nms_iou'"),
        ("boxwright.training.experiment.Experiment", {}, "model"),
        ("boxwright.data.buckets.Resize", {}, "expected the JSON of an Experiment"),
    ],
)
def test_json_may_call_only_parts_and_settings(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json({"call": name, "arguments": arguments})


@pytest.mark.parametrize("data", [None, [], {"call": "x"}, {"call": 3, "arguments": {}}, "experiment"])
def test_json_that_is_not_an_experiment_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"expected the JSON of an Experiment|invalid experiment"):
        from_json(data)


@pytest.mark.parametrize("value", [nn.ReLU(), {"a": 1}, dict, print, partial(nn.ReLU())])
def test_values_without_a_json_form_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a number, string, bool, None"):
        to_json(partial(pair, left=value))


def test_functions_without_an_importable_name_are_refused() -> None:
    with pytest.raises(ValueError, match="top of an importable module"):
        to_json(Experiment(model=lambda num_classes: nn.Identity()))


def test_every_field_has_a_docstring() -> None:
    source = Path(experiment_module.__file__).read_text()
    for settings in (SGD, AdamW, StepSchedule, CosineSchedule, Experiment):
        body = source.partition(f"class {settings.__name__}:")[2]
        for field in fields(settings):
            after = body.partition(f"    {field.name}: ")[2].splitlines()[1]
            assert after.startswith('    """'), f"{settings.__name__}.{field.name}"

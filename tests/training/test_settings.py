from __future__ import annotations

import json
from functools import partial

import pytest

from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.augment import Photometric
from boxwright.data.buckets import Resize
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.training.experiment import AdamW, Experiment, arguments_of, from_json, to_json
from boxwright.training.settings import describe, with_settings

EXPERIMENT = Experiment(model=partial(faster_rcnn, backbone=partial(resnet_fpn, depth=50)))


def value_at(experiment: Experiment, name: str) -> object:
    value: object = experiment
    for part in name.split("."):
        value = arguments_of(value)[part]
    return value


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimizer.lr=0.01", 0.01),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=1", 1.0),
        ("epochs=24", 24),
        ("schedule.epochs=16,22", (16, 22)),
        ("schedule.epochs=(16, 22)", (16, 22)),
        ("schedule.epochs=[20]", (20,)),
        ("clip_norm=none", None),
        ("clip_norm=1", 1.0),
        ("ema_decay=0.99", 0.99),
        ("compile=true", True),
        ("compile=False", False),
        ("precision=bfloat16", "bfloat16"),
        ("scale_jitter=0.5,2", (0.5, 2.0)),
        ("scale_jitter=none", None),
        ("scales=(640,1333),(800,1333)", ((640, 1333), (800, 1333))),
        ("scales=((640, 1333), (800, 1333),)", ((640, 1333), (800, 1333))),
        ("scales=(640,1333)", ((640, 1333),)),
        ("scales=none", None),
        ("optimizer=AdamW", AdamW()),
        ("photometric=Photometric", Photometric()),
        ("model.backbone.depth=101", 101),
        ("model.backbone.style=caffe", "caffe"),
        ("model.backbone.fpn_norm=gn", "gn"),
        ("model.rpn.ratios=1,2", (1.0, 2.0)),
        ("model.rpn.border=none", None),
        ("model.box.stds=1,1,2,2", (1.0, 1.0, 2.0, 2.0)),
        ("model.pixel_stats.order=bgr", "bgr"),
        ("model.conventions.plus_one=1", 1.0),
    ],
)
def test_set_one_field(setting: str, value: object) -> None:
    changed = with_settings(EXPERIMENT, [setting])
    name = setting.partition("=")[0]
    actual = value_at(changed, name)
    assert actual == value
    assert type(actual) is type(value)
    # The other fields and the original experiment are unchanged.
    before, after = _leaves(to_json(EXPERIMENT)), _leaves(to_json(changed))
    assert all(before[leaf] == after[leaf] for leaf in before if leaf in after and not leaf.startswith(name))


def _leaves(data: object, name: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {name: data}
    leaves = {}
    for key, value in data["arguments"].items():
        leaves.update(_leaves(value, f"{name}.{key}" if name else key))
    return leaves


def test_described_scales_can_be_set() -> None:
    scaled = with_settings(EXPERIMENT, ["scales=(640,1333),(800,1333)", "scale_mode=range"])
    assert (described := [line for line in describe(scaled).splitlines() if line.startswith("scale")]) == [
        "scales = (640,1333),(800,1333)",
        "scale_mode = range",
        "scale_jitter = none",
    ]
    assert with_settings(EXPERIMENT, [line.replace(" ", "") for line in described]) == scaled
    assert from_json(json.loads(json.dumps(to_json(scaled)))).scales == ((640, 1333), (800, 1333))


def test_settings_apply_together() -> None:
    # One by one, the first change would make the short side longer than the long side.
    assert with_settings(EXPERIMENT, ["resize.short=1500", "resize.long=2500"]).resize == Resize(1500, 2500)
    changed = with_settings(EXPERIMENT, ["optimizer.lr=0.5", "optimizer=AdamW", "epochs=3", "epochs=4"])
    assert (changed.optimizer, changed.epochs) == (AdamW(lr=0.5), 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimiser.lr=0.01", "the experiment has no 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.leaning_rate=0.01", "optimizer has no 'leaning_rate'; there are lr, momentum"),
        ("model.backbone.dept=18", "model.backbone has no 'dept'; did you mean 'depth'"),
        ("model.rpn.nms_iuo=0.5", "model.rpn has no 'nms_iuo'; did you mean 'nms_iou'"),
        ("epochs=1.5", "epochs: expected a whole number, got '1.5'"),
        (
            "scales=640,1333",
            "expected groups in parentheses, each with 2 values separated by commas, each a whole number or none",
        ),
        ("scales=(640,1333),800", "expected groups in parentheses"),
        ("scales=(640,1333,2)", "expected groups in parentheses"),
        ("scales=(1333,640)", "expected 1 <= short <= long"),
        ("scale_mode=value", "expected 'list' or 'range', got 'value'"),
        ("optimizer.lr=fast", "expected a number, got 'fast'"),
        ("optimizer.lr=nan", "expected a number, got 'nan'"),
        ("clip_norm=", "expected a number or none, got ''"),
        ("compile=yes", "expected true or false, got 'yes'"),
        ("precision=fp16", "expected 'auto' or 'float32' or 'bfloat16', got 'fp16'"),
        ("scale_jitter=1", "expected 2 values separated by commas, each a number or none"),
        ("schedule.epochs=8,x", "each a whole number"),
        ("optimizer=Adam", "expected SGD or AdamW, got 'Adam'"),
        ("model=faster_rcnn", "set its arguments, or replace it in Python"),
        ("model.box.box_loss=iou", r"expected 'smooth_l1' or 'giou' or 'diou' or 'ciou', got 'iou'$"),
        ("photometric.brightness=0.5", "photometric is none and has no field 'brightness'"),
        ("epochs.first=2", "epochs is 12 and has no field 'first'"),
        ("epochs", "expected name=value"),
        ("epochs=0", "at least 1"),
        ("resize.short=2000", "short <= long"),
    ],
)
def test_wrong_settings_name_the_valid_ones(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(EXPERIMENT, [setting])


def unannotated(*, num_classes, depth=3, **options):
    raise NotImplementedError


def test_arguments_without_annotations_can_be_set() -> None:
    experiment = Experiment(model=partial(unannotated, drop_path=0.1))
    changed = with_settings(experiment, ["model.depth=5", "model.drop_path=0.2"])
    assert arguments_of(changed.model) == {"depth": 5, "drop_path": 0.2}


def test_everything_that_describe_prints_can_be_set() -> None:
    text = describe(EXPERIMENT)
    lines = text.splitlines()
    start = lines.index("model = faster_rcnn")
    assert lines[start + 1 : start + 3] == ["  backbone = resnet_fpn", "    depth = 50"]
    for line in (
        "  num_classes = (passed when it is built)",
        "  rpn = RPNConfig",
        "    ratios = 0.5,1.0,2.0",
        "optimizer = SGD",
        "  lr = 0.02",
        "ema_decay = none",
        "compile = false",
    ):
        assert line in lines
    settings, path = [], []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, value = line.strip().partition(" = ")
        path[depth:] = [name]
        # A part cannot be set by its name, and pixel statistics have no defaults.
        if not value.startswith("(") and name not in ("model", "backbone", "pixel_stats", "rpn_head", "box_head"):
            settings.append(f"{'.'.join(path)}={value}")
    assert to_json(with_settings(EXPERIMENT, settings)) == to_json(EXPERIMENT)

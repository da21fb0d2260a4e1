"""What a plan makes of what the user asks for."""

from __future__ import annotations

import msgspec
import pytest
import torch

from boxwright.benchmark.plan import PHASES, Plan, computes_in, parse_phases, parse_precision, parse_size
from boxwright.data.buckets import Resize


def test_a_size_replaces_the_recipes_and_all_that_would_change_it_again() -> None:
    recipe = "faster_rcnn_r18_fpn_small"
    assert Plan(recipe=recipe).experiment().scale_jitter is not None
    experiment = Plan(recipe=recipe, size=(1333, 800), settings=["scales=(640,1333),(800,1333)"]).experiment()
    assert experiment.resize == Resize(short=800, long=1333)
    assert experiment.scales is None
    assert experiment.scale_jitter is None
    assert experiment.crop is None


def test_settings_and_precision_are_those_of_the_plan() -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", settings=["model.backbone.channels=32"], precision="bfloat16")
    experiment = plan.experiment()
    assert experiment.precision == "bfloat16"
    assert experiment.model.keywords["backbone"].keywords["channels"] == 32


def test_images_at_a_time_are_the_recipes_in_training_and_one_in_inference_unless_given() -> None:
    experiment = Plan(recipe="rpn_r18_fpn_small").experiment()
    plain, given = Plan(recipe="rpn_r18_fpn_small"), Plan(recipe="rpn_r18_fpn_small", batch=3)
    assert [plain.batch_size(experiment, training=t) for t in (True, False)] == [experiment.images_per_device, 1]
    assert [given.batch_size(experiment, training=t) for t in (True, False)] == [3, 3]


def test_another_process_gets_the_same_plan() -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", size=(64, 96), settings=["epochs=1"], peer="torchvision", threads=1)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_auto_is_float32_on_the_cpu() -> None:
    assert computes_in(torch.device("cpu"), "auto") == "float32"
    assert computes_in(torch.device("cpu"), "bfloat16") == "bfloat16"


def test_phases_come_in_their_own_order_and_all_where_none_is_named() -> None:
    assert parse_phases("flops, train") == ["train", "flops"]
    assert parse_phases("") == list(PHASES)


@pytest.mark.parametrize("text", ["640", "640x", "16x640", "-640x640", "640X640"])
def test_a_wrong_size_is_told_with_a_right_one(text: str) -> None:
    with pytest.raises(ValueError, match="such as 640x640"):
        parse_size(text)


def test_a_wrong_phase_or_precision_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'infer'"):
        parse_phases("train,infr")
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        parse_precision("float16")
    with pytest.raises(ValueError, match="there is no recipe"):
        Plan(recipe="faster_rcnn").experiment()

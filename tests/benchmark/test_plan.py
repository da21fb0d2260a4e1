"""A plan applies the user's options to the recipe, and the parsers reject invalid options."""

from __future__ import annotations

import msgspec
import pytest
import torch

from boxwright.benchmark.plan import PHASES, Plan, parse_phases, parse_precision, parse_size, resolve_precision
from boxwright.data.buckets import Resize


def test_a_size_replaces_the_resize_and_disables_scale_augmentation() -> None:
    recipe = "faster_rcnn_r18_fpn_small"
    assert Plan(recipe=recipe).experiment().scale_jitter is not None
    experiment = Plan(recipe=recipe, size=(1333, 800), settings=["scales=(640,1333),(800,1333)"]).experiment()
    assert experiment.resize == Resize(short=800, long=1333)
    assert experiment.scales is None
    assert experiment.scale_jitter is None
    assert experiment.crop is None


def test_settings_and_precision_override_the_recipe() -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", settings=["model.backbone.channels=32"], precision="bfloat16")
    experiment = plan.experiment()
    assert experiment.precision == "bfloat16"
    assert experiment.model.keywords["backbone"].keywords["channels"] == 32


def test_the_default_batch_size_is_the_recipes_in_training_and_1_in_inference() -> None:
    experiment = Plan(recipe="rpn_r18_fpn_small").experiment()
    default, with_batch = Plan(recipe="rpn_r18_fpn_small"), Plan(recipe="rpn_r18_fpn_small", batch=3)
    assert [default.batch_size(experiment, training=t) for t in (True, False)] == [experiment.images_per_device, 1]
    assert [with_batch.batch_size(experiment, training=t) for t in (True, False)] == [3, 3]


def test_a_plan_survives_json() -> None:
    plan = Plan(recipe="rpn_r18_fpn_small", size=(64, 96), settings=["epochs=1"], peer="torchvision", threads=1)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_auto_is_float32_on_the_cpu() -> None:
    assert resolve_precision(torch.device("cpu"), "auto") == "float32"
    assert resolve_precision(torch.device("cpu"), "bfloat16") == "bfloat16"


def test_phases_are_sorted_and_default_to_all() -> None:
    assert parse_phases("flops, train") == ["train", "flops"]
    assert parse_phases("") == list(PHASES)


@pytest.mark.parametrize("text", ["640", "640x", "16x640", "-640x640", "640X640"])
def test_an_invalid_size_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 640x640"):
        parse_size(text)


def test_an_unknown_phase_precision_or_recipe_is_rejected() -> None:
    with pytest.raises(ValueError, match="did you mean 'infer'"):
        parse_phases("train,infr")
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        parse_precision("float16")
    with pytest.raises(ValueError, match="there is no recipe"):
        Plan(recipe="faster_rcnn").experiment()

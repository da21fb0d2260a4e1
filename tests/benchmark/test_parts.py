"""Parts sum to the total, their times are exclusive, and all wrappers are removed afterwards."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

import boxwright.heads.box_head
from boxwright.benchmark.parts import Stopwatch, time_parts
from boxwright.benchmark.system import BoxwrightSystem
from boxwright.recipes import find_recipe
from factory import random_batch, small_detector

CPU = torch.device("cpu")
COMMON = {"pixels", "backbone", "pyramid"}
TRAINING = COMMON | {"backward", "optimizer", "rest"}
EXPECTED = {
    ("rpn", "train"): TRAINING | {"RPN head", "RPN matching, sampling and losses"},
    ("retinanet", "infer"): COMMON | {"RetinaNet head", "scores to detections", "NMS", "post-processing", "rest"},
    ("mask_rcnn", "train"): TRAINING
    | {"RPN head", "proposals", "NMS", "RPN matching, sampling and losses", "matching and sampling", "RoIAlign"}
    | {"box head", "box losses", "mask head", "mask targets and losses"},
    ("cascade_mask_rcnn", "infer"): COMMON
    | {"RPN head", "proposals", "NMS", "box head", "mask head", "RoIAlign", "scores to detections"}
    | {"post-processing", "rest"},
}


def make_system(family: str, task: str) -> BoxwrightSystem:
    experiment = replace(find_recipe("rpn_r18_fpn_small")(), precision="float32")
    return BoxwrightSystem(small_detector(family), experiment, device=CPU, training=task == "train", compiled=False)


@pytest.mark.parametrize(("family", "task"), EXPECTED)
def test_every_part_is_timed_and_all_sum_to_the_total(family: str, task: str) -> None:
    whole, parts = time_parts(make_system(family, task), random_batch(), task, iterations=2, warmup=0, device=CPU)
    assert set(parts) == EXPECTED[family, task]
    assert len(whole) == 2
    for iteration, seconds in enumerate(whole):
        assert all(part[iteration] >= 0 for part in parts.values())
        assert sum(part[iteration] for part in parts.values()) == pytest.approx(seconds)


def test_a_slow_method_counts_to_its_part_only() -> None:
    system = make_system("faster_rcnn", "infer")
    proposals = system.detector.rpn.proposals

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(0.3)
        return proposals(*args, **kwargs)

    system.detector.rpn.proposals = slow
    whole, parts = time_parts(system, random_batch(), "infer", iterations=1, warmup=1, device=CPU)
    assert parts["proposals"][0] >= 0.3
    assert sum(seconds[0] for name, seconds in parts.items() if name != "proposals") == pytest.approx(
        whole[0] - parts["proposals"][0]
    )


def test_all_wrappers_are_removed() -> None:
    system = make_system("mask_rcnn", "train")
    before = (torch.autograd.backward, boxwright.heads.box_head.multilevel_roi_align, system.optimizer.step)
    time_parts(system, random_batch(), "train", iterations=1, warmup=0, device=CPU)
    assert (torch.autograd.backward, boxwright.heads.box_head.multilevel_roi_align, system.optimizer.step) == before
    for module in system.detector.modules():
        assert not vars(module).keys() & {"forward", "losses", "losses_of", "sample", "proposals", "detect"}


def test_nested_parts_have_exclusive_times() -> None:
    watch = Stopwatch(CPU)
    with watch.part("outer"):
        time.sleep(0.01)
        for _ in range(2):
            with watch.part("inner"):
                time.sleep(0.1)
    assert watch.seconds["inner"] >= 0.2
    assert 0.01 <= watch.seconds["outer"] < 0.1

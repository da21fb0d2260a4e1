"""Invalid arguments and settings are refused early, with their name, the allowed values and the actual value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boxwright.benchmark.bench import Bench
from boxwright.benchmark.plan import Plan
from boxwright.checks import check_count, check_device, check_number
from boxwright.data.augment import Augment, Photometric
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize, plan_scales
from boxwright.data.dataset import Category
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.detectors.cascade_rcnn import CascadeConfig
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.evaluate import detect_dataset
from boxwright.evaluation.propose import propose
from boxwright.evaluation.views import evaluate_views, views_of
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.ops.nms import nms
from boxwright.ops.soft_nms import soft_nms
from boxwright.predictor import Predictor, load
from boxwright.training.distributed import process_group
from boxwright.training.ema import EMA
from boxwright.training.experiment import SGD, AdamW, CosineSchedule, Experiment, StepSchedule
from boxwright.training.loop import train
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep
from generated_images import GeneratedImagesWithInfo
from small_model import small_run
from training.fakes import MODEL, FakeImages, tiny_detector

RESIZE = Resize(64, 107)
CATEGORIES = [Category(id=1, name="one"), Category(id=5, name="two")]
HALF = "expected a number in 0..1"


def experiment(**changes: Any) -> Experiment:
    return Experiment(model=MODEL, **changes)


def training_loader(**changes: Any) -> TrainingLoader:
    arguments = {"augmentation": Augmentation(resize=RESIZE), "batch_size": 2, "seed": 0, "num_workers": 0, **changes}
    return TrainingLoader(GeneratedImagesWithInfo(4), **arguments)


def evaluation_loader(**changes: Any) -> EvaluationLoader:
    arguments = {"resize": RESIZE, "batch_size": 2, "num_workers": 0, **changes}
    return EvaluationLoader(GeneratedImagesWithInfo(4), **arguments)


def step(**changes: Any) -> TrainStep:
    detector = tiny_detector(2)
    arguments = {"device": torch.device("cpu"), **changes}
    return TrainStep(detector, build_optimizer(SGD(), detector), **arguments)


def train_briefly(**changes: Any) -> Path:
    return train(experiment(), FakeImages(), Path("never-made"), **changes)


def suppress(function: Callable[..., Any], **changes: Any) -> Any:
    boxes, scores, labels = torch.zeros(1, 1, 4), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    arguments = {"iou_threshold": 0.5, "max_keep": 1, **changes}
    return function(boxes, scores, labels, labels == 0, **arguments)


def soft(**changes: Any) -> Any:
    return suppress(soft_nms, **{"decay": "linear", "sigma": 0.5, "min_score": 0.0, **changes})


CASES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (
        detect_dataset,
        {"detector": tiny_detector(2), "batches": [], "device": "cpu", "precision": "half"},
        "precision: expected",
    ),
    (detect_dataset, {"detector": tiny_detector(2), "batches": [], "device": "cpu", "limit": 0}, "limit: expected"),
    (views_of, {"resize": RESIZE, "shorts": [0]}, "short: expected"),
    (experiment, {"precision": "nonsense"}, "precision: expected 'auto' or 'float32' or 'bfloat16'"),
    (experiment, {"epochs": 0}, "epochs: expected a whole number, at least 1"),
    (experiment, {"epochs": 1.5}, "epochs: expected a whole number"),
    (experiment, {"seed": -1}, "seed: expected"),
    (experiment, {"flip": 2}, f"flip: {HALF}"),
    (experiment, {"scale_mode": "both"}, "scale_mode: "),
    (experiment, {"scale_jitter": (2.0, 1.0)}, "scale_jitter: expected"),
    (experiment, {"crop": 1.5}, "crop: expected"),
    (experiment, {"clip_norm": 0.0}, "clip_norm: expected a number above 0"),
    (SGD, {"lr": -0.1}, "lr: expected a number, at least 0"),
    (SGD, {"lr": float("nan")}, "lr: expected"),
    (SGD, {"momentum": 1.1}, f"momentum: {HALF}"),
    (AdamW, {"weight_decay": -1.0}, "weight_decay: expected"),
    (AdamW, {"betas": (0.9, 1.0)}, "betas: "),
    (StepSchedule, {"epochs": (0,)}, "epochs: expected"),
    (StepSchedule, {"warmup_steps": -1}, "warmup_steps: expected"),
    (CosineSchedule, {"final_factor": 2.0}, f"final_factor: {HALF}"),
    (RPNConfig, {"positive_iou": 70}, f"positive_iou: {HALF}"),
    (RPNConfig, {"num_sampled": 0}, "num_sampled: expected"),
    (RPNConfig, {"ratios": (0.5, 0.0)}, "ratios: expected a number above 0"),
    (BoxConfig, {"score_threshold": 50}, f"score_threshold: {HALF}"),
    (BoxConfig, {"nms": "soft"}, "nms: expected 'hard' or 'linear' or 'gaussian'"),
    (BoxConfig, {"max_detections": 0}, "max_detections: expected"),
    (BoxConfig, {"stds": (0.1, 0.1, 0.2, 0.0)}, "stds: expected"),
    (RetinaConfig, {"nms_iou": -0.5}, f"nms_iou: {HALF}"),
    (RetinaConfig, {"prior": 1.0}, "prior: expected"),
    (MaskConfig, {"norm": "bn"}, "norm: expected None or 'gn' or 'frozen_bn'"),
    (MaskConfig, {"width": 0}, "width: expected"),
    (CascadeConfig, {"positive_ious": (0.6, 7.0)}, f"positive_ious: {HALF}"),
    (CascadeConfig, {"mean_of": "boxes"}, "mean_of: expected"),
    (Resize, {"short": 0, "long": 10}, "short: expected"),
    (Resize, {"short": 640.5, "long": 800}, "short: expected a whole number"),
    (Photometric, {"contrast": 2.0}, f"contrast: {HALF}"),
    (Augment, {"flip": float("nan")}, "flip: expected"),
    (Augmentation, {"scale_mode": "range"}, "scale_mode: 'range' needs"),
    (plan_scales, {"sizes": [(64, 107)], "mode": "all"}, "scale_mode: expected"),
    (training_loader, {"num_workers": -1}, "num_workers: expected"),
    (training_loader, {"rank": 2, "world_size": 2}, "rank: expected a number in 0..1"),
    (training_loader, {"start_method": "thread"}, "start_method: expected"),
    (training_loader, {"seed": -1}, "seed: expected"),
    (evaluation_loader, {"batch_size": 0}, "batch_size: expected"),
    (evaluation_loader, {"num_workers": 1.5}, "num_workers: expected"),
    (step, {"precision": "float16"}, "precision: expected"),
    (step, {"clip_norm": -1.0}, "clip_norm: expected"),
    (EMA, {"model": tiny_detector(2), "decay": 1.5}, f"decay: {HALF}"),
    (train_briefly, {"num_workers": -1}, "num_workers: expected"),
    (train_briefly, {"log_every": 0}, "log_every: expected"),
    (train_briefly, {"checkpoint_every": -5}, "checkpoint_every: expected"),
    (train_briefly, {"allowed_non_finite": -1}, "allowed_non_finite: expected"),
    (suppress, {"function": nms, "iou_threshold": 50}, f"iou_threshold: {HALF}"),
    (suppress, {"function": nms, "max_keep": -1}, "max_keep: expected"),
    (soft, {"decay": "cubic"}, "decay: expected"),
    (soft, {"sigma": 0.0}, "sigma: expected"),
    (
        coco_metrics,
        {"ground_truth": GeneratedImagesWithInfo(2), "results": None, "max_detections": (1, 0, 9)},
        "max_detections",
    ),
    (evaluate_views, {"detector": None, "dataset": None, "views": [], "device": "cpu"}, "views: expected at least one"),
    (load, {"place": "nothing", "precision": "double"}, "precision: expected"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "message"), CASES, ids=[f"{case[0].__name__}-{case[2]}" for case in CASES]
)
def test_an_invalid_value_is_refused_with_the_allowed_values(
    function: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert message in str(caught.value)


def test_the_score_of_predictions_is_a_probability(tmp_path: Path) -> None:
    predictor = load(small_run(tmp_path, CATEGORIES))
    image = np.zeros((32, 48, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^score: expected a number in 0\.\.1, got 50$"):
        predictor.predict(image, score=50)
    assert len(predictor.predict(image, score=1)) == 0


def test_numpy_numbers_are_accepted_and_booleans_are_not() -> None:
    check_count("count", np.int64(3))
    check_number("share", np.float32(0.5), 0, 1)
    for check in (check_count, check_number):
        with pytest.raises(ValueError, match=r"name: expected .*, got True"):
            check("name", True)


DEVICES = {
    "mps": "device: expected cpu, cuda or cuda:N, got 'mps', which is not supported. Use --device cpu",
    "xpu": "is not supported",
    "meta": "is not supported",
    "gpu": "device: expected cpu, cuda or cuda:N, got 'gpu'",
    "CPU": "device: expected cpu, cuda or cuda:N, got 'CPU'",
    "": "device: expected cpu, cuda or cuda:N, got ''",
    "cpu:3": "there is only one CPU device",
    "cuda": "PyTorch finds no CUDA device on this machine. Use --device cpu",
    "cuda:9": "PyTorch finds no CUDA device",
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_that_cannot_be_used_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        check_device(name)
    assert DEVICES[name] in str(caught.value)


def test_a_missing_gpu_is_refused_with_the_existing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:9': this machine has 2 CUDA devices\. Use cuda:0 to cuda:1"):
        check_device("cuda:9")


def test_every_entry_point_refuses_an_unsupported_device(tmp_path: Path) -> None:
    run, detector = small_run(tmp_path, CATEGORIES), tiny_detector(2)
    entry_points: list[Callable[[], Any]] = [
        lambda: process_group("mps").__enter__(),
        lambda: load(run, device="mps"),
        lambda: load("no-such-model", device="mps"),
        lambda: Predictor(detector, experiment=experiment(), categories=CATEGORIES, device="mps"),
        lambda: train_briefly(device="mps"),
        lambda: step(device=torch.device("mps")),
        lambda: detect_dataset(detector, [], device="mps"),
        lambda: propose(detector, GeneratedImagesWithInfo(2), [], device="mps"),
        lambda: Bench(Plan(recipe="faster_rcnn_r18_fpn_small", device="mps")),
    ]
    for entry_point in entry_points:
        with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'mps', which is not supported"):
            entry_point()

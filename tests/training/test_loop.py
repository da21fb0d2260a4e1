from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from boxwright.training.experiment import SGD, AdamW, CosineSchedule, Experiment, build
from boxwright.training.interrupt import TrainingInterrupted
from boxwright.training.loop import Training, train
from boxwright.training.non_finite import NonFiniteError, load_batches
from boxwright.weights.ours import save_weights
from training.fakes import FakeImages, float64_detector, masked_detector, nan_detector, tiny_detector
from training.runs import (
    FLOAT32_LOG,
    assert_same_run,
    assert_same_tensors,
    curve,
    real_experiments,
    start_python,
    tiny_experiment,
)

EXPERIMENTS = {
    "sgd": tiny_experiment(),
    "adamw": tiny_experiment(
        optimizer=AdamW(lr=0.01), schedule=CosineSchedule(warmup_steps=3), accumulate=2, images_per_device=2, epochs=3
    ),
    "multi-scale": tiny_experiment(scales=((24, 32), (100, 100)), scale_mode="range", epochs=3),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
@pytest.mark.parametrize("stop", [5, 8])
def test_resumed_run_equals_the_uninterrupted_run(experiment: Experiment, stop: int, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"num_workers": 0, "checkpoint_every": stop, "evaluate": _sum_of_parameters}
    train(experiment, FakeImages(), whole, **options)
    shutil.copytree(whole / "checkpoints" / f"step_{stop}", resumed / "checkpoints" / f"step_{stop}")
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines of later steps, which must be removed
    train(experiment, FakeImages(), resumed, resume=True, **options)
    assert_same_run(whole, resumed)


def test_interval_interrupted_by_a_checkpoint_is_logged_completely(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out, resume in ((whole, False), (resumed, True)):
        train(tiny_experiment(), FakeImages(), out, num_workers=0, log_every=5, checkpoint_every=7, resume=resume)
        if out == whole:
            shutil.copytree(whole / "checkpoints" / "step_7", resumed / "checkpoints" / "step_7")
            shutil.copy(whole / "metrics.jsonl", resumed)
    assert [line["step"] for line in curve(whole)] == [5, 10, 15, 20]
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_run_stopped_by_a_signal_resumes(signal_number: signal.Signals, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny_experiment(), FakeImages(), whole, num_workers=0)
    run = Training(tiny_experiment(), FakeImages(), stopped, num_workers=0)
    one_step = run._one_step

    def one_step_with_signal(batches: object) -> None:
        if run.step == 9:
            os.kill(os.getpid(), signal_number)
        one_step(batches)  # type: ignore[arg-type]

    run._one_step = one_step_with_signal  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match=f"{signal_number.name}.*step_10.*--resume") as caught:
        run.run()
    assert caught.value.signal_number == signal_number
    assert caught.value.checkpoint.is_dir()
    train(tiny_experiment(), FakeImages(), stopped, num_workers=0, resume=True)
    assert_same_run(whole, stopped)


def test_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    """SIGKILL at a random moment, often during a save, because every second step saves."""
    code = """
from pathlib import Path
from training.fakes import FakeImages
from training.runs import tiny_experiment
from boxwright.training.loop import train
train(tiny_experiment(epochs=8), FakeImages(), Path({out!r}), num_workers=0, checkpoint_every=2, resume=True)
"""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny_experiment(epochs=8), FakeImages(), whole, num_workers=0, checkpoint_every=2)
    process = start_python(code.format(out=str(killed)))
    while process.poll() is None and not (killed / "checkpoints" / "step_4").is_dir():
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(tiny_experiment(epochs=8), FakeImages(), killed, num_workers=0, checkpoint_every=2, resume=True)
    assert_same_run(whole, killed)
    assert not list((killed / "checkpoints").glob(".*"))


def test_two_ranks_train_like_one_process(tmp_path: Path) -> None:
    """Half of the images have no object, so that in some steps a rank has no object."""
    code = """
from pathlib import Path
from functools import partial
from training.fakes import FakeImages, float64_detector
from training.runs import tiny_experiment
from boxwright.training.distributed import process_group
from boxwright.training.loop import train
experiment = tiny_experiment(model=partial(float64_detector), images_per_device=1, accumulate=2)
with process_group("cpu") as device:
    train(experiment, FakeImages(empty=frozenset(range(0, 16, 2))), Path({out!r}), device=device, num_workers=0)
"""
    one, two = tmp_path / "one", tmp_path / "two"
    model = partial(float64_detector)
    images = FakeImages(empty=frozenset(range(0, 16, 2)))
    train(tiny_experiment(model=model, accumulate=2, images_per_device=2), images, one, num_workers=0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [start_python(code.format(out=str(two)), RANK=str(i), LOCAL_RANK=str(i), **environment) for i in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for line, other in zip(curve(one), curve(two), strict=True):
        assert line["step"] == other["step"]
        assert line["total"] == pytest.approx(other["total"], rel=FLOAT32_LOG)
        assert line["losses"] == pytest.approx(other["losses"], rel=FLOAT32_LOG)
    # One process can resume the run of two, because the number of images per step is the same.
    moved = tmp_path / "moved"
    shutil.copytree(two / "checkpoints" / "step_4", moved / "checkpoints" / "step_4")
    experiment = tiny_experiment(model=model, accumulate=2, images_per_device=2)
    train(experiment, images, moved, num_workers=0, resume=True)
    for line, other in zip(curve(moved), curve(two)[-len(curve(moved)) :], strict=True):
        assert line["losses"] == pytest.approx(other["losses"], rel=FLOAT32_LOG)
    with pytest.raises(ValueError, match="processes x accumulate: 4 -> 2"):
        train(replace(experiment, images_per_device=1), images, moved, num_workers=0, resume=True)


@pytest.mark.parametrize("allowed", [0, 2])
def test_batch_of_a_non_finite_step_is_saved_and_repeats_the_error(allowed: int, tmp_path: Path) -> None:
    experiment = tiny_experiment(model=partial(nan_detector, bad_image=103))
    run = Training(experiment, FakeImages(), tmp_path, num_workers=0, log_every=10, allowed_non_finite=allowed)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite on images \[.*103.*\]"):
        run.run()
    saved = sorted((tmp_path / "non_finite").glob("step_*.safetensors"))
    assert len(saved) == allowed + 1, "one file per skipped step, and one for the step that ended the run"
    assert all(torch.isfinite(parameter).all() for parameter in run.detector.parameters())
    (batch,) = load_batches(saved[-1])
    assert 103 in batch.image_ids
    assert not torch.stack(list(run.detector.losses(batch).values())).sum().isfinite()


def test_allowed_non_finite_steps_are_skipped(tmp_path: Path) -> None:
    experiment = tiny_experiment(model=partial(nan_detector, bad_image=103))
    weights = train(experiment, FakeImages(), tmp_path, num_workers=0, allowed_non_finite=5)
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 21))
    assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_resuming_with_another_experiment_names_the_changed_fields(tmp_path: Path) -> None:
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    changed = tiny_experiment(epochs=1, optimizer=SGD(lr=0.5), flip=0.0)
    with pytest.raises(ValueError, match=r"flip: 0.5 -> 0.0; optimizer.lr: 0.01 -> 0.5"):
        train(changed, FakeImages(), tmp_path, num_workers=0, resume=True)


def test_resuming_on_another_data_set_is_refused(tmp_path: Path) -> None:
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    with pytest.raises(ValueError, match=r"steps_per_epoch: 4 -> 5"):
        train(tiny_experiment(epochs=1), FakeImages(20), tmp_path, num_workers=0, resume=True)


def test_resuming_writes_weights_that_a_killed_run_did_not_write(tmp_path: Path) -> None:
    weights = train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    original = weights.rename(tmp_path / "original.safetensors")
    assert train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0, resume=True) == weights
    assert_same_tensors(original, weights)


def test_file_in_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run is a file"):
        train(tiny_experiment(epochs=1), FakeImages(), tmp_path / "run", num_workers=0)


def test_resuming_a_finished_run_logs_that_it_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0, resume=True).is_file()
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_new_run_does_not_overwrite_another(tmp_path: Path) -> None:
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    with pytest.raises(ValueError, match="--resume"):
        train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)


def test_evaluation_runs_every_n_epochs_and_again_after_an_interrupted_one(tmp_path: Path) -> None:
    steps = []

    def evaluate(detector: nn.Module) -> dict[str, float]:
        steps.append(run.step)
        return {"AP": run.step / 100}

    experiment = tiny_experiment(evaluate_every=2)
    run = Training(experiment, FakeImages(), tmp_path, num_workers=0, evaluate=evaluate)
    run.run()
    assert steps == [8, 16, 20]
    lines = [line for line in curve(tmp_path) if line["kind"] == "evaluation"]
    assert [(line["step"], line["metrics"]["AP"]) for line in lines] == [(8, 0.08), (16, 0.16), (20, 0.2)]
    # The run was killed during its last evaluation: the checkpoint exists, the metrics line does not.
    text = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(text[:-1]) + '{"kind": "eval')
    run = Training(experiment, FakeImages(), tmp_path, num_workers=0, evaluate=evaluate, resume=True)
    run.run()
    assert steps == [8, 16, 20, 20]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1] == text[:-1]


def test_averaged_weights_are_evaluated_and_saved(tmp_path: Path) -> None:
    evaluated = {}

    def evaluate(detector: nn.Module) -> dict[str, float]:
        evaluated.update({name: tensor.clone() for name, tensor in detector.state_dict().items()})
        return {}

    run = Training(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0, evaluate=evaluate)
    weights = load_file(run.run())
    assert all(torch.equal(weights[name], evaluated[name]) for name in evaluated)
    assert not torch.equal(run.detector.body.weight, weights["body.weight"])


def test_metrics_line_has_the_documented_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(tiny_experiment(epochs=1), images_per_device=2), FakeImages(), tmp_path, num_workers=0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["total"] == pytest.approx(sum(line["losses"].values()))
    assert set(line) == TRAIN_KEYS
    assert line["epoch"] == 1
    log = capsys.readouterr().out
    assert "lr 0.005 (0.01 at batch size 4, scaled linearly to batch size 2)" in log
    for word in ("s/iter", "img/s", "data", "MiB", "ETA"):
        assert word in log


def test_init_loads_matching_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = train(tiny_experiment(epochs=1, ema_decay=None), FakeImages(), tmp_path / "first", num_workers=0)
    other = tiny_experiment(epochs=1, model=partial(tiny_detector, norm=False))
    run = Training(other, FakeImages(), tmp_path / "second", num_workers=0, init=weights)
    trained = Training(tiny_experiment(epochs=1, ema_decay=None), FakeImages(), tmp_path / "first", resume=True)
    assert torch.equal(run.detector.body.weight, trained.detector.body.weight)


def test_init_matches_classes_by_name(tmp_path: Path) -> None:
    """The class "circle" is class 0 of 1 in the file, and class 1 of 2 in the data set."""
    experiment = real_experiments()["faster_rcnn"]
    tensors = build(experiment.model, num_classes=1).state_dict()
    weights = tmp_path / "circles.safetensors"
    save_weights(weights, tensors, {"categories": [{"id": 1, "name": "circle"}]})
    run = Training(experiment, FakeImages(), tmp_path / "run", num_workers=0, init=weights, init_classes=True)
    rows = run.detector.state_dict()["box_head.class_logits.weight"]
    assert torch.equal(rows[1:], tensors["box_head.class_logits.weight"])
    assert not torch.equal(rows[0], tensors["box_head.class_logits.weight"][0])


def test_masks_are_read_if_the_detector_needs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, experiment = FakeImages(), tiny_experiment(epochs=1, model=partial(masked_detector))
    images.num_masks, images.num_without_mask = 12, 3
    train(experiment, images, tmp_path / "some", num_workers=0)
    assert "3 objects without a mask: used for the box losses only" in capsys.readouterr().out
    images.num_masks = 0
    train(tiny_experiment(epochs=1), images, tmp_path / "boxes", num_workers=0)
    assert "no mask" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="Images: no object has a mask"):
        train(experiment, images, tmp_path / "none", num_workers=0)
    assert not (tmp_path / "none").exists()


def test_weights_do_not_depend_on_workers(tmp_path: Path) -> None:
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path / "none", num_workers=0)
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path / "two", num_workers=2)
    assert_same_tensors(tmp_path / "none" / "weights.safetensors", tmp_path / "two" / "weights.safetensors")


TRAIN_KEYS = {
    "kind", "step", "epoch", "learning_rate", "losses", "total", "grad_norm", "seconds_per_step", "images_per_second",
    "data_wait", "data_wait_share", "memory_mib", "eta_seconds",
}  # fmt: skip


def _sum_of_parameters(detector: nn.Module) -> dict[str, float]:
    """An evaluation that draws random numbers, as loaders do. Training must not notice it."""
    torch.rand(3)
    return {"parameters": float(sum(parameter.detach().sum() for parameter in detector.parameters()))}


def test_resuming_a_run_saved_before_a_setting_existed(tmp_path: Path) -> None:
    """A setting that the checkpoint does not have counts as its default."""
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0)
    state = tmp_path / "checkpoints" / "step_4" / "state.json"
    data = json.loads(state.read_text())
    arguments = data["experiment"]["arguments"]
    del arguments["cuda_graphs"], arguments["optimizer"]["arguments"]["momentum"]
    del arguments["model"]["arguments"]["dropout"]
    state.write_text(json.dumps(data))
    train(tiny_experiment(epochs=1), FakeImages(), tmp_path, num_workers=0, resume=True)
    changed = tiny_experiment(epochs=1, optimizer=SGD(lr=0.01, momentum=0.8))
    with pytest.raises(ValueError, match=r"optimizer\.momentum: 0\.9 -> 0\.8"):
        train(changed, FakeImages(), tmp_path, num_workers=0, resume=True)


def test_training_does_not_change_settings_of_the_process(tmp_path: Path) -> None:
    before = process_settings()
    train(tiny_experiment(epochs=1, precision="bfloat16"), FakeImages(), tmp_path, num_workers=0)
    assert process_settings() == before


def process_settings() -> dict[str, object]:
    """Settings of this process that a library could change."""
    return {
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "threads": (torch.get_num_threads(), cv2.getNumThreads()),
        "types": (torch.get_default_dtype(), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "matrix products": torch.get_float32_matmul_precision(),
        "compiler": [torch._dynamo.config.save_config(), torch._functorch.config.save_config()],
    }

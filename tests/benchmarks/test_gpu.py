"""The GPU benchmark runs from end to end on the CPU, within its time, and keeps earlier results when an item fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks.gpu.__main__ as module
import pytest
import torch
from benchmarks.gpu import kernels, timing
from benchmarks.gpu.__main__ import main, run
from benchmarks.gpu.compiling import compile_losses
from benchmarks.gpu.convolutions import Convolution
from benchmarks.gpu.plan import GROUPS, items
from benchmarks.gpu.profile import summary
from benchmarks.gpu.scale import FAMILIES, FULL, TINY
from benchmarks.gpu.worker import Item, Outcome, Worker
from torch import nn

from gpu_items import dies, fails, hangs, works

ROOT = Path(__file__).resolve().parents[2]


def item(work: Any, limit: float = 60.0) -> Item:
    return Item("rest", work.__name__, limit, work)


def is_running(process: int) -> bool:
    """Return True if a process exists and is not a zombie."""
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_dry_run_writes_every_item_and_a_summary(tmp_path: Path) -> None:
    only = ["rpn: no", "rpn: equals CPU", "faster_rcnn: detect 1", "mask_rcnn: train 1, Triton", "copies", "loader"]
    only += ["convolutions", "matrix product", "matcher", "RoIAlign", "NMS"]
    arguments = [part for text in only for part in ("--only", text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr

    document = json.loads((tmp_path / "run.json").read_text())
    assert document["format"] == "boxwright-gpu-1"
    assert document["facts"]["torch"] == torch.__version__
    assert {row["status"] for row in document["items"]} == {"ok"}
    names = [row["item"] for row in document["items"]]
    assert names == [item.name for item in items(TINY) if item.name in names]
    files = sorted(tmp_path.glob("[0-9]*.json"))
    results = {content["item"]: content["result"] for content in (json.loads(file.read_text()) for file in files)}
    assert list(results) == names

    training = results["mask_rcnn: train 1, Triton RoIAlign"]
    assert training["case"] | {"canvas": None, "recipe": None} == {
        "recipe": None,
        "task": "train",
        "batch": 1,
        "canvas": None,
        "slots": TINY.slots,
        "precision": "float32",
        "triton_roi_align": True,
    }
    parts = {"normalize", "backbone", "FPN", "RPN", "box head", "mask head", "backward", "optimizer", "rest"}
    assert set(training["parts_s"]) == parts
    assert min(training["parts_s"].values()) > 0
    profile = training["profile"]
    assert 0 < len(profile["kernels"]) <= 60
    assert profile["launches"] > sum(kernel["count"] for kernel in profile["kernels"]) / 2
    assert profile["busy_s"] + profile["gap_s"] == pytest.approx(profile["span_s"], rel=1e-3)
    assert len(results["faster_rcnn: detect 1"]["seconds"]) == TINY.rounds
    convolutions = results["mask_rcnn: convolutions"]["convolutions"]
    assert {"forward_off_tflops", "forward_on_tflops", "backward_off_tflops", "backward_on_tflops"} < set(
        convolutions[0]
    )
    assert {row["direction"] for row in results["copies"]["copies"]} == {"host to device", "device to host"}
    assert results["loader"]["loader"]["images_per_s"] > 0
    assert results["matcher"]["operators"][0]["equal"] == [True] * 4

    text = (tmp_path / "summary.md").read_text()
    for title in ("Time", "Parts, ms", "Operators, ms", "Convolutions, TFLOP/s", "Transfer", "Kernels"):
        assert f"## {title}\n" in text
    assert all(f"| {name} | ok |" in text for name in names)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5_000_000


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["full", "tiny"])
def test_the_most_important_items_run_first(scale: Any) -> None:
    planned = items(scale)
    names, groups = [item.name for item in planned], [item.group for item in planned]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(groups)) == list(GROUPS)
    assert groups == sorted(groups, key=GROUPS.index)
    small, large = scale.train_batches
    assert [item.name for item in planned if item.group in ("training", "compile", "latency")] == [
        f"mask_rcnn: train {small}",
        f"mask_rcnn: train {small}, Triton RoIAlign",
        f"mask_rcnn: train {large}",
        f"mask_rcnn: train {large}, Triton RoIAlign",
        f"mask_rcnn: compile {small}",
        "faster_rcnn: detect 1",
    ]
    assert [item.limit for item in planned if item.group == "compile"] == [250]
    for family in FAMILIES:
        assert {f"{family}: no host sync", f"{family}: equals CPU", f"{family}: compiled equals eager"} <= set(names)


def test_training_on_a_gpu_has_128_slots_and_2_and_16_images() -> None:
    assert (FULL.slots, FULL.train_batches, FULL.workers) == (128, (2, 16), 8)


def test_an_item_that_fails_dies_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    todo = [item(fails), item(dies), item(hangs, 3.0), item(works)]
    outcomes = run(todo, "cpu", tmp_path, "command", seconds=300)
    assert [outcome.status for outcome in outcomes] == ["failed", "died", "killed", "ok"]
    assert [outcome.result.get("before") for outcome in outcomes[:2]] == [1.0, 2.0]
    hung = outcomes[2]
    assert hung.error == "killed after 3 s"
    assert not is_running(hung.result["process"])
    end = time.perf_counter() + 10
    while is_running(hung.result["child"]) and time.perf_counter() < end:
        time.sleep(0.05)
    assert not is_running(hung.result["child"])
    assert [row["name"] for row in outcomes[3].result["operators"]] == ["first", "second"]
    text = (tmp_path / "summary.md").read_text()
    assert "| fails | failed |" in text
    assert "RuntimeError: broken / here |" in text
    assert "| hangs | killed |" in text
    assert len(list(tmp_path.glob("[0-9]*.json"))) == 4


class TimedWorker:
    """Fake worker whose items take 100 s on a fake clock."""

    facts: dict[str, str] = {}  # noqa: RUF012, like the real worker

    def __init__(self, device: str) -> None:
        self.now = 0.0
        self.left: list[float] = []

    def run(self, item: Item, left: float) -> Outcome:
        self.left.append(left)
        self.now += min(100.0, left)
        return Outcome(group=item.group, item=item.name, limit=left)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


def test_items_share_the_total_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = TimedWorker("cpu")
    monkeypatch.setattr(module, "Worker", lambda _: worker)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: worker.now))
    todo = [item(works)._replace(name=f"item {number}") for number in range(8)]
    outcomes = run(todo, "cpu", tmp_path, "command")
    assert worker.left == [520.0, 420.0, 320.0, 220.0, 120.0, 20.0]
    assert [outcome.status for outcome in outcomes] == ["ok"] * 6 + ["skipped"] * 2
    assert len(json.loads((tmp_path / "run.json").read_text())["items"]) == 8


def test_an_item_has_no_more_time_than_the_run(tmp_path: Path) -> None:
    worker = Worker("cpu")
    try:
        assert worker.run(item(works), 100.0).status == "ok"
        outcome = worker.run(item(hangs), 2.0)
    finally:
        worker.close()
    assert (outcome.status, outcome.error) == ("killed", "killed after 2 s")


def test_skipped_items_are_no_failure(tmp_path: Path) -> None:
    assert main(["--dry-run", "--seconds", "0", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "run.json").read_text())
    assert [row["status"] for row in document["items"]] == ["skipped"] * len(items(TINY))


def test_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run", "--only", "no_such_item", "--out", str(tmp_path)])
    assert "--only no_such_item" in capsys.readouterr().err
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_profile_of_a_gpu_counts_kernels_busy_time_and_gaps() -> None:
    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1}

    events = [
        event("cpu_op", "aten::add", 0, 500),
        event("kernel", "gemm", 100, 50),
        event("kernel", "add", 120, 50),  # overlaps the first on another stream
        event("gpu_memcpy", "copy", 200, 10),
        event("kernel", "add", 210, 20),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 15, 5),
        event("gpu_user_annotation", "Optimizer.step", 90, 300),
        {"ph": "M", "name": "process_name"},
    ]
    profile = summary(events, on_gpu=True)
    assert profile["launches"] == 4
    assert profile["busy_s"] == pytest.approx(100e-6)
    assert profile["span_s"] == pytest.approx(130e-6)
    assert profile["largest_gaps"] == [{"seconds": pytest.approx(30e-6), "after": "add", "before": "copy"}]
    assert profile["kernels"][0] == {"name": "add", "count": 2, "seconds": pytest.approx(70e-6)}
    assert profile["host_calls"] == {"cudaLaunchKernel": 1, "cudaStreamSynchronize": 1}


def test_parts_sum_to_the_call_and_leave_no_trace() -> None:
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = nn.Linear(4, 4)
    before = dict(vars(model.backbone.body))

    def call() -> None:
        model.backbone.body(torch.ones(2, 4)).sum().backward()

    start = time.perf_counter()
    parts = timing.parts_of(TINY, model, call)
    assert sum(parts.values()) <= time.perf_counter() - start
    assert set(parts) == {"rest", "backward"}  # PyTorch's own layers are not counted as parts
    assert vars(model.backbone.body) == before
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_stages_of_compilation_are_measured_apart() -> None:
    weight = torch.ones(4, requires_grad=True)

    def losses(factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (weight.sin() * factor).sum()}

    def work(function: Any) -> None:
        function(torch.tensor(2.0))["loss"].backward()

    ((fragment, compiled),) = compile_losses(TINY, losses, work)
    stages = fragment["traced"]
    assert stages["dynamo_graphs"] == 1
    assert min(stages[name] for name in ("dynamo_nodes", "aot_forward_nodes", "aot_backward_nodes")) > 0
    assert 0 < stages["dynamo_s"] + stages["aot_s"] < stages["first_call_s"]
    weight.grad = None
    work(compiled)
    torch.testing.assert_close(weight.grad, 2 * weight.detach().cos())


def test_operations_of_a_convolution_are_those_that_pytorch_counts() -> None:
    convolution = Convolution(
        (2, 8, 17, 20), (6, 4, 3, 5), False, (2, 1), (1, 2), (1, 1), 2, torch.float32, needs_image_gradient=True
    )
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        nn.functional.conv2d(torch.ones(2, 8, 17, 20), torch.ones(6, 4, 3, 5), None, (2, 1), (1, 2), 1, 2)
    assert convolution.operations() == counter.get_total_flops()


def test_the_matrix_rate_follows_from_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "seconds_of", lambda *_: [[0.5, 0.25]])
    (fragment,) = kernels.matrix_rate(TINY)
    assert fragment["matrix_tflops"]["float32"] == pytest.approx(2 * TINY.matrix**3 / 0.25 / 1e12)

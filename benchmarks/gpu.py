"""What must hold and what it costs on one GPU: `python -m benchmarks.gpu --out FOLDER`, under ten minutes.

First the checks: the GPU computes what the CPU computes, compiled computes what eager computes, and no step makes the
host wait. Then seconds, images/s and peak memory of each detector beside torchvision's. A check or timing that fails is
reported with its error and does not stop the others; the exit status says whether all checks passed.
`--device cpu --small` runs the same code on small shapes, to test the script itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from boxwright.backbones.fpn import resnet_fpn
from boxwright.benchmark.torchvision_peer import torchvision_peer
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.evaluation.evaluate import Precision, autocast
from boxwright.structures import Batch, Targets, pin_memory, to_device
from boxwright.training.ema import EMA
from boxwright.training.experiment import SGD, AdamW, build
from boxwright.training.metrics import Window
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep

NUM_CLASSES = 80
NUM_SLOTS = 32


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    canvas: tuple[int, int]
    depth: int
    train_images: int
    warmup: int
    repeats: int
    backend: str


FULL = Scale(canvas=(800, 1344), depth=50, train_images=2, warmup=5, repeats=20, backend="inductor")
SMALL = Scale(canvas=(128, 160), depth=18, train_images=1, warmup=0, repeats=1, backend="aot_eager")


def synthetic_batch(num_images: int, canvas: tuple[int, int]) -> Batch:
    """Smooth noise with boxes: the same for every detector and machine."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas
    coarse = torch.rand(num_images, 3, height // 16, width // 16, generator=generator) * 255
    images = nn.functional.interpolate(coarse, size=canvas, mode="bilinear").to(torch.uint8)
    corners = torch.rand(num_images, NUM_SLOTS, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
    sides = 16 + torch.rand(num_images, NUM_SLOTS, 2, generator=generator) * min(canvas) * 0.35
    valid = (torch.arange(NUM_SLOTS) < 8).expand(num_images, -1).contiguous()
    sizes = torch.tensor([[height, width]]).repeat(num_images, 1)
    return Batch(
        images=images,
        image_sizes=sizes,
        original_sizes=sizes.clone(),
        transforms=torch.eye(2, 3).repeat(num_images, 1, 1),
        image_ids=torch.arange(num_images),
        seeds=torch.arange(num_images) + 1,
        targets=Targets(
            boxes=torch.cat([corners, corners + sides], -1),
            labels=torch.randint(NUM_CLASSES, (num_images, NUM_SLOTS), generator=generator),
            valid=valid,
            crowd=torch.zeros_like(valid),
        ),
    )


def detectors(scale: Scale) -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """Ours and the peer's of each kind."""
    backbone: Any = partial(resnet_fpn, depth=scale.depth)
    models = {
        "rpn": partial(proposal_network, backbone=backbone),
        "faster_rcnn": partial(faster_rcnn, backbone=backbone),
    }

    def ours(model: Callable[..., nn.Module]) -> nn.Module:
        return build(model, num_classes=NUM_CLASSES)

    return {
        kind: {
            "boxwright": partial(ours, model),
            "torchvision": lambda model=model: torchvision_peer(model, ours(model)),
        }
        for kind, model in models.items()
    }


def built(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A detector whose random weights are the same on every device."""
    torch.manual_seed(0)
    return build().to(device)


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Make anything inside that waits for the GPU an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is minimised."""
    return torch.stack(list(losses.values())).sum()


def check_equals_cpu(build: Callable[[], nn.Module], batch: Batch, device: torch.device, scale: Scale) -> str:
    """Losses, gradients' norm and detections of the device equal the CPU's."""
    on_cpu, on_device = built(build, torch.device("cpu")), built(build, device)
    moved = to_device(batch, device)
    wanted, given = on_cpu.losses(batch), on_device.losses(moved)
    worst = 0.0
    for name, loss in wanted.items():
        torch.testing.assert_close(given[name].cpu(), loss, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        worst = max(worst, (given[name].cpu() - loss).abs().item())
    total(wanted).backward()
    total(given).backward()
    for (name, ours), theirs in zip(on_device.named_parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad is not None:
            error = (ours.grad.cpu() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
            assert error < 1e-2, f"gradient of {name} differs by {error:.1e} of its norm"
    with torch.inference_mode():
        wanted_boxes, given_boxes = on_cpu.detect(batch), on_device.detect(moved)
    # Two proposals of nearly equal score may change places; the sorted scores may not differ.
    torch.testing.assert_close(given_boxes.scores.cpu(), wanted_boxes.scores, rtol=1e-3, atol=1e-3)
    agree = (given_boxes.boxes.cpu() - wanted_boxes.boxes).abs().amax(-1) < 0.1
    share = agree[wanted_boxes.valid].float().mean().item() if wanted_boxes.valid.any() else 1.0
    assert share > 0.95, f"only {share:.1%} of the boxes agree within 0.1 px"
    return f"largest loss difference {worst:.1e}; {share:.1%} of boxes within 0.1 px"


def check_no_host_sync(build: Callable[[], nn.Module], batch: Batch, device: torch.device, scale: Scale) -> str:
    """What the training loop does in a step, and a detection, never make the host wait for the GPU."""
    pinned = pin_memory(batch) if device.type == "cuda" else batch
    cases: list[tuple[SGD | AdamW, Precision]] = [(SGD(lr=1e-4), "float32")]
    if device.type == "cuda":
        cases += [(SGD(lr=1e-4), "bfloat16"), (AdamW(lr=1e-4), "float32"), (AdamW(lr=1e-4), "bfloat16")]
    for config, precision in cases:
        detector = built(build, device).train()
        optimizer = build_optimizer(config, detector)
        step = TrainStep(detector, optimizer, device=device, precision=precision, clip_norm=35.0)
        ema, window = EMA(detector, 0.99), Window(2, device)
        for number in (1, 2):
            # The first time kernels are compiled and memory is taken.
            with no_host_sync(device) if number == 2 else nullcontext():
                moved = to_device(pinned, device)
                window.record(step([moved], 1e-4 / number))
                ema.update(number)
                with torch.inference_mode(), autocast(device, precision):
                    detector.detect(moved)
            synchronize(device)
        assert window.read().isfinite().all(), f"{config}, {precision}: not finite"
    return "no step or detection made the host wait" if device.type == "cuda" else "not applicable on the CPU"


def check_compiled_equals_eager(
    build: Callable[[], nn.Module], batch: Batch, device: torch.device, scale: Scale
) -> str:
    """Compiled into one graph, losses and gradients equal the eager ones."""
    detector, moved = built(build, device), to_device(batch, device)
    wanted = detector.losses(moved)
    total(wanted).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in detector.parameters()]
    detector.zero_grad(set_to_none=True)
    start = time.perf_counter()
    given = compiled(detector.losses, scale)(moved)
    total(given).backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    for name, loss in wanted.items():
        torch.testing.assert_close(given[name], loss, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (name, parameter), gradient in zip(detector.named_parameters(), gradients, strict=True):
        if gradient is not None:
            error = (parameter.grad - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-2, f"gradient of {name} differs by {error:.1e} of its norm"
    return f"one graph, compiled in {seconds:.0f} s"


def compiled(function: Callable[..., Any], scale: Scale) -> Callable[..., Any]:
    """The function as one graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=scale.backend)


@dataclass
class Timing:
    """One row of the table."""

    detector: str
    system: str
    task: str
    precision: str
    mode: str
    images: int
    seconds: float | None = None
    spread: float | None = None
    images_per_second: float | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    first_call_seconds: float | None = None
    error: str = ""


def measure(row: Timing, build: Callable[[], nn.Module], scale: Scale, device: torch.device) -> Timing:
    """Fill a row: medians over repeated steps, peak memory of the whole."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    detector = built(build, device)
    batch = to_device(synthetic_batch(row.images, scale.canvas), device)
    autocast = torch.autocast(device.type, torch.bfloat16) if row.precision == "bfloat16" else nullcontext()
    wrap = partial(compiled, scale=scale) if row.mode == "compiled" else lambda function: function
    if row.task == "train":
        optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
        losses = wrap(detector.losses)

        def work() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                loss = total(losses(batch))
            loss.backward()
            optimizer.step()
    else:
        detector.eval()
        detect = wrap(detector.detect)

        def work() -> None:
            with torch.no_grad(), autocast:
                detect(batch)

    start = time.perf_counter()
    work()
    synchronize(device)
    row.first_call_seconds = time.perf_counter() - start
    times = []
    for repeat in range(scale.warmup + scale.repeats):
        start = time.perf_counter()
        work()
        synchronize(device)
        if repeat >= scale.warmup:
            times.append(time.perf_counter() - start)
    row.seconds = statistics.median(times)
    row.spread = (max(times) - min(times)) / row.seconds
    row.images_per_second = row.images / row.seconds
    if device.type == "cuda":
        row.peak_allocated_gib = torch.cuda.max_memory_allocated() / 2**30
        row.peak_reserved_gib = torch.cuda.max_memory_reserved() / 2**30
    return row


def rows_for(scale: Scale, device: torch.device) -> list[Timing]:
    """Every timing of a run; torchvision's graphs break, so it runs eagerly only."""
    rows = []
    for kind in detectors(scale):
        for task, images in (("train", scale.train_images), ("detect", 1)):
            for precision in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
                rows.append(Timing(kind, "torchvision", task, precision, "eager", images))
                rows.append(Timing(kind, "boxwright", task, precision, "eager", images))
                rows.append(Timing(kind, "boxwright", task, precision, "compiled", images))
    return rows


def table(rows: list[Timing]) -> str:
    """The timings in Markdown, with the ratio to torchvision's eager run of the same task and precision."""
    peers = {(r.detector, r.task, r.precision): r.seconds for r in rows if r.system == "torchvision"}
    lines = [
        "| detector | task | images | precision | system | mode | s/iter | images/s | x torchvision | allocated GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        peer = peers.get((r.detector, r.task, r.precision))
        if r.seconds is None:
            figures = f"{r.error.splitlines()[-1] if r.error else 'not run'} | | |"
        else:
            ratio = f"{peer / r.seconds:.2f}" if peer else ""
            memory = "" if r.peak_allocated_gib is None else f"{r.peak_allocated_gib:.2f}"
            figures = f"{r.seconds:.4f} | {r.images_per_second:.1f} | {ratio} | {memory}"
        lines.append(f"| {r.detector} | {r.task} | {r.images} | {r.precision} | {r.system} | {r.mode} | {figures} |")
    return "\n".join(lines)


def environment(device: torch.device) -> dict[str, str]:
    """What the figures were measured on and with."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda or "" if device.type == "cuda" else "",
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
    }


def write(out: Path, device: torch.device, checks: list[dict[str, Any]], rows: list[Timing]) -> None:
    """Leave all that is known so far in the folder."""
    results = {"environment": environment(device), "checks": checks, "timings": [asdict(row) for row in rows]}
    (out / "gpu.json").write_text(json.dumps(results, indent=1))
    (out / "gpu.md").write_text(table(rows) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run all; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script")
    parser.add_argument("--seconds", type=float, default=540, help="timings that would start later are left out")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    device, scale = torch.device(options.device), SMALL if options.small else FULL
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: give --device cpu --small to test the script", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch = synthetic_batch(scale.train_images, scale.canvas)
    checks = []
    for kind, systems in detectors(scale).items():
        for check in (check_equals_cpu, check_no_host_sync, check_compiled_equals_eager):
            torch._dynamo.reset()
            try:
                passed, detail = True, check(systems["boxwright"], batch, device, scale)
            except Exception:  # one broken check must not hide the others
                passed, detail = False, traceback.format_exc()
            checks.append({"detector": kind, "check": check.__name__, "passed": passed, "detail": detail})
            print("ok    " if passed else "FAILED", kind, check.__name__, detail, flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows = rows_for(scale, device)
    write(options.out, device, checks, rows)
    for row in rows:
        torch._dynamo.reset()
        if time.perf_counter() - started > options.seconds:
            row.error = "left out: the time was up"
        else:
            try:
                measure(row, detectors(scale)[row.detector][row.system], scale, device)
            except Exception:  # as above
                row.error = traceback.format_exc()
        # After each, so that a run that is cut off leaves what it had.
        write(options.out, device, checks, rows)
    print(table(rows))
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

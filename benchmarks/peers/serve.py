"""A detector of another code base as a process that `boxwright benchmark --peer-python` talks to in lines of JSON.

    python serve.py detectron2

It needs torch, numpy and the code base, and nothing of Boxwright. Each line of its input is an order, and each is
answered by one line: `{"done": "build", ...}` or `{"error": "..."}`. The orders are

- `{"do": "build", "family": "faster_rcnn", "depth": 50, "num_classes": 80, "training": true, "device": "cpu",
  "precision": "float32", "threads": 2}`, answered with `versions`;
- `{"do": "load", "path": "batch.npz"}`: a batch for later, numbered from 0 (see `Batch`);
- `{"do": "train_step", "batch": 0}` and `{"do": "infer", "batch": 0}`, answered when the device is done;
- `{"do": "memory"}`, answered with `peak_rss` and on a GPU `cuda_allocated` and `cuda_reserved`, in bytes.

A code base is an adapter: a module `NAME_peer.py` beside this file, with the functions and tables of `Adapter`.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

BACKGROUND = 4.5
"""Bias of the background's class logit, as `boxwright.benchmark.random_weights` has it."""


class Image(NamedTuple):
    """One image and its n objects."""

    image: Tensor
    """[3, H, W] uint8 RGB, scaled already."""
    file_size: tuple[int, int]
    """(height, width) of the file, to whose pixels detections go back."""
    boxes: Tensor
    """[n, 4] float32 xyxy in pixels of `image`."""
    labels: Tensor
    """[n] int64 from 0."""
    masks: Tensor | None
    """[n, H, W] bool; None where they are not expected."""


class Adapter(Protocol):
    """What a module must have to be one."""

    WEAK: Sequence[str]
    """Patterns of the names of the last norms' scales in residual branches."""
    SPREAD: Mapping[str, float]
    """Layers by patterns of their names, and the spread of their answers."""
    BACKGROUND: str
    """Pattern of the class layer whose last row is the background's."""

    def versions(self) -> dict[str, str]:
        """Of the code base and what belongs to it."""
        ...

    def build(self, family: str, depth: int, num_classes: int, device: str) -> nn.Module:
        """The code base's own detector with random weights.

        Raises:
            ValueError: it has none of the family.
        """
        ...

    def inputs(self, images: Sequence[Image], device: str) -> Any:
        """What the other two take, made beforehand."""
        ...

    def losses(self, model: nn.Module, given: Any) -> Tensor:
        """The sum of the losses."""
        ...

    def infer(self, model: nn.Module, given: Any) -> Any:
        """Detections in the pixels of the files, masks included."""
        ...


class Server:
    """One detector and its batches."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._batches: list[Any] = []

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order."""
        return getattr(self, f"_{order.pop('do')}")(**order)

    def _build(
        self,
        family: str,
        depth: int,
        num_classes: int,
        training: bool,
        device: str,
        precision: str,
        threads: int,
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._device, self._training = torch.device(device), training
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bfloat16")
        self._model = self._adapter.build(family, depth, num_classes, device).to(device).train(training)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        # With a learning rate of 0 the weights stay constant, so every step does the same work.
        self._optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4) if training else None
        return {"versions": {"torch": str(torch.__version__), **self._adapter.versions()}}

    def _load(self, path: str) -> dict[str, Any]:
        images = read_batch(Path(path))
        given = self._adapter.inputs(images, str(self._device))
        if not self._batches:
            settle(self._model, self._adapter, given)
        self._batches.append(given)
        return {"batch": len(self._batches) - 1}

    def _train_step(self, batch: int) -> dict[str, Any]:
        assert self._optimizer is not None
        with self._autocast:
            loss = self._adapter.losses(self._model, self._batches[batch])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._wait()
        return {}

    def _infer(self, batch: int) -> dict[str, Any]:
        with torch.inference_mode(), self._autocast:
            self._adapter.infer(self._model, self._batches[batch])
        self._wait()
        return {}

    def _memory(self) -> dict[str, Any]:
        if self._device.type != "cuda":
            return {"peak_rss": peak_rss()}
        return {
            "peak_rss": peak_rss(),
            "cuda_allocated": torch.cuda.max_memory_allocated(self._device),
            "cuda_reserved": torch.cuda.max_memory_reserved(self._device),
        }

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def read_batch(path: Path) -> list[Image]:
    """The images of a batch's file: for image i `image_i`, `file_size_i`, `boxes_i`, `labels_i`, maybe `masks_i`."""
    with np.load(path, allow_pickle=False) as arrays:
        return [
            Image(
                image=torch.from_numpy(arrays[f"image_{i}"]),
                file_size=(int(arrays[f"file_size_{i}"][0]), int(arrays[f"file_size_{i}"][1])),
                boxes=torch.from_numpy(arrays[f"boxes_{i}"]),
                labels=torch.from_numpy(arrays[f"labels_{i}"]),
                masks=torch.from_numpy(arrays[f"masks_{i}"]).bool() if f"masks_{i}" in arrays else None,
            )
            for i in range(sum(name.startswith("image_") for name in arrays.files))
        ]


@torch.no_grad()
def settle(model: nn.Module, adapter: Adapter, given: Any) -> None:
    """Give random weights the work of trained ones, as `boxwright.benchmark.random_weights` does with ours.

    Raises:
        ValueError: the adapter's patterns name nothing in this model, which would be timed at doing nothing.
    """
    weak = [tensor for name, tensor in model.state_dict().items() if _matches(name, adapter.WEAK)]
    for tensor in weak:
        tensor.fill_(0.2)
    spread = 0
    for name, module in model.named_modules():
        for pattern, amount in adapter.SPREAD.items():
            if fnmatch.fnmatchcase(name, pattern):
                _spread_at_first_call(module, amount)
                spread += 1
        if adapter.BACKGROUND and fnmatch.fnmatchcase(name, adapter.BACKGROUND):
            module.bias[-1] = BACKGROUND
    if not weak or not spread:
        raise ValueError(f"the adapter's {'SPREAD' if weak else 'WEAK'} names nothing in this model")
    training = model.training
    model.eval()
    adapter.infer(model, given)
    model.train(training)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _spread_at_first_call(module: nn.Module, spread: float) -> None:
    """Scale a layer's weights when it is first called, so that what it gives spreads that much but for its bias."""

    def hook(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        rows = output.float().movedim(1, -1)
        if layer.bias is not None:
            # Biases differ and do not grow with the weights. What channels differ by beyond them does.
            rows = rows - layer.bias
        layer.weight.mul_(spread / rows.std().clamp(min=1e-6))
        return layer(*inputs)

    handle = module.register_forward_hook(hook)


def peak_rss() -> int:
    """The most memory of this process that was resident at once, in bytes."""
    table = Path("/proc/self/status")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer orders until there are no more."""
    # Code bases print as they like: what they print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server: Server | None = None
    for line in sys.stdin:
        try:
            order = json.loads(line)
            if server is None:
                server = Server(importlib.import_module(f"{sys.argv[1]}_peer"))
            answer = {"done": order["do"], **server.answer(dict(order))}
        except Exception as error:  # report every error to the other process
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

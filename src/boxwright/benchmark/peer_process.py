"""A peer that another interpreter has: a process that is told what to do in lines of JSON.

The processes are `benchmarks/peers/serve.py` of Boxwright's source, which says what the lines are.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import boxwright
from boxwright.benchmark.torchvision_models import family_of
from boxwright.benchmark.torchvision_peer import object_bitmaps
from boxwright.precision import Precision
from boxwright.structures import Batch
from boxwright.training.experiment import arguments_of

PEERS = ("detectron2", "mmdetection")
"""Those that there are adapters of."""


class PeerProcess:
    """A detector of a peer as a thing to time. It has its own random weights and its published numbers."""

    def __init__(
        self,
        name: str,
        python: str,
        model: Callable[..., nn.Module],
        *,
        num_classes: int,
        device: torch.device,
        precision: Precision,
        training: bool,
    ) -> None:
        """Start the process and let it build the detector.

        Args:
            name: of the peer.
            python: the interpreter that has it.
            model: the experiment's, for its kind and depth.
            num_classes: of the pictures.
            device: where it runs.
            precision: of its arithmetic.
            training: whether it will train or infer.

        Raises:
            ValueError: the interpreter cannot be started or lacks something, or the peer has no such model.
        """
        self.name = name
        self._masks = training and family_of(model) == "mask_rcnn"
        self._num_batches = 0
        script = find_serve()
        try:
            self._process = subprocess.Popen(
                [python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(f"--peer-python {python} cannot be started: {error.strerror}") from None
        self._folder = TemporaryDirectory()
        backbone = arguments_of(arguments_of(model)["backbone"])
        try:
            answer = self._order(
                "build",
                family=family_of(model),
                depth=backbone["depth"],
                num_classes=num_classes,
                training=training,
                device=str(device),
                precision=precision,
                threads=torch.get_num_threads(),
            )
        except ValueError as error:
            self.close()
            raise ValueError(f"--peer-python {python} cannot run {name}: {error}") from None
        self.versions: dict[str, str] = answer["versions"]
        """Of the peer and its libraries."""

    def prepare(self, batch: Batch) -> int:
        """Hand the batch over in a file; it is known by its number."""
        path = Path(self._folder.name) / f"{self._num_batches}.npz"
        np.savez(path, **cast("Any", _arrays(batch, masks=self._masks)))
        number: int = self._order("load", path=str(path))["batch"]
        path.unlink()
        self._num_batches += 1
        return number

    def train_step(self, given: int) -> None:
        """A step, done when the device is."""
        self._order("train_step", batch=given)

    def infer(self, given: int) -> None:
        """An inference, done when the device is."""
        self._order("infer", batch=given)

    def memory(self) -> dict[str, int]:
        """The peaks of the process in bytes, by name."""
        answer = self._order("memory")
        return {name: count for name, count in answer.items() if name != "done"}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # An order that a process which has ended could not take.
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()

    def _order(self, what: str, **details: Any) -> dict[str, Any]:
        """Give an order and wait for its answer.

        Raises:
            ValueError: the peer tells an error, or ends.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"the process of {self.name} ended when it was to {what}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name} could not {what}: {answer['error']}")
        return answer


def find_serve() -> Path:
    """The script that peers' processes run.

    Raises:
        ValueError: it is not there.
    """
    script = Path("benchmarks") / "peers" / "serve.py"
    places = [Path(boxwright.__file__).resolve().parents[2], Path.cwd()]
    for place in places:
        if (place / script).is_file():
            return place / script
    raise ValueError(
        f"there is no {script}, which comes with Boxwright's source and not with the installed package: call this in a "
        "clone of the repository, or compare with torchvision"
    )


def _arrays(batch: Batch, *, masks: bool) -> dict[str, np.ndarray]:
    """What the file of a batch holds."""
    arrays: dict[str, np.ndarray] = {}
    targets = batch.targets
    wanted = None if targets is None else targets.valid & ~targets.crowd
    bitmaps = object_bitmaps(batch, wanted) if masks and wanted is not None else None
    for i, (height, width) in enumerate(batch.image_sizes.tolist()):
        arrays[f"image_{i}"] = batch.images[i, :, :height, :width].numpy()
        arrays[f"file_size_{i}"] = batch.original_sizes[i].numpy()
        arrays[f"boxes_{i}"] = np.zeros((0, 4), np.float32)
        arrays[f"labels_{i}"] = np.zeros(0, np.int64)
        if targets is not None and wanted is not None:
            arrays[f"boxes_{i}"] = targets.boxes[i][wanted[i]].numpy()
            arrays[f"labels_{i}"] = targets.labels[i][wanted[i]].numpy()
        if bitmaps is not None:
            arrays[f"masks_{i}"] = bitmaps[i].numpy()
    return arrays

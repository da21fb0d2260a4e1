"""Time a peer that is installed in another Python interpreter.

The peer runs as a child process that reads requests from standard input and writes answers to standard output, one line
of JSON each. The script of the process, `benchmarks/peers/serve.py`, documents the requests.
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
"""Peers with an adapter in `benchmarks/peers`."""


class PeerProcess:
    """The system of a peer in a child process, with its published hyperparameters and its own random weights."""

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
        """Start the process and build the detector in it.

        Args:
            name: name of the peer.
            python: path of the interpreter that has the peer installed.
            model: the experiment's model factory, from which the family and the backbone's depth are read.
            num_classes: number of classes of the dataset.
            device: device of the detector.
            precision: precision of the detector.
            training: True for training steps, False for inference.

        Raises:
            ValueError: the interpreter cannot be started, a package is missing in it, or the peer has no such model.
        """
        self.name = name
        self._masks = training and family_of(model) == "mask_rcnn"
        self._num_batches = 0
        script = find_serve_script()
        try:
            self._process = subprocess.Popen(
                [python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(
                f"--peer-python {python}: cannot start the interpreter: {error.strerror}. Give the path of a Python "
                f"interpreter that has {name} installed."
            ) from None
        self._folder = TemporaryDirectory()
        backbone = arguments_of(arguments_of(model)["backbone"])
        try:
            answer = self._request(
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
            raise ValueError(f"--peer-python {python}: cannot run {name}: {error}") from None
        self.versions: dict[str, str] = answer["versions"]
        """Versions of the peer and its libraries."""

    def prepare(self, batch: Batch) -> int:
        """Send the batch to the process in a file, and return its number there."""
        path = Path(self._folder.name) / f"{self._num_batches}.npz"
        np.savez(path, **cast("Any", _arrays(batch, masks=self._masks)))
        number: int = self._request("load", path=str(path))["batch"]
        path.unlink()
        self._num_batches += 1
        return number

    def train_step(self, inputs: int) -> None:
        """Run a training step and wait until the device has finished it."""
        self._request("train_step", batch=inputs)

    def infer(self, inputs: int) -> None:
        """Run an inference and wait until the device has finished it."""
        self._request("infer", batch=inputs)

    def memory(self) -> dict[str, int]:
        """Peak memory of the process in bytes: `peak_rss` and, on a GPU, `cuda_allocated` and `cuda_reserved`."""
        answer = self._request("memory")
        return {name: size for name, size in answer.items() if name != "done"}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # A request may still be buffered for a process that has ended.
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()

    def _request(self, action: str, **details: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ValueError: the process answers with an error, or ends.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"the {self.name} process ended during {action!r}. Its own messages are printed above.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name} failed at {action!r}: {answer['error']}")
        return answer


def find_serve_script() -> Path:
    """Path of the script that peer processes run.

    Raises:
        ValueError: the script is not in the repository of this package or in the working directory.
    """
    script = Path("benchmarks") / "peers" / "serve.py"
    folders = [Path(boxwright.__file__).resolve().parents[2], Path.cwd()]
    for folder in folders:
        if (folder / script).is_file():
            return folder / script
    raise ValueError(
        f"{script} not found in {' or '.join(map(str, folders))}: the installed package does not contain it. Run this "
        "command in a clone of Boxwright's repository, or use --against torchvision."
    )


def _arrays(batch: Batch, *, masks: bool) -> dict[str, np.ndarray]:
    """The arrays of a batch file, in the format of `read_batch` in `benchmarks/peers/serve.py`."""
    arrays: dict[str, np.ndarray] = {}
    targets = batch.targets
    selected = None if targets is None else targets.valid & ~targets.crowd
    bitmaps = object_bitmaps(batch, selected) if masks and selected is not None else None
    for i, (height, width) in enumerate(batch.image_sizes.tolist()):
        arrays[f"image_{i}"] = batch.images[i, :, :height, :width].numpy()
        arrays[f"file_size_{i}"] = batch.original_sizes[i].numpy()
        arrays[f"boxes_{i}"] = np.zeros((0, 4), np.float32)
        arrays[f"labels_{i}"] = np.zeros(0, np.int64)
        if targets is not None and selected is not None:
            arrays[f"boxes_{i}"] = targets.boxes[i][selected[i]].numpy()
            arrays[f"labels_{i}"] = targets.labels[i][selected[i]].numpy()
        if bitmaps is not None:
            arrays[f"masks_{i}"] = bitmaps[i].numpy()
    return arrays

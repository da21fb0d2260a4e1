"""Every error in a worker reaches the main process with its image, and no program hangs because of its workers."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from boxwright.data import collate
from boxwright.data.augmentation import Augmentation
from boxwright.data.batch_builder import SampleError
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Sample
from boxwright.data.loader import TrainingLoader
from boxwright.data.workers import _kill
from faulty import FAULTS, POSITION, FaultyImages, FaultyTransform, UnpicklableImages
from generated_images import GeneratedImagesWithInfo

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

AUGMENTATION = Augmentation(resize=Resize(64, 107))
TESTS = Path(__file__).resolve().parents[1]
WAIT = 120
"""Seconds after which a program counts as hanging. Each program takes a few seconds."""
UNFINISHED = pytest.mark.filterwarnings("ignore:.*_MultiProcessingDataLoaderIter.__del__")
"""If the constructor of PyTorch's iterator fails, its destructor warns about missing attributes."""
RAISED = [fault for fault in FAULTS if fault != "killed"]


def loader(dataset: Any, **changes: Any) -> TrainingLoader:
    arguments = {"augmentation": AUGMENTATION, "batch_size": 2, "seed": 0, "num_workers": 0, **changes}
    return TrainingLoader(dataset, **arguments)


def read_epoch(training: TrainingLoader) -> None:
    for _ in islice(training.batches(), training.steps_per_epoch):
        pass


def assert_no_children() -> None:
    gc.collect()
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", RAISED)
def test_errors_of_all_types_name_the_image_and_keep_the_traceback(fault: str, num_workers: int) -> None:
    with pytest.raises(SampleError, match=f"{fault}.*position {POSITION} of the data set") as caught:
        read_epoch(loader(FaultyImages(9, fault=fault), num_workers=num_workers))
    if num_workers:
        assert "faulty.py" in str(caught.value.__cause__)
    else:
        assert type(caught.value.__cause__).__name__ == fault
    assert_no_children()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_transform_names_the_file(num_workers: int) -> None:
    augmentation = replace(AUGMENTATION, transform=FaultyTransform("KeyError"))
    image = f"image {POSITION}.jpg, image id {100 + POSITION}, position {POSITION} of the data set"
    with pytest.raises(SampleError, match=image):
        read_epoch(loader(GeneratedImagesWithInfo(9), augmentation=augmentation, num_workers=num_workers))


def add_too_many_boxes(sample: Sample) -> Sample:
    count = 60 if sample.image_id == 100 + POSITION else 0
    boxes = np.tile(np.array([[1, 1, 9, 9]], np.float32), (count, 1))
    return replace(
        sample, boxes=boxes, labels=np.zeros(count, np.int64), crowd=np.zeros(count, bool), object_ids=np.arange(count)
    )


def test_an_error_in_collate_names_the_image() -> None:
    training = loader(
        GeneratedImagesWithInfo(9), augmentation=replace(AUGMENTATION, transform=add_too_many_boxes), num_workers=1
    )
    with pytest.raises(ValueError, match=rf"60 objects.*position {POSITION} of the data set"):
        read_epoch(training)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_os_error_keeps_its_type(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "KeyError", lambda: Path("no/such/file").read_bytes())
    with pytest.raises(OSError, match=r"no/such/file.*position 3 of the data set"):
        read_epoch(loader(FaultyImages(9), num_workers=num_workers))


def raise_shared_memory_full(*_: Any) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


@pytest.mark.parametrize("where", ["canvas", "pickling"])
def test_the_error_of_full_shared_memory_says_how_to_fix_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "canvas":
        monkeypatch.setattr(collate, "_canvases", raise_shared_memory_full)
    else:
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", raise_shared_memory_full)
    with pytest.raises(OSError, match=r"No space left.*--shm-size=8g or --ipc=host.*--workers 0 "):
        read_epoch(loader(GeneratedImagesWithInfo(9), num_workers=1))
    assert_no_children()


def test_the_error_of_a_killed_worker_has_the_likely_reason() -> None:
    # The message differs, depending on whether PyTorch or `workers.py` detects it first.
    with pytest.raises(ChildProcessError, match=r"a data worker died: .*(Killed|exited).*fewer workers or a smaller"):
        read_epoch(loader(FaultyImages(9, fault="killed"), num_workers=2))
    assert_no_children()


@UNFINISHED
@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_no_worker_remains_if_workers_do_not_start() -> None:
    with pytest.raises(OSError, match=r"did not start: TypeError: a data set with an open file.*--workers 0"):
        read_epoch(loader(UnpicklableImages(9), num_workers=2, start_method="spawn"))
    assert_no_children()


@UNFINISHED
def test_the_first_worker_ends_if_the_second_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = multiprocessing.process.BaseProcess.start, []

    def start_once(process: multiprocessing.process.BaseProcess) -> None:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_once)
    with pytest.raises(OSError, match=r"did not start: BlockingIOError: .*Resource temporarily unavailable"):
        read_epoch(loader(GeneratedImagesWithInfo(9), num_workers=2))
    assert started
    assert not started[0].is_alive()


def test_workers_that_ignore_sigterm_are_killed() -> None:
    process = multiprocessing.get_context("fork").Process(target=ignore_and_sleep, daemon=True)
    process.start()
    _kill([process])
    assert process.exitcode == -signal.SIGKILL


def ignore_and_sleep() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


PROGRAM = """
import sys
from itertools import islice
import torch
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.evaluation.evaluate import detect_dataset
from boxwright.evaluation.propose import propose
from faulty import FaultyImages
from generated_images import GeneratedImagesWithInfo
from training.fakes import tiny_detector

def main(case, start_method):
    dataset = GeneratedImagesWithInfo(9) if case in ("user", "detector", "stopped") else FaultyImages(9)
    common = dict(batch_size=1, num_workers=2, start_method=start_method)
    if case in ("user", "training", "stopped"):
        loader = TrainingLoader(dataset, augmentation=Augmentation(resize=Resize(64, 107)), seed=0, **common)
        batches = loader.batches()
        for batch in batches:
            if case == "user":
                raise KeyError("the training loop")
            print("running", flush=True)
    else:
        loader = EvaluationLoader(dataset, resize=Resize(64, 107), **common)
        detector = tiny_detector(2)
        if case == "detector":
            detector.detect = lambda batch: {}["the detector"]
        function = propose if case == "propose" else detect_dataset
        function(detector, *[GeneratedImagesWithInfo(9)] * (case == "propose"), loader, device="cpu")

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def start(*command: str | Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """The error output of a program. If the program hangs, kill it with its workers and fail the test."""
    try:
        return process.communicate(timeout=WAIT)[1]
    except subprocess.TimeoutExpired:
        for hanging in [*psutil.Process(process.pid).children(recursive=True), process]:
            hanging.kill()
        process.communicate()
        pytest.fail(f"the program hangs: {process.args}")


@pytest.mark.parametrize(
    ("case", "start_method", "message"),
    [
        ("training", "fork", "SampleError: KeyError: 'no such column' (position 3 of the data set)"),
        ("training", "spawn", "SampleError: KeyError: 'no such column' (position 3 of the data set)"),
        ("evaluation", "fork", "SampleError: KeyError: 'no such column' (position 3 of the data set)"),
        ("propose", "fork", "SampleError: KeyError: 'no such column' (position 3 of the data set)"),
        ("detector", "fork", "KeyError: 'the detector'"),
        ("user", "fork", "KeyError: 'the training loop'"),
        ("user", "spawn", "KeyError: 'the training loop'"),
    ],
)
def test_a_program_ends_after_an_error(program: Path, case: str, start_method: str, message: str) -> None:
    process = start(program, case, start_method)
    errors = finish(process)
    assert errors.strip().endswith(message)
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_remains_after_a_signal_ends_the_program(program: Path, number: signal.Signals) -> None:
    process = start(program, "stopped", "fork")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(process.pid, number)
    errors = finish(process)
    assert process.returncode == -number
    assert "BrokenPipe" not in errors
    assert not psutil.wait_procs(workers, timeout=15)[1]

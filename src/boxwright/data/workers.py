"""Build batches in worker processes: all errors reach the main process, and no worker outlives its iterator.

PyTorch's `DataLoader` starts the workers and distributes the steps. This module changes three things, because otherwise
a run can hang forever:

- A worker pickles its batch before it hands the batch to PyTorch. PyTorch pickles in a thread, which prints an error
  (such as full shared memory) and drops the batch, while the main process waits for it.
- Workers ignore SIGINT and SIGTERM. Ctrl-C and the SIGTERM of a scheduler reach the whole process group, but the main
  process needs its workers to finish the step. When the program exits, `multiprocessing` sends SIGTERM to its children
  and waits for them without a time limit. So this module ends the workers before that, with SIGKILL if necessary.
- If a worker dies, the error states the likely reason.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from boxwright.data.batch_builder import BatchBuilder, SampleError, is_shared_memory_full, user_error
from boxwright.data.sampler import Step
from boxwright.structures import Batch, pin_memory


def iterate_batches(
    builder: BatchBuilder, steps: Iterable[Step], num_workers: int, start_method: str | None
) -> Generator[Batch, None, None]:
    """Build the batch of each step, in pinned memory if there is a GPU. Closing the generator ends its workers.

    Args:
        builder: Batch builder, sent to every worker.
        steps: Steps, consumed ahead of the batches that are yielded.
        num_workers: Number of worker processes that build batches; 0 for the main process.
        start_method: "fork", "spawn" or "forkserver"; None for the default of the platform.

    Raises:
        ValueError: An image or its annotations are invalid.
        OSError: A file cannot be read, shared memory is full, or a worker did not start or died.
        SampleError: The data set or the transform raised any other error.
    """
    pinned = torch.cuda.is_available()
    if num_workers == 0:
        for step in steps:
            yield pin_memory(builder[step]) if pinned else builder[step]
        return
    loader: DataLoader[Any] = DataLoader(
        _PickledBatches(builder),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pinned,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
        # PyTorch draws the seeds of workers from a generator; a separate one leaves the global generator unchanged.
        generator=torch.Generator(),
    )
    with _explain_death(), _running(loader) as iterator:
        while (result := _next(iterator)) is not None:
            if isinstance(result, _Failure):
                raise result.kind(result.message) from _WorkerTraceback(result.trace)
            yield result


@dataclass(frozen=True)
class _Failure:
    """An error in a worker, sent instead of a batch."""

    kind: type[ValueError] | type[OSError] | type[SampleError]
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        """Describe an error as text, because many exceptions cannot be pickled or unpickled."""
        original = error.__cause__ or error
        trace = "".join(traceback.format_exception(original))
        reported = error if type(error) in (ValueError, OSError, SampleError) else user_error(error)
        return cls(cast(Any, type(reported)), str(reported), trace)


@dataclass(frozen=True)
class _Pickled:
    """A pickled batch or failure; its tensors are in shared memory."""

    content: bytes

    def load(self) -> Batch | _Failure:
        """Unpickle the batch or failure."""
        return cast(Batch | _Failure, ForkingPickler.loads(self.content))

    def pin_memory(self) -> Batch | _Failure:
        """Unpickle, and pin the batch. PyTorch's pinning thread calls this method."""
        result = self.load()
        return result if isinstance(result, _Failure) else pin_memory(result)


@dataclass(frozen=True)
class _PickledBatches(TorchDataset[_Pickled]):
    """Wraps a batch builder in a worker: returns pickled batches or failures, and never raises."""

    builder: BatchBuilder

    def __getitem__(self, step: Step) -> _Pickled:
        try:
            return _Pickled(bytes(ForkingPickler.dumps(self.builder[step])))
        except BaseException as error:
            return _Pickled(bytes(ForkingPickler.dumps(_Failure.of(error))))


class _WorkerTraceback(Exception):
    """Traceback of a worker; the cause of the error that the main process raises."""

    def __str__(self) -> str:
        return f"in a data worker:\n{self.args[0]}"


@contextmanager
def _running(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Start the workers. End them at the end of the block, or at program exit if the block never ends."""
    others = set(multiprocessing.active_children())
    try:
        iterator = cast(Any, iter(loader))
    except BaseException as error:
        _kill([child for child in multiprocessing.active_children() if child not in others])
        if not isinstance(error, Exception):
            raise
        if is_shared_memory_full(error):
            raise user_error(error) from error
        raise OSError(
            f"data workers did not start: {type(error).__name__}: {error}. Use --workers 0 (num_workers=0). With "
            'start_method="spawn", define the data set and the transform in a module, not in a function'
        ) from error
    end = partial(_end, iterator)
    # Exit handlers run in reverse order, so this one runs before the handler of multiprocessing.
    atexit.register(end)
    try:
        yield iterator
    finally:
        atexit.unregister(end)
        end()


def _end(iterator: Any) -> None:
    # `_shutdown_workers` is private. PyTorch calls it when the iterator is garbage-collected, which may never happen:
    # the traceback of an error refers to its frames, and the frames refer to the iterator.
    try:
        iterator._shutdown_workers()
    finally:
        _kill(iterator._workers)


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _next(iterator: Iterator[_Pickled | Batch | _Failure]) -> Batch | _Failure | None:
    """Next batch or failure; None at the end."""
    try:
        item = next(iterator, None)
        return item.load() if isinstance(item, _Pickled) else item
    except (ConnectionError, EOFError) as error:  # the worker that holds the tensors is gone
        raise RuntimeError("a DataLoader worker exited before its batch was received") from error


@contextmanager
def _explain_death() -> Iterator[None]:
    """Add the likely reason if a worker died. PyTorch raises in a signal handler, so anywhere in the block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SampleError) or "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a data worker died: {error}. Likely reasons: if it was killed, memory was full (use fewer workers or a "
            "smaller batch); after a bus error, shared memory was full (in Docker, use --shm-size=8g or --ipc=host; "
            "otherwise --workers 0); after a segmentation fault, a library that reads images has a bug"
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

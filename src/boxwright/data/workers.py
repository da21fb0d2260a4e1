"""Runs a batch builder in worker processes: every error reaches the main process, and no worker outlives its iterator.

PyTorch's `DataLoader` starts the workers and hands out the steps. Three things are done here, because with it alone a
run could hang for ever:

- A worker pickles its batch itself. PyTorch pickles in a thread, which prints an error (such as a full shared memory)
  and drops the batch that the main process waits for.
- Workers ignore SIGINT and SIGTERM, since Ctrl-C and a scheduler's SIGTERM reach the whole process group, and the main
  process needs its workers until it has finished the step. `multiprocessing` ends its children by SIGTERM when the
  program ends and waits for them without a limit, so they are ended before that, by SIGKILL where they are stuck.
- A worker that dies is reported with the likely reason.
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
    """Build the batch of each step, pinned where there is a GPU. Closing the generator ends its workers.

    Args:
        builder: What a worker process gets.
        steps: Taken as workers become free, and so ahead of the batches.
        num_workers: Processes that build batches; 0 builds them in this one.
        start_method: How processes start; None for the platform's own way.

    Raises:
        ValueError: An image or its annotations are faulty.
        OSError: A file cannot be read, the shared memory is full, or a worker cannot be started or died.
        SampleError: Anything else that the data set or the transform raised.
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
        # A generator of its own: PyTorch draws the seeds of workers from it, which must not change the run's.
        generator=torch.Generator(),
    )
    with _explain_death(), _running(loader) as iterator:
        while (result := _next(iterator)) is not None:
            if isinstance(result, _Failure):
                raise result.kind(result.message) from _WorkerTraceback(result.trace)
            yield result


@dataclass(frozen=True)
class _Failure:
    """What a worker sends instead of a batch."""

    kind: type[ValueError] | type[OSError] | type[SampleError]
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        """The failure for an error. Only text is sent: many exceptions cannot be pickled, or not be unpickled."""
        original = error.__cause__ or error
        trace = "".join(traceback.format_exception(original))
        told = error if type(error) in (ValueError, OSError, SampleError) else user_error(error)
        return cls(cast(Any, type(told)), str(told), trace)


@dataclass(frozen=True)
class _Pickled:
    """A batch or failure as bytes, its tensors in shared memory."""

    content: bytes

    def load(self) -> Batch | _Failure:
        """Undo the pickling."""
        return cast(Batch | _Failure, ForkingPickler.loads(self.content))

    def pin_memory(self) -> Batch | _Failure:
        """Called by PyTorch's pinning thread."""
        result = self.load()
        return result if isinstance(result, _Failure) else pin_memory(result)


@dataclass(frozen=True)
class _PickledBatches(TorchDataset[_Pickled]):
    """A batch builder in a worker: gives bytes for a batch, and never raises."""

    builder: BatchBuilder

    def __getitem__(self, step: Step) -> _Pickled:
        try:
            return _Pickled(bytes(ForkingPickler.dumps(self.builder[step])))
        except BaseException as error:
            return _Pickled(bytes(ForkingPickler.dumps(_Failure.of(error))))


class _WorkerTraceback(Exception):
    """The traceback of a worker, as the cause of the error that the main process raises."""

    def __str__(self) -> str:
        return f"in a data worker:\n{self.args[0]}"


@contextmanager
def _running(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Start the workers, and end them with the block or, where the block is never left, before the program ends."""
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
            f"data workers cannot be started: {type(error).__name__}: {error}. Use --workers 0 (num_workers=0); with "
            'start_method="spawn" define the data set and the transform in a module, not in a function'
        ) from error
    end = partial(_end, iterator)
    # Registered after multiprocessing's own handler, and so called before it.
    atexit.register(end)
    try:
        yield iterator
    finally:
        atexit.unregister(end)
        end()


def _end(iterator: Any) -> None:
    # Private, but what PyTorch itself calls once nothing refers to the iterator. That may never happen: the traceback
    # of an error refers to its frames, and they to the iterator.
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
    """The next batch or failure, None at the end."""
    try:
        item = next(iterator, None)
        return item.load() if isinstance(item, _Pickled) else item
    except (ConnectionError, EOFError) as error:  # its tensors are fetched from the worker
        raise RuntimeError("a DataLoader worker was gone before its batch was fetched") from error


@contextmanager
def _explain_death() -> Iterator[None]:
    """Say why a worker may have died. PyTorch raises from its signal handler, and so anywhere in the block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SampleError) or "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a data worker died: {error}. A worker that is killed usually means that the memory was full (use fewer "
            "workers or a smaller batch), a bus error that the shared memory was (in Docker: --shm-size=8g or "
            "--ipc=host; otherwise --workers 0), a segmentation fault an error in a library that reads images"
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

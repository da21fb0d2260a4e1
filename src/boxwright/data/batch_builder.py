"""Build the batch of a training or evaluation step, and add the image to the message of any error.

A worker process receives one `BatchBuilder` when it starts. After that it receives only a `Step` per batch: epoch,
canvas and image positions. So a worker needs memory for one batch; all processes share the
memory of the data set.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from boxwright.data.augment import Augment, Photometric, seeded
from boxwright.data.buckets import Scale
from boxwright.data.collate import PlacedSample, collate
from boxwright.data.dataset import Dataset, DatasetInfo, Sample
from boxwright.data.proposals import ProposalFile
from boxwright.data.sampler import Step, image_seed
from boxwright.structures import Batch


class SampleError(RuntimeError):
    """An error raised by the code of a data set or transform; the message names the image.

    `ValueError` and `OSError` keep their type, because they usually report invalid files.
    """


@dataclass(frozen=True)
class BatchBuilder(TorchDataset[Batch]):
    """Builds the batch of a step, in the main process or in a worker."""

    dataset: Dataset
    scales: Sequence[Scale]
    """Scales that `Step.scale` indexes; empty for images at their original size."""
    augment: Augment
    seed: int
    photometric: Photometric | None = None
    transform: Callable[[Sample], Sample] | None = None
    proposals: ProposalFile | None = None
    slots: int | None = None
    masks: bool = False

    def __getitem__(self, step: Step) -> Batch:
        """Build the batch of a step.

        Raises:
            ValueError: An image or its annotations are invalid.
            OSError: A file cannot be read, or shared memory is full.
            SampleError: The data set or the transform raised any other error.
        """
        current = _Current(self.dataset)
        try:
            return collate(
                self._placed_samples(step, current),
                len(step.indices),
                step.canvas,
                self.slots,
                None if self.proposals is None else self.proposals.slots,
                masks=self.masks,
            )
        except (Exception, SystemExit) as error:  # a data set that calls sys.exit must not end the run with status 0
            raise user_error(error, str(current)) from error

    def _placed_samples(self, step: Step, current: _Current) -> Iterator[PlacedSample]:
        for position in step.indices.tolist():
            current.position, current.sample = position, None
            current.sample = self.dataset[position]
            yield self._placed_sample(current.sample, image_seed(self.seed, step.epoch, position), step)

    def _placed_sample(self, sample: Sample, seed: int, step: Step) -> PlacedSample:
        rng = np.random.Generator(np.random.Philox(seed))
        height, width = sample.image.shape[:2]
        resize = self.scales[step.scale].draw(seed) if self.scales else None
        placement = self.augment.draw((height, width), resize, rng)
        if self.transform is not None:
            with seeded(seed):
                sample = self.transform(sample)
            if sample.image.shape != (height, width, 3):
                raise ValueError(
                    f"{sample.file_name}: the transform changed the image shape from {(height, width, 3)} to "
                    f"{sample.image.shape}. Keep the shape; the loader resizes and crops after the transform"
                )
        if self.photometric is not None:
            sample = replace(sample, image=self.photometric(sample.image, rng))
        proposals = None if self.proposals is None else self.proposals.of(sample.image_id, (height, width))
        return PlacedSample(sample, placement, seed, proposals)


@dataclass
class _Current:
    """The image that a batch builder is reading, for error messages."""

    dataset: Dataset
    position: int | None = None
    sample: Sample | None = None
    """None until the data set has returned the sample."""

    def __str__(self) -> str:
        """For example "image 7.jpg, image id 107, position 7 of the data set"; empty before the first image."""
        if self.position is None:
            return ""
        sample = self.sample if isinstance(self.sample, Sample) else None
        image_id = DatasetInfo(self.dataset).stated_image_id(self.position) if sample is None else sample.image_id
        return ", ".join(
            [
                *([] if sample is None else [f"image {sample.file_name}"]),
                *([] if image_id is None else [f"image id {image_id}"]),
                f"position {self.position} of the data set",
            ]
        )


def user_error(error: BaseException, image: str = "") -> ValueError | OSError | SampleError:
    """Convert an error that was raised while a batch was built to the error for the user.

    Args:
        error: Original error. Raise the returned error `from` it.
        image: Description of the image, appended to the message; empty if unknown.
    """
    if is_shared_memory_full(error):
        return OSError(
            f"shared memory (/dev/shm), which data workers use to send batches, is full ({error}). In Docker, start "
            "the container with --shm-size=8g or --ipc=host. Otherwise use fewer workers, a smaller batch or "
            "--workers 0 (num_workers=0)"
        )
    where = f" ({image})" if image else ""
    text = _text(error)
    if isinstance(error, ValueError | OSError) and text:
        return (ValueError if isinstance(error, ValueError) else OSError)(f"{text}{where}")
    return SampleError(f"{traceback.format_exception_only(error)[-1].strip()}{where}")


def _text(error: BaseException) -> str:
    """Message of an error; empty if it has none, or if its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def is_shared_memory_full(error: BaseException) -> bool:
    """Whether PyTorch failed to allocate shared memory, or Python failed to create a semaphore in it."""
    full_device = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    return full_device or (
        isinstance(error, RuntimeError) and "shared memory" in str(error) and "/torch_" in str(error)
    )

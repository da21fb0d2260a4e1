"""Builds the batch of one step from a data set, and says which image an error belongs to.

A worker process gets one `BatchBuilder` when it starts, and afterwards only steps: an epoch, a canvas and the positions
of the images. So a worker holds the data set, whose memory the processes share, and one batch.
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
    """An error in the code of a data set or transform, with the image that it belongs to.

    `ValueError` and `OSError` keep their type, since they tell of a fault in the user's files.
    """


@dataclass(frozen=True)
class BatchBuilder(TorchDataset[Batch]):
    """Builds the batch of a step."""

    dataset: Dataset
    scales: Sequence[Scale]
    """The scales that `Step.scale` numbers; empty: images keep their own sizes."""
    augment: Augment
    seed: int
    photometric: Photometric | None = None
    transform: Callable[[Sample], Sample] | None = None
    proposals: ProposalFile | None = None
    slots: int | None = None
    masks: bool = False

    def __getitem__(self, step: Step) -> Batch:
        """Build a batch.

        Raises:
            ValueError: an image or its annotations are faulty.
            OSError: a file cannot be read, or the shared memory is full.
            SampleError: anything else that the data set or the transform raised.
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
                    f"{sample.file_name}: the transform made an image of shape {sample.image.shape} from one of "
                    f"{(height, width, 3)}. It must keep the shape: the loader resizes and crops"
                )
        if self.photometric is not None:
            sample = replace(sample, image=self.photometric(sample.image, rng))
        proposals = None if self.proposals is None else self.proposals.of(sample.image_id, (height, width))
        return PlacedSample(sample, placement, seed, proposals)


@dataclass
class _Current:
    """The image that a batch builder works on."""

    dataset: Dataset
    position: int | None = None
    sample: Sample | None = None
    """None while the data set reads it."""

    def __str__(self) -> str:
        """Such as "image 7.jpg, id 107, position 7 of the data set"; empty before the first image."""
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
    """The error to raise instead of one that was raised while a batch was built.

    Args:
        error: The original; raise the new one `from` it.
        image: The image that it belongs to, if known.
    """
    if is_shared_memory_full(error):
        return OSError(
            "the shared memory (/dev/shm), through which data workers send batches, is full. In Docker start the "
            "container with --shm-size=8g or --ipc=host; otherwise use --workers 0 (num_workers=0), fewer workers or "
            f"a smaller batch ({error})"
        )
    where = f" ({image})" if image else ""
    text = _text(error)
    if isinstance(error, ValueError | OSError) and text:
        return (ValueError if isinstance(error, ValueError) else OSError)(f"{text}{where}")
    return SampleError(f"{traceback.format_exception_only(error)[-1].strip()}{where}")


def _text(error: BaseException) -> str:
    """The error's message; empty if it has none or raises when asked for it."""
    try:
        return str(error)
    except Exception:
        return ""


def is_shared_memory_full(error: BaseException) -> bool:
    """Whether PyTorch could not allocate shared memory, or Python no semaphore in it."""
    full_device = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    return full_device or (
        isinstance(error, RuntimeError) and "shared memory" in str(error) and "/torch_" in str(error)
    )

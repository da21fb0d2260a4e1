"""The training loop. Read it from top to bottom; to train differently, copy this file and change it.

The host waits for the device at log lines, checkpoints and evaluations, and never in between.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from boxwright.checks import check_device
from boxwright.data.dataset import Dataset, DatasetInfo
from boxwright.data.loader import TrainingLoader
from boxwright.detectors.detector import as_detector, require_proposals
from boxwright.structures import Batch, to_device
from boxwright.training import checkpoint
from boxwright.training.distributed import (
    broadcast_buffers,
    gather,
    max_over_ranks,
    mean_over_ranks,
    rank,
    world_size,
)
from boxwright.training.ema import EMA
from boxwright.training.experiment import Experiment, build, require_rebuildable, to_json, with_new_defaults
from boxwright.training.init_weights import load_init
from boxwright.training.interrupt import TrainingInterrupted, stop_request
from boxwright.training.metrics import Clock, Log, Window, log_line, memory, progress_line, train_curves, train_line
from boxwright.training.non_finite import NonFiniteGuard
from boxwright.training.optimizer import build_optimizer
from boxwright.training.options import TrainingOptions
from boxwright.training.plan import Plan
from boxwright.training.resume import newest_checkpoint, require_same_run
from boxwright.training.run_folder import RunFolder, versions, write_json
from boxwright.training.startup import log_start
from boxwright.training.step import TrainStep
from boxwright.weights.ours import save_weights


def train(experiment: Experiment, dataset: Dataset, out: Path, **options: Any) -> Path:
    """Train an experiment on a data set and return the path of the trained weights; see `TrainingOptions`."""
    return Training(experiment, dataset, out, **options).run()


class Training:
    """One training run."""

    def __init__(self, experiment: Experiment, dataset: Dataset, out: Path, **options: Any) -> None:
        """Build every part, and load the newest checkpoint if the run is resumed.

        Args:
            experiment: model and training settings.
            dataset: training set; its categories give the number of classes.
            out: folder of the run.
            options: fields of `TrainingOptions`.

        Raises:
            ValueError: The model cannot be rebuilt from its weights file or is not a detector; the folder holds another
                run; the run to resume has another experiment, is damaged, or is not visible to all processes;
                proposals are missing or not used; `init` does not match the model.
        """
        self.experiment, self.options, self.folder = experiment, TrainingOptions(**options), RunFolder(out)
        self.device = check_device(self.options.device)
        require_rebuildable(experiment)
        torch.manual_seed(experiment.seed)
        detector = as_detector(build(experiment.model, num_classes=len(dataset.categories)))
        # Weights are channels last, as feature maps are (see `PixelNormalizer`); gradients and momenta follow them.
        self.detector = detector.to(self.device).to(memory_format=torch.channels_last).train()
        require_proposals(self.detector, self.options.proposals is not None)
        newest = newest_checkpoint(self.folder.checkpoints) if self.options.resume else None
        if newest is None:
            self.folder.require_no_run()
            if self.options.init is not None:
                match_classes = self.options.init_classes
                load_init(self.detector, self.options.init, dataset.categories, match_classes=match_classes)
        self.loader = TrainingLoader(
            dataset,
            augmentation=experiment.augmentation,
            batch_size=experiment.images_per_device,
            proposals=self.options.proposals,
            masks=detector.needs_masks,
            seed=experiment.seed,
            num_workers=self.options.num_workers,
            rank=rank(),
            world_size=world_size(),
        )
        self.num_without_mask = (DatasetInfo(dataset).num_without_mask or 0) if detector.needs_masks else 0
        self.plan = Plan.of(
            experiment, self.options, batches_per_epoch=self.loader.steps_per_epoch, world_size=world_size()
        )
        self.optimizer = build_optimizer(experiment.optimizer, self.detector)
        self.ema = EMA(self.detector, experiment.ema_decay) if experiment.ema_decay else None
        self.train_step = TrainStep(
            self.detector,
            self.optimizer,
            device=self.device,
            precision=experiment.precision,
            clip_norm=experiment.clip_norm,
            compile=experiment.compile,
            num_canvases=self.loader.num_canvases,
            cuda_graphs=experiment.cuda_graphs,
            allowed_non_finite=self.options.allowed_non_finite,
        )
        self.guard = NonFiniteGuard(
            self.folder.non_finite,
            allowed=self.options.allowed_non_finite,
            read_batches=self._read_step,
            write_weights=self._write_weights,
        )
        self.window, self.clock = Window(self.plan.log_every, self.device), Clock()
        self.state = checkpoint.TrainingState(
            model=self.detector, optimizer=self.optimizer, ema=self.ema, device=self.device
        )
        self.metadata = {
            "experiment": to_json(experiment),
            "categories": [{"id": category.id, "name": category.name} for category in dataset.categories],
            "versions": versions(),
            "images_per_step": self.plan.images_per_step,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "world_size": world_size(),
            "command": self.options.command,
        }
        self.step = 0
        """Number of steps done."""
        self._start(newest)

    def run(self) -> Path:
        """Train until the last step, or until SIGINT or SIGTERM.

        Raises:
            NonFiniteError: A loss or gradient was not finite.
            TrainingInterrupted: The process received SIGINT or SIGTERM; a checkpoint was saved.
        """
        log_start(
            self.experiment,
            self.plan,
            self.detector,
            device=self.device,
            step=self.step,
            num_without_mask=self.num_without_mask,
        )
        if self.step:
            self._write_latest_weights()  # The run may have been killed between its checkpoint and its weights.
        with stop_request() as stop, closing(Log(self.folder.path, step=self.step)) as self.log:
            self._evaluate_if_due()  # The run may have been stopped before or during an evaluation.
            with closing(self._batches(self.step)) as batches:
                self.clock.restart()
                while self.step < self.plan.total_steps:
                    self._one_step(batches)
                    signal_number = stop.agreed()
                    if self.plan.due(self.step, self.plan.log_every):
                        self._log_interval()
                    if self.plan.due(self.step, self.plan.checkpoint_every) or signal_number:
                        self._save()
                    if signal_number and self.step < self.plan.total_steps:
                        raise TrainingInterrupted(signal_number, self.folder.checkpoints / f"step_{self.step}")
                    self._evaluate_if_due()
        return self.folder.weights

    def _batches(self, step: int) -> Generator[Batch]:
        """This rank's batches from a step on; each step takes `experiment.accumulate` of them."""
        return self.loader.batches(step * self.experiment.accumulate)

    def _one_step(self, batches: Iterator[Batch]) -> None:
        with self.clock.waiting_for_data():
            parts = list(islice(batches, self.experiment.accumulate))
        parts = [to_device(batch, self.device) for batch in parts]
        self.window.record(self.train_step(parts, self.plan.learning_rate(self.step)))
        self.step += 1
        self.clock.num_steps += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def _log_interval(self) -> None:
        rows = self.window.read()
        self.guard.check(rows, self.window.names, self.step)
        rows = mean_over_ranks(rows.double())
        line = train_line(rows, self.window.names, self.clock, self.plan, step=self.step) | memory(self.device)
        self.log.write(line, train_curves(line))
        log_line(progress_line(line, self.plan.total_steps))
        self.window.clear()
        self.clock.restart()

    def _save(self) -> None:
        """Write a checkpoint and the weights."""
        with self.clock.paused(self.device):
            broadcast_buffers(self.detector)
            rows = self.window.read()
            if len(rows):
                self.guard.check(rows, self.window.names, self.step)
            figures = {"window": torch.stack(gather(rows)), "num_non_finite": self.train_step.num_non_finite}
            metadata = {**self.metadata, "window_names": self.window.names}
            keep = self.experiment.keep_checkpoints
            path = checkpoint.save(
                self.folder.checkpoints, self.step, self.state, figures=figures, metadata=metadata, keep=keep
            )
            self._write_latest_weights()
        log_line(f"saved {path}")

    def _write_latest_weights(self) -> None:
        with self._averaged():
            self._write_weights(self.folder.weights)

    def _write_weights(self, path: Path) -> None:
        if rank() == 0:
            metadata = {name: self.metadata[name] for name in ("experiment", "categories", "versions")}
            save_weights(path, self.detector.state_dict(), {**metadata, "step": self.step})

    def _averaged(self) -> AbstractContextManager[None]:
        """Within the block, the detector has the averaged weights if the experiment keeps an average."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def _evaluate_if_due(self) -> None:
        if self.options.evaluate is None or not self.plan.due(self.step, self.plan.evaluate_every):
            return
        done = any(line["kind"] == "evaluation" and line["step"] == self.step for line in self.log.lines)
        if max_over_ranks(int(done)):
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with self.clock.paused(self.device), torch.random.fork_rng(devices), self._averaged():
            broadcast_buffers(self.detector)
            start = time.perf_counter()
            metrics = self.options.evaluate(self.detector)
            self.detector.train()
        line = {
            "kind": "evaluation",
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "seconds": time.perf_counter() - start,
            "metrics": metrics,
        }
        self.log.write(line, {f"evaluation/{name}": value for name, value in metrics.items()})
        log_line(f"step {self.step} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def _read_step(self, step: int) -> list[Batch]:
        """This rank's batches of one step."""
        with closing(self._batches(step)) as batches:
            return list(islice(batches, self.experiment.accumulate))

    def _start(self, newest: Path | None) -> None:
        """Load a checkpoint, or write `experiment.json` of a new run."""
        if rank() == 0:
            checkpoint.clear_leftovers(self.folder.checkpoints)
            if newest is None:
                self.folder.clear()
                write_json(self.folder.experiment, self.metadata)
        saved = {} if newest is None else checkpoint.read_metadata(newest)
        if newest is not None:
            saved["experiment"] = with_new_defaults(saved["experiment"], self.experiment)
            require_same_run(saved, self.metadata, self.folder.path)
        # Each rank draws its own random numbers, for layers such as dropout; the initial weights are the same on all.
        torch.manual_seed(self.experiment.seed + rank())
        if newest is None:
            return
        tensors = checkpoint.load(newest, self.state)
        self.step = saved["step"]
        # If the number of ranks changed, each rank continues with the mean over ranks, which log lines show anyway.
        windows = tensors["window"]
        self.window.restore(saved["window_names"], windows[rank()] if len(windows) == world_size() else windows.mean(0))
        self.train_step.num_non_finite.copy_(tensors["num_non_finite"])
        self.guard.resume(self.step, int(tensors["num_non_finite"]))
        checkpoint.restore_random_state(tensors, self.device)

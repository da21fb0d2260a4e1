"""The training loop, to be read from top to bottom. To train otherwise, copy this file and change it.

The host waits for the device at log lines (and where it must anyway: checkpoints, evaluations), never in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxwright.data.dataset import Dataset
from boxwright.data.loader import TrainingLoader
from boxwright.data.proposals import ProposalFile
from boxwright.detectors.detector import require_proposals
from boxwright.layers.norm import has_untrained_statistics
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
from boxwright.training.experiment import Experiment, build, to_json
from boxwright.training.init_weights import load_init
from boxwright.training.interrupt import TrainingInterrupted, stop_request
from boxwright.training.metrics import Clock, Log, Window, memory, progress_line, say
from boxwright.training.non_finite import NonFiniteError, keep_batches
from boxwright.training.optimizer import build_optimizer
from boxwright.training.run_folder import RunFolder, require_same, versions, write_page
from boxwright.training.schedule import learning_rate
from boxwright.training.step import TrainStep
from boxwright.weights.ours import save_weights

Evaluate = Callable[[nn.Module], dict[str, float]]
"""Measures a detector on all ranks together and gives every rank the numbers by name."""

_CURVES = ("total", "learning_rate", "grad_norm", "seconds_per_step", "images_per_second", "data_wait", "memory_mib")


def train(experiment: Experiment, dataset: Dataset, out: Path, **options: Any) -> Path:
    """Train an experiment on a data set; `Training` names the options. Returns the path of the trained weights."""
    return Training(experiment, dataset, out, **options).run()


class Training:
    """One run: what it holds while it runs, and what it does in each step."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        out: Path,
        *,
        device: torch.device | str = "cpu",
        evaluate: Evaluate | None = None,
        resume: bool = False,
        init: Path | None = None,
        init_classes: bool = False,
        proposals: ProposalFile | None = None,
        num_workers: int = 2,
        log_every: int | None = None,
        checkpoint_every: int | None = None,
        allowed_non_finite: int = 0,
        command: str = "",
    ) -> None:
        """Build everything, and read the newest checkpoint where the run goes on.

        Args:
            experiment: what to train and how.
            dataset: what to learn from; its categories decide the number of classes.
            out: the run's folder.
            device: where to train, from `process_group` where several processes do.
            evaluate: measures the detector every `experiment.evaluate_every` epochs and at the end.
            resume: go on from the newest checkpoint in `out`, if there is one.
            init: weights to start from; tensors whose name or shape is not the model's are left out, with a line.
            init_classes: take the rows of classes in `init` by the classes' names, see `load_init`.
            proposals: boxes for the images of `dataset`, for a detector without a network of its own for them.
            num_workers: processes that read images, for each rank.
            log_every: steps; None for 50, or fewer in a short run.
            checkpoint_every: steps; None for once an epoch.
            allowed_non_finite: how many steps may be left out because they are not finite before training stops.
            command: the command line, for the record.

        Raises:
            ValueError: the folder holds another run, the run to resume had another experiment or is damaged, not all
                processes see its checkpoints, proposals are missing or have no use, or `init` does not fit.
        """
        self.experiment, self.folder, self.device = experiment, RunFolder(out), torch.device(device)
        self.evaluate, self.allowed_non_finite = evaluate, allowed_non_finite
        torch.manual_seed(experiment.seed)
        detector = build(experiment.model, num_classes=len(dataset.categories))
        # Weights in the order of memory that the maps have (see `PixelNormalizer`), and so their gradients and momenta.
        self.detector = detector.to(device=self.device, memory_format=torch.channels_last).train()
        require_proposals(self.detector, proposals is not None)
        newest = checkpoint.newest(self.folder.checkpoints) if resume else None
        self._require_agreement(newest)
        if newest is None:
            self.folder.require_no_run()
        if init is not None and newest is None:
            load_init(self.detector, init, dataset.categories, match_classes=init_classes)
        needs_masks = getattr(self.detector, "needs_masks", False)
        self.loader = TrainingLoader(
            dataset,
            batch_size=experiment.images_per_device,
            resize=experiment.resize,
            scales=experiment.scales,
            scale_mode=experiment.scale_mode,
            flip=experiment.flip,
            scale_jitter=experiment.scale_jitter,
            crop=experiment.crop,
            photometric=experiment.photometric,
            proposals=proposals,
            masks=needs_masks,
            seed=experiment.seed,
            num_workers=num_workers,
            rank=rank(),
            world_size=world_size(),
        )
        self.num_without_mask = getattr(dataset, "num_without_mask", 0) if needs_masks else 0
        self.steps_per_epoch = max(1, self.loader.steps_per_epoch // experiment.accumulate)
        self.total_steps = experiment.epochs * self.steps_per_epoch
        self.images_per_step = experiment.images_per_device * world_size() * experiment.accumulate
        self.log_every = log_every or max(1, min(50, self.total_steps // 20))
        self.checkpoint_every = checkpoint_every or self.steps_per_epoch
        self.learning_rate = experiment.optimizer.lr * self.images_per_step / experiment.batch_size

        self.optimizer = build_optimizer(experiment.optimizer, self.detector)
        self.ema = EMA(self.detector, experiment.ema_decay) if experiment.ema_decay else None
        self.train_step = TrainStep(
            self.detector,
            self.optimizer,
            device=self.device,
            precision=experiment.precision,
            clip_norm=experiment.clip_norm,
            compile=experiment.compile,
            cuda_graphs=experiment.cuda_graphs,
            allowed_non_finite=allowed_non_finite,
        )
        self.state = checkpoint.TrainingState(
            model=self.detector, optimizer=self.optimizer, ema=self.ema, device=self.device
        )
        self.window, self.clock = Window(self.log_every, self.device), Clock()
        self.step, self.num_checked, self.num_non_finite = 0, 0, 0
        self.page = {
            "experiment": to_json(experiment),
            "categories": [{"id": category.id, "name": category.name} for category in dataset.categories],
            "versions": versions(),
            "images_per_step": self.images_per_step,
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": world_size(),
            "command": command,
        }
        self._begin(newest)

    def run(self) -> Path:
        """Train until the last step, or until a signal says stop.

        Raises:
            NonFiniteError: a loss or gradient was not finite.
            TrainingInterrupted: SIGINT or SIGTERM came; all is saved.
        """
        self._introduce()
        if self.step:
            self._write_latest_weights()  # a run that was killed between its checkpoint and its weights
        with stop_request() as stop, closing(Log(self.folder.path, step=self.step)) as self.log:
            self._evaluate_if_due()  # a run that was stopped before or while it evaluated
            with closing(self._batches(self.step)) as batches:
                self.clock.restart()
                while self.step < self.total_steps:
                    self._one_step(batches)
                    signal_number = stop.agreed()
                    if self._due(self.log_every):
                        self._log_interval()
                    if self._due(self.checkpoint_every) or signal_number:
                        self._save()
                    if signal_number and self.step < self.total_steps:
                        raise TrainingInterrupted(signal_number, self.folder.checkpoints / f"step_{self.step}")
                    self._evaluate_if_due()
        return self.folder.weights

    def _one_step(self, batches: Iterator[Batch]) -> None:
        with self.clock.waiting_for_data():
            parts = list(islice(batches, self.experiment.accumulate))
        parts = [to_device(batch, self.device) for batch in parts]
        self.window.record(self.train_step(parts, self._learning_rate(self.step)))
        self.step += 1
        self.clock.num_steps += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.experiment.schedule,
            step,
            base=self.learning_rate,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps is due, as it always is at the end."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.total_steps)

    def _log_interval(self) -> None:
        """Bring the interval's figures to the host, check them, and say them."""
        rows = self._checked_rows()
        rows = mean_over_ranks(rows.double())
        good = rows[rows[:, self.window.names.index("finite")] == 1]
        means = dict(zip(self.window.names, good.mean(0).tolist(), strict=True)) if len(good) else {}
        self.window.clear()
        seconds = self.clock.seconds / self.clock.num_steps
        line: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "learning_rate": self._learning_rate(self.step - 1),
            "total": means.pop("total", 0.0),
            "grad_norm": means.pop("grad_norm", 0.0),
            "losses": {name: value for name, value in means.items() if name != "finite"},
            "seconds_per_step": seconds,
            "images_per_second": self.images_per_step / seconds,
            "data_wait": self.clock.data_wait / self.clock.num_steps,
            "data_wait_share": self.clock.data_wait / self.clock.seconds,
            **memory(self.device),
            "eta_seconds": seconds * (self.total_steps - self.step),
        }
        losses = {f"loss/{name}": value for name, value in line["losses"].items()}
        rest = {f"train/{name}": line[name] for name in _CURVES}
        self.log.write(line, {**losses, **rest})
        say(progress_line(line, self.total_steps))
        self.clock.restart()

    def _checked_rows(self) -> Tensor:
        """This rank's figures since the last log line; here the host waits for the device.

        Raises:
            NonFiniteError: more steps than allowed were not finite.
        """
        rows = self.window.read()
        finite, total = self.window.names.index("finite"), self.window.names.index("total")
        for step, row in enumerate(rows, start=self.step - len(rows) + 1):
            if row[finite] == 0 and step > self.num_checked:
                self._keep_non_finite(step, loss_is_finite=bool(row[total].isfinite()))
        self.num_checked = self.step
        return rows

    def _keep_non_finite(self, step: int, *, loss_is_finite: bool) -> None:
        """Name and keep the images of a step that the device left out, read once more."""
        with closing(self._batches(step - 1)) as batches:
            parts = list(islice(batches, self.experiment.accumulate))
        path, image_ids = keep_batches(self.folder.non_finite, step, parts, loss_is_finite=loss_is_finite)
        what = (
            f"step {step}: the {'gradient' if loss_is_finite else 'loss'} is not finite on images {image_ids}; "
            f"the batch is kept in {path}"
        )
        self.num_non_finite += 1
        if self.num_non_finite <= self.allowed_non_finite:
            say(f"{what}. The step is left out ({self.num_non_finite} of {self.allowed_non_finite} allowed)")
            return
        weights = self.folder.non_finite / "weights.safetensors"
        self._write_weights(weights)
        raise NonFiniteError(
            f"{what}, the weights that met it in {weights}. Look at these images' annotations, lower the learning "
            "rate, or allow some such steps to be left out"
        )

    def _save(self) -> None:
        """Write a checkpoint and the weights, unless this step has them."""
        target = self.folder.checkpoints / f"step_{self.step}"
        with self.clock.paused(self.device):
            broadcast_buffers(self.detector)
            if self.window.num_rows:
                self._checked_rows()
            windows = torch.stack(gather(self.window.read()))
            figures = {"window": windows, "num_non_finite": self.train_step.num_non_finite}
            page = {**self.page, "window_names": self.window.names}
            keep = self.experiment.keep_checkpoints
            checkpoint.save(self.folder.checkpoints, self.step, self.state, figures=figures, page=page, keep=keep)
            self._write_latest_weights()
        say(f"saved {target}")

    def _write_latest_weights(self) -> None:
        with self._averaged():
            self._write_weights(self.folder.weights)

    def _write_weights(self, path: Path) -> None:
        if rank() == 0:
            metadata = {name: self.page[name] for name in ("experiment", "categories", "versions")}
            save_weights(path, self.detector.state_dict(), {**metadata, "step": self.step})

    def _evaluate_if_due(self) -> None:
        if self.evaluate is None or not self._due(self.experiment.evaluate_every * self.steps_per_epoch):
            return
        done = any(line["kind"] == "evaluation" and line["step"] == self.step for line in self.log.lines)
        if max_over_ranks(int(done)):
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with self.clock.paused(self.device), torch.random.fork_rng(devices), self._averaged():
            broadcast_buffers(self.detector)
            start = time.perf_counter()
            metrics = self.evaluate(self.detector)
            self.detector.train()
        line = {
            "kind": "evaluation",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "seconds": time.perf_counter() - start,
            "metrics": metrics,
        }
        self.log.write(line, {f"evaluation/{name}": value for name, value in metrics.items()})
        say(f"step {self.step} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it the detector has the averaged weights, where the experiment keeps an average."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def _batches(self, step: int) -> Generator[Batch]:
        """This rank's batches from a step on; each step takes as many as gradients are accumulated over."""
        return self.loader.batches(step * self.experiment.accumulate)

    def _begin(self, newest: Path | None) -> None:
        """Take up the newest checkpoint, or write the first page of a new run."""
        if rank() == 0:
            checkpoint.clear_leftovers(self.folder.checkpoints)
        if newest is None:
            if rank() == 0:
                self.folder.clear()
                write_page(self.folder.experiment, self.page)
            # A random state of each rank's own, for layers such as dropout; the model's start was the same on all.
            torch.manual_seed(self.experiment.seed + rank())
            return
        page = checkpoint.read_page(newest)
        require_same(_what_must_stay(page), _what_must_stay(self.page), self.folder.path)
        torch.manual_seed(self.experiment.seed + rank())
        kept = checkpoint.load(newest, self.state)
        self.step = page["step"]
        self.num_checked = self.step
        # With another number of processes no rank has rows of its own, but their mean is what a log line shows.
        windows = kept["window"]
        own = windows[rank()] if len(windows) == world_size() else windows.mean(0)
        self.window.restore(page["window_names"], own)
        self.train_step.num_non_finite.copy_(kept["num_non_finite"])
        self.num_non_finite = int(kept["num_non_finite"])
        checkpoint.restore_random_state(kept, self.device)

    def _require_agreement(self, newest: Path | None) -> None:
        """Check that all ranks go on from the same step: each reads the checkpoint itself.

        Raises:
            ValueError: they do not.
        """
        step = 0 if newest is None else checkpoint.step_of(newest)
        last = max_over_ranks(step)
        if last != -max_over_ranks(-step):
            raise ValueError(
                f"not every process sees {self.folder.checkpoints / f'step_{last}'}: give --out a folder that all "
                "machines share"
            )

    def _introduce(self) -> None:
        """Say what is about to run."""
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        stated = self.experiment.optimizer.lr
        say(
            f"{trained / 1e6:.1f} million parameters to train on {self.device.type}, {world_size()} process(es); "
            f"{self.total_steps} steps of {self.images_per_step} images, {self.steps_per_epoch} an epoch"
        )
        if self.images_per_step != self.experiment.batch_size:
            say(
                f"learning rate {self.learning_rate:g}: {stated:g} is for {self.experiment.batch_size} images a step, "
                f"here are {self.images_per_step}"
            )
        if self.num_without_mask:
            say(f"{self.num_without_mask:,} objects have no mask: their boxes are learnt, their masks are not")
        if self.step == 0 and has_untrained_statistics(self.detector):
            say(
                "warning: the backbone's statistics are frozen and untrained, so it will not learn. Start from weights "
                "(--init), or train all of it: --set model.backbone.norm=gn --set model.backbone.frozen_stages=0"
            )
        if self.step == self.total_steps:
            say(f"{self.folder.path} is finished already: all {self.total_steps} steps are done")
        elif self.step:
            say(f"going on after step {self.step}")


def _what_must_stay(page: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change when it goes on, by name; how a step's images are shared out over devices it may."""
    facts = {
        "images_per_device x processes x accumulate": page.get("images_per_step"),
        "steps_per_epoch": page.get("steps_per_epoch"),
        "categories": page.get("categories"),
    }
    return {**page["experiment"]["arguments"], "images_per_device": None, **facts}

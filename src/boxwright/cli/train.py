"""`boxwright train`: train a recipe on a data set, and write weights and a report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from boxwright.data.dataset import Dataset
    from boxwright.data.formats import Split
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.proposals import ProposalFile
    from boxwright.evaluation.coco import CocoMetrics
    from boxwright.evaluation.results import Results
    from boxwright.training.experiment import Experiment


def train(
    recipe: Annotated[
        str,
        typer.Argument(help="Name of a built-in recipe, such as faster_rcnn_r50_fpn_1x, or package.module:function."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a data set with a train split and, for evaluation, a val split. Repeatable: trains on all "
            "train splits together and evaluates on the first val split."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, for weights, checkpoints, curves and the report.", show_default="runs/RECIPE"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Field of the experiment to change, such as optimizer.lr=0.01; repeatable. --show prints all fields.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the experiment with all fields and exit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run, if there is one.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="WEIGHTS", help="Weights file to start from. Tensors with another name or shape are not loaded."
        ),
    ] = None,
    init_classes: Annotated[
        bool,
        typer.Option(
            "--init-classes",
            help="With --init, match class-specific rows by class name; other classes are re-initialised.",
        ),
    ] = False,
    proposals: Annotated[
        Path | None, typer.Option(help="Proposals file, for a model without an RPN (see boxwright propose).")
    ] = None,
    val_proposals: Annotated[
        Path | None,
        typer.Option(help="Proposals file of the validation images.", show_default="the same as --proposals"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Number of data loading workers per device.", show_default="one per core, at most 8"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="cuda if available")
    ] = None,
    train_annotations: Annotated[
        Path | None, typer.Option(help="Annotation file of the training images, instead of --data.")
    ] = None,
    train_images: Annotated[Path | None, typer.Option(help="Image folder of --train-annotations.")] = None,
    val_annotations: Annotated[
        Path | None, typer.Option(help="Annotation file of the validation images, instead of --data.")
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="Image folder of --val-annotations.")] = None,
    log_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between log lines.", show_default="50, fewer in a short run")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="one epoch")
    ] = None,
    allow_non_finite: Annotated[
        int,
        typer.Option(
            min=0, help="Number of steps with a non-finite loss or gradient that are skipped before training stops."
        ),
    ] = 0,
) -> None:
    """Train a recipe on a data set.

    On several devices: torchrun --nproc-per-node N -m boxwright train ...
    """
    from boxwright.cli.options import search_current_folder
    from boxwright.data.concat import ConcatDataset
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.proposals_foreign import open_proposals
    from boxwright.recipes import find_recipe
    from boxwright.text import plural
    from boxwright.training.distributed import process_group, rank
    from boxwright.training.experiment import Experiment
    from boxwright.training.interrupt import TrainingInterrupted
    from boxwright.training.loop import Training
    from boxwright.training.metrics import log_line
    from boxwright.training.settings import describe, with_settings

    search_current_folder(recipe)
    experiment = find_recipe(recipe)()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{recipe} is not a recipe: it returned {type(experiment).__name__}, expected an Experiment")
    experiment = with_settings(experiment, settings or [])
    if show:
        typer.echo(describe(experiment))
        return
    if init_classes and init is None:
        raise ValueError("--init-classes needs --init WEIGHTS")
    train_splits, val_splits = _splits(data or [], (train_annotations, train_images), (val_annotations, val_images))
    out = out or Path("runs") / recipe.rpartition(":")[2]
    num_workers = _spare_cores() if workers is None else workers
    with process_group(device) as chosen:
        for name, split in [*(("train", split) for split in train_splits), *(("val", split) for split in val_splits)]:
            log_line(f"{name}: {split.annotations}, images in {split.images}")
        parts = [IndexedDataset(*split) for split in train_splits]
        dataset = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        val = IndexedDataset(*val_splits[0]) if val_splits else None
        for part in parts:
            for what, count in part.dropped.items():
                log_line(f"{part.annotations}: dropped or clipped: {count:,} {what} (see boxwright data check)")
        offsets = [(part.index.object_offsets[part.rows], part.index.object_offsets[part.rows + 1]) for part in parts]
        num_objects = sum(int((last - first).sum()) for first, last in offsets)
        empty = sum(int((first == last).sum()) for first, last in offsets)
        training_set = f"{plural(len(dataset), 'image')} ({empty:,} empty), {plural(num_objects, 'object')}"
        log_line(f"train: {training_set} | val: {plural(len(val), 'image') if val else 'none'}")
        limit, val_file = experiment.given_proposals, val_proposals or proposals
        train_file = open_proposals(proposals, dataset.image_ids, split="train", limit=limit) if proposals else None
        val_proposals_file = (
            open_proposals(val_file, val.image_ids, split="val", limit=limit) if val_file and val else None
        )
        validation = Validation(experiment, dataset, val, num_workers, val_proposals_file) if val else None
        training = Training(
            experiment,
            dataset,
            out,
            device=chosen,
            evaluate=validation,
            resume=resume,
            init=init,
            init_classes=init_classes,
            proposals=train_file,
            num_workers=num_workers,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            allowed_non_finite=allow_non_finite,
            command=" ".join(["boxwright", *sys.argv[1:]]),
        )
        try:
            weights = training.run()
        except TrainingInterrupted as stop:
            log_line(str(stop))
            raise typer.Exit(128 + stop.signal_number) from None
        if validation is not None and (validation.latest is not None or not (out / "report.html").exists()):
            if validation.latest is None:  # The run was stopped between its last evaluation and its report.
                validation.measure(training.detector, weights)
            if rank() == 0:
                facts = {"recipe": recipe, "command": str(training.metadata["command"])}
                validation.report(out, weights, facts, data or [], val_file)
                log_line(f"report: {out / 'report.html'}")
        log_line(f"weights: {weights}")


class Validation:
    """Evaluates a detector on the validation split on all ranks, and keeps the latest results for the report."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        val: IndexedDataset,
        num_workers: int,
        proposals: ProposalFile | None = None,
    ) -> None:
        """Set up the loader of this rank.

        Raises:
            ValueError: The two splits have different categories.
        """
        from boxwright.data.loader import EvaluationLoader
        from boxwright.evaluation.results import match_categories
        from boxwright.training.distributed import rank, world_size

        match_categories(dataset.categories, val.categories)  # Before the first epoch, not after it.
        self._experiment, self._dataset, self._val = experiment, dataset, val
        self._loader = EvaluationLoader(
            val,
            batch_size=experiment.images_per_device,
            resize=experiment.resize,
            proposals=proposals,
            num_workers=num_workers,
            rank=rank(),
            world_size=world_size(),
        )
        self.latest: tuple[Results, CocoMetrics | dict[str, float]] | None = None
        """Detections and metrics of the latest evaluation."""

    def __call__(self, detector: nn.Module) -> dict[str, float]:
        """Compute AP of boxes and, if the detector has masks, of masks. For an RPN, compute recall."""
        from boxwright.detectors.detector import as_detector
        from boxwright.evaluation.evaluate import evaluate, evaluate_proposals

        device, precision = next(detector.parameters()).device, self._experiment.precision
        if as_detector(detector).class_agnostic:
            results, recall = evaluate_proposals(detector, self._val, self._loader, device=device, precision=precision)
            self.latest = results, recall
            return recall
        categories = self._dataset.categories
        results, metrics = evaluate(
            detector, self._val, self._loader, device=device, precision=precision, categories=categories
        )
        self.latest = results, metrics
        return metrics.numbers

    def measure(self, detector: nn.Module, weights: Path) -> None:
        """Evaluate a detector with the weights of a file."""
        from boxwright.weights.ours import load_weights

        detector.load_state_dict(load_weights(weights)[0])
        self(detector)

    def report(
        self, run: Path, weights: Path, facts: dict[str, str], folders: list[Path], proposals: Path | None
    ) -> None:
        """Write the evaluation into its folder, and a copy of its report into the folder of the run."""
        from boxwright.evaluation.results import write_results, write_whole
        from boxwright.report.evaluations import Evaluation, data_name, evaluation_folder, numbers_of
        from boxwright.report.html import write_report
        from boxwright.weights.download import sha256_of
        from boxwright.weights.ours import load_weights

        assert self.latest is not None
        results, metrics = self.latest
        file = self._val.annotations.resolve()
        evaluation = Evaluation(
            data=data_name(file, folders),
            split="val" if folders else file.stem,
            annotations=str(file),
            conditions={
                "precision": self._experiment.precision,
                "metric": "coco",
                "proposals": None if proposals is None else str(proposals.resolve()),
                "test-time augmentation": None,
                "max_detections": None,
                "weights": None,
            },
            step=load_weights(weights)[1].get("step"),
            weights=sha256_of(weights),
            metrics=dict(numbers_of(metrics)),
        )
        folder = evaluation_folder(run, "val", evaluation)
        write_results(folder / "results.json", results, self._val.categories)
        evaluation.write(folder)
        facts = {**facts, "data": evaluation.annotations, "split": evaluation.split}
        report = write_report(folder, self._val, results, metrics, run=run, facts=facts)
        write_whole(run / "report.html", report.read_bytes())


def _splits(
    folders: list[Path], train: tuple[Path | None, Path | None], val: tuple[Path | None, Path | None]
) -> tuple[list[Split], list[Split]]:
    """Training splits, and the validation split if any. Explicit files replace the splits found in the folders."""
    from boxwright.data.formats import Split, find_layout

    layouts = [find_layout(folder) for folder in folders]
    splits = {name: [layout[name] for layout in layouts if name in layout] for name in ("train", "val")}
    for name, (annotation_file, images) in {"train": train, "val": val}.items():
        if (annotation_file is None) != (images is None):
            raise ValueError(f"--{name}-annotations and --{name}-images must be used together")
        if annotation_file is not None and images is not None:
            splits[name] = [Split(annotation_file, images)]
    lacking = [str(folder) for folder, layout in zip(folders, layouts, strict=True) if "train" not in layout]
    if train == (None, None) and (lacking or not folders):
        problem = f"{lacking[0]} has no train split" if lacking else "no data set"
        raise ValueError(f"{problem}: use --data FOLDER, or --train-annotations FILE and --train-images FOLDER")
    return splits["train"], splits["val"][:1]


def _spare_cores() -> int:
    """Number of workers per process: its share of the cores of the machine, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

"""`boxwright test`: evaluate a model on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from boxwright.cli.options import PrecisionOption

if TYPE_CHECKING:
    import numpy as np

    from boxwright.data.dataset import Category
    from boxwright.evaluation.coco import CocoMetrics


def measure(
    model: Annotated[
        str, typer.Argument(help="Folder of a run, weights file, URL, hf:OWNER/NAME, or name of a zoo model.")
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of a data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of --data: train, val or test.")] = "val",
    annotations: Annotated[Path | None, typer.Option(help="Annotation file of one split, instead of --data.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of --annotations.")] = None,
    proposals: Annotated[
        Path | None, typer.Option(help="Proposals file, for a model without an RPN (see boxwright propose).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and report.html.",
            show_default="RUN/evaluation/SPLIT, or another name there if it holds another evaluation",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size per process.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Number of data loading workers per process.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="cuda if available")
    ] = None,
    precision: PrecisionOption = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            min=11,
            help="Maximum number of detections per image and class that are evaluated.",
            show_default="100 as in COCO, or the limit of the model if higher",
        ),
    ] = None,
    metric: Annotated[
        Literal["coco", "voc07", "voc12"],
        typer.Option(
            help="COCO AP, or Pascal VOC AP at IoU 0.5 with eleven points (voc07) or the area under the curve (voc12)."
        ),
    ] = "coco",
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Module outside Boxwright that parts of the model come from; repeatable. Its code is run."),
    ] = None,
    tta: Annotated[
        bool,
        typer.Option(
            "--tta",
            help="Test-time augmentation: predict each image at several sizes and mirrored, and merge the detections.",
        ),
    ] = False,
    tta_short: Annotated[
        str | None,
        typer.Option(
            help="With --tta, short sides of the image, such as 640,800,960.", show_default="the training size"
        ),
    ] = None,
    tta_flip: Annotated[bool, typer.Option(help="With --tta, also predict mirrored images.")] = True,
) -> None:
    """Evaluate a model on a data set: AP of boxes and masks, or AR of proposals.

    Writes results.json and report.html into a folder per evaluation, in RUN/evaluation. With torchrun, several devices
    share the images.
    """
    from boxwright.cli.console import ImageProgress, print_metrics
    from boxwright.data.formats import Split, find_layout
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.loader import EvaluationLoader
    from boxwright.data.proposals_foreign import open_proposals
    from boxwright.detectors.detector import require_proposals
    from boxwright.evaluation.evaluate import evaluate_proposals
    from boxwright.evaluation.results import match_categories, write_results
    from boxwright.evaluation.views import View, evaluate_views, view_suppression, views_of
    from boxwright.evaluation.voc import voc_metrics
    from boxwright.predictor import load, weights_file
    from boxwright.report.evaluations import Evaluation, data_name, evaluation_folder, numbers_of
    from boxwright.report.html import write_report
    from boxwright.training.distributed import process_group, rank, world_size
    from boxwright.weights.download import sha256_of
    from boxwright.weights.fetch import is_url
    from boxwright.weights.hub import is_hub_uri
    from boxwright.zoo import load_zoo

    if out is None and (is_url(model) or is_hub_uri(model) or (not Path(model).exists() and model in load_zoo())):
        raise ValueError(
            f"{model} is not in a run's folder, so there is no default folder for the results: use --out FOLDER"
        )
    if annotations is not None and images is not None and data is None:
        chosen_split = Split(annotations, images)
    elif data is not None and annotations is None and images is None:
        layout = find_layout(data)
        if split not in layout:
            raise ValueError(f"{data} has no split {split!r}; it has {', '.join(layout)}. Choose one with --split.")
        chosen_split = layout[split]
    else:
        raise ValueError("no data set: use either --data FOLDER, or --annotations FILE and --images FOLDER")
    if not tta and (tta_short is not None or not tta_flip):
        raise ValueError("--tta-short and --no-tta-flip need --tta")
    shorts = _short_sides(tta_short)
    weights = weights_file(model)
    run = weights.parent
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        require_proposals(predictor.detector, proposals is not None)
        dataset = IndexedDataset(*chosen_split)
        limit = predictor.experiment.given_proposals
        proposal_file = open_proposals(proposals, dataset.image_ids, split=split, limit=limit) if proposals else None
        detector = predictor.detector
        is_proposals = detector.class_agnostic
        unfit = "--tta" if tta else f"--metric {metric}" if metric != "coco" else None
        if is_proposals and unfit is not None:
            raise ValueError(f"{unfit}: {model} is an RPN, whose proposals are evaluated by recall. Leave out {unfit}.")
        if not is_proposals:  # Before the evaluation, not after it.
            match_categories(predictor.categories, dataset.categories)
        resize = predictor.experiment.resize
        views = [View(resize)]
        if tta:
            view_suppression(detector)
            views = views_of(resize, shorts, flip=tta_flip)
        loaders = [
            EvaluationLoader(
                dataset,
                batch_size=batch_size,
                resize=view.resize,
                flipped=view.flipped,
                proposals=proposal_file,
                num_workers=workers,
                rank=rank(),
                world_size=world_size(),
            )
            for view in views
        ]
        metrics: CocoMetrics | dict[str, float]
        common: dict[str, Any] = {"device": chosen, "precision": predictor.experiment.precision}
        with ImageProgress("testing", len(dataset) * len(views), world_size(), shown=rank() == 0) as progress:
            if is_proposals:
                results, metrics = evaluate_proposals(
                    detector, dataset, loaders[0], progress=progress.advance, **common
                )
            else:
                results, metrics = evaluate_views(
                    detector,
                    dataset,
                    loaders,
                    categories=predictor.categories,
                    max_detections=None if max_detections is None else (1, 10, max_detections),
                    progress=progress.advance,
                    **common,
                )
        if rank() > 0:
            return
        shown_views = [f"{view.resize.short}{' mirrored' if view.flipped else ''}" for view in views]
        file = chosen_split.annotations.resolve()
        evaluation = Evaluation(
            data=data_name(file, [] if data is None else [data]),
            split=file.stem if data is None else split,
            annotations=str(file),
            conditions={
                "precision": predictor.experiment.precision,
                "metric": metric,
                "proposals": None if proposals is None else str(proposals.resolve()),
                "test-time augmentation": ", ".join(shown_views) if tta else None,
                "max_detections": max_detections,
                "weights": None if weights.name == "weights.safetensors" else weights.name,
            },
            step=predictor.metadata.get("step"),
            weights=sha256_of(weights),
            metrics=dict(numbers_of(metrics)),
        )
        extras = [precision, metric if metric != "coco" else None, "tta" if tta else None]
        name = "_".join([evaluation.split, *filter(None, extras)])
        out = evaluation_folder(run, name, evaluation) if out is None else out
        write_results(out / "results.json", results, dataset.categories)
        evaluation.write(out)
        facts = {"model": str(model), "data": str(chosen_split.annotations), "split": evaluation.split}
        if tta:
            facts["test-time augmentation"] = f"short sides {', '.join(shown_views)}"
        if "step" in predictor.metadata:
            facts["step"] = f"{predictor.metadata['step']:,}"
        voc = voc_metrics(dataset, results, interpolation=metric) if metric != "coco" else None
        report = write_report(out, dataset, results, metrics, run=run, title=run.resolve().name, facts=facts, voc=voc)
        if voc is not None:
            _print_classes("class", voc.categories, voc.num_objects, ("AP",), voc.per_class[:, None])
            print_metrics({f"mAP of {metric}": voc.mean})
        else:
            _print_evaluation(metrics)
        typer.echo(f"{out / 'results.json'}\n{report}")


def _short_sides(text: str | None) -> list[int]:
    """Parse `--tta-short`."""
    sides = [] if text is None else [side.strip() for side in text.split(",")]
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"--tta-short: expected short sides in pixels separated by commas, such as 640,800,960, got {text!r}"
        )
    return [int(side) for side in sides]


def _print_evaluation(metrics: CocoMetrics | dict[str, float]) -> None:
    """Print the metrics, with one row per class."""
    from boxwright.cli.console import print_metrics
    from boxwright.evaluation.coco import CLASS_COLUMNS

    if isinstance(metrics, dict):
        print_metrics(metrics)
        return
    parts = [("class", metrics)] if metrics.masks is None else [("boxes", metrics), ("masks", metrics.masks)]
    for title, part in parts:
        _print_classes(title, part.categories, part.num_objects, CLASS_COLUMNS, part.per_class)
        print_metrics(part.summary)


def _print_classes(
    title: str, categories: Sequence[Category], num_objects: np.ndarray, columns: Sequence[str], per_class: np.ndarray
) -> None:
    """One row per class: its name, its number of objects and its metrics [C, columns]."""
    from boxwright.cli.console import print_table
    from boxwright.report.html import percent

    rows = [
        [category.name, str(count), *map(percent, values)]
        for category, count, values in zip(categories, num_objects, per_class, strict=True)
    ]
    print_table([title, "objects", *columns], rows)

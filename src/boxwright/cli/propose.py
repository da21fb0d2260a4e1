"""`boxwright propose`: write the proposals of an RPN, for models without an RPN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boxwright.cli.options import PrecisionOption

if TYPE_CHECKING:
    from boxwright.data.formats import Split


def propose(
    model: Annotated[
        str, typer.Argument(help="RPN: folder of a run, weights file, URL, hf:OWNER/NAME, or name of a zoo model.")
    ],
    out: Annotated[Path, typer.Option(help="Proposals file to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of a data set.")] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split of --data: train, val or test; repeatable.", show_default="train and val"),
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="Annotation file of one split, instead of --data.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of --annotations.")] = None,
    num_proposals: Annotated[int, typer.Option(min=1, help="Number of highest-scoring proposals per image.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size per process.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Number of data loading workers per process.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="cuda if available")
    ] = None,
    precision: PrecisionOption = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Module outside Boxwright that parts of the model come from; repeatable. Its code is run."),
    ] = None,
) -> None:
    """Write the proposals of an RPN for every image of a data set, for `train --proposals` and `test --proposals`.

    All splits are written into one file. With torchrun, several devices share the images.
    """
    import hashlib

    from boxwright.cli.console import ImageProgress, print_metrics
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.loader import EvaluationLoader
    from boxwright.evaluation.propose import ProposalWriter
    from boxwright.evaluation.propose import propose as propose_on
    from boxwright.predictor import load, weights_file
    from boxwright.text import plural
    from boxwright.training.distributed import process_group, rank, world_size
    from boxwright.training.metrics import log_line

    splits = _splits(data, split or [], annotations, images)
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        if not predictor.detector.class_agnostic:
            raise ValueError(
                f"{model} is not an RPN. Train one, such as rpn_r50_fpn_1x, and pass the folder of its run."
            )
        datasets = {name: IndexedDataset(*chosen_split) for name, chosen_split in splits.items()}
        with ProposalWriter(out) as writer:
            for name, dataset in datasets.items():
                loader = EvaluationLoader(
                    dataset,
                    batch_size=batch_size,
                    resize=predictor.experiment.resize,
                    num_workers=workers,
                    rank=rank(),
                    world_size=world_size(),
                )
                with ImageProgress(f"{name}: proposing", len(dataset), world_size(), shown=rank() == 0) as progress:
                    rows, recall = propose_on(
                        predictor.detector,
                        dataset,
                        loader,
                        device=chosen,
                        precision=predictor.experiment.precision,
                        limit=num_proposals,
                        progress=progress.advance,
                    )
                writer.add(name, dataset.annotations.name, dataset.image_ids.tolist(), rows)
                log_line(f"{name}: {plural(len(dataset), 'image')} of {dataset.annotations}")
                if rank() == 0:
                    print_metrics(recall)
            weights = weights_file(model)
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            num_images, total = writer.finish({"model": str(weights), "sha256": digest})
        log_line(f"{out}: {plural(total, 'proposal')} for {plural(num_images, 'image')} ({', '.join(datasets)})")


def _splits(data: Path | None, names: list[str], annotations: Path | None, images: Path | None) -> dict[str, Split]:
    """Selected splits by name."""
    from boxwright.data.formats import Split, find_layout

    if annotations is not None and images is not None and data is None:
        if len(names) > 1:
            raise ValueError("--annotations is one split: use --split at most once")
        return {names[0] if names else "val": Split(annotations, images)}
    if data is None or annotations is not None or images is not None:
        raise ValueError("no data set: use either --data FOLDER, or --annotations FILE and --images FOLDER")
    layout = find_layout(data)
    missing = [name for name in names if name not in layout]
    if missing:
        raise ValueError(f"{data} has no split {missing[0]!r}; it has {', '.join(layout)}. Choose one with --split.")
    return {name: layout[name] for name in layout if name in (names or ("train", "val"))} or layout

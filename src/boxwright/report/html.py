"""HTML report of a run: a single self-contained file with metrics, curves and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from boxwright.checks import check_count, check_number
from boxwright.data.dataset import Dataset
from boxwright.evaluation.coco import CLASS_COLUMNS, CocoMetrics
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.mistakes import Mistakes, find_mistakes
from boxwright.evaluation.results import Results, write_whole
from boxwright.evaluation.voc import VocMetrics
from boxwright.report.curves import NUM_COLOURS, Curve, line_chart, matrix_chart
from boxwright.report.worst import worst_images
from boxwright.training.metrics import read_lines

TRAINING_SIZE = (360, 220)
OPEN_CLASSES = 24
"""Tables and charts of more classes than this are collapsed."""


def write_report(
    folder: Path,
    dataset: Dataset,
    results: Results,
    metrics: CocoMetrics | Mapping[str, float],
    *,
    run: Path | None = None,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    voc: VocMetrics | None = None,
    score: float = 0.3,
    num_images: int = 24,
) -> Path:
    """Write `report.html` into a folder, atomically.

    Args:
        folder: output folder.
        dataset: dataset with the ground truth and the images.
        results: detections; labels are indices of the dataset's categories.
        metrics: metrics of `results`: COCO metrics, or proposal recall by name.
        run: folder of the run, whose `metrics.jsonl` gives the training curves; by default `folder`.
        title: title of the page; by default the name of the run.
        facts: other information below the title (model, data, command), by name.
        voc: Pascal VOC metrics of the same results; None leaves their section out.
        score: score threshold of the confusion matrix and the worst images; detections below it are ignored.
        num_images: number of worst images to show.

    Returns:
        Path of the page.
    """
    check_number("score", score, 0, 1)
    check_count("num_images", num_images, least=0)
    run = folder if run is None else run
    title = title or run.resolve().name
    history = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    body = [_header(title, {**(facts or {}), "images": f"{len(results.evaluated):,}"})]
    masks = metrics.masks if isinstance(metrics, CocoMetrics) else None
    body.append(_metrics(metrics.summary if isinstance(metrics, CocoMetrics) else metrics, masks))
    if voc is not None:
        body.append(_voc(voc))
    body.append(_training(history))
    if isinstance(metrics, CocoMetrics):
        truth = GroundTruth(dataset)
        mistakes = find_mistakes(truth, results, score=score)
        body += [_classes(metrics), _precision_recall(metrics), _confusion(mistakes, metrics)]
        body.append(worst_images(dataset, truth, mistakes, num_images))
    style = resources.files("boxwright.report").joinpath("report.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Boxwright</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = folder / "report.html"
    write_whole(path, page.encode())
    return path


def percent(value: float) -> str:
    """Format a value in 0..1 in percent, such as 37.4; a negative value (not measured) gives a dash."""
    return f"{100 * value:.1f}" if value >= 0 else "-"


def _header(title: str, facts: Mapping[str, str]) -> str:
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    return f"<header><h1>{escape(title)}</h1><dl>{listed}</dl></header>"


def _metrics(summary: Mapping[str, float], masks: CocoMetrics | None) -> str:
    groups = _tiles(summary)
    if masks is not None:
        groups = f"<h3>Boxes</h3>{groups}<h3>Masks</h3>{_tiles(masks.summary)}"
    definition, fixed_iou = "AR is average recall", ""
    if "AP" in summary:
        definition = "AP is average precision and AR average recall"
        fixed_iou = "; AP50 and AP75 are AP at IoU 0.50 and 0.75"
    note = (
        f"In percent. {definition} over IoU 0.50 to 0.95{fixed_iou}; s, m and l are objects below 32², below 96² and "
        "from 96² pixels; a number after AR is the maximum number of boxes per image."
    )
    return f'<section><h2>Metrics</h2>{groups}<p class="note">{note}</p></section>'


def _tiles(summary: Mapping[str, float]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{percent(value)}</b><span>{escape(name)}</span></div>' for name, value in summary.items()
    )
    return f'<div class="tiles">{tiles}</div>'


def _voc(voc: VocMetrics) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(category.name)}</th><td>{count:,}</td>'
        f'<td class="bar" style="--width:{max(0.0, 100 * value):.1f}%">{percent(value)}</td></tr>'
        for category, count, value in zip(voc.categories, voc.num_objects, voc.per_class, strict=True)
    )
    head = "<tr><th>class</th><th>objects</th><th>AP</th></tr>"
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    method = {"voc07": "11-point interpolation (VOC 2007)", "voc12": "area under the curve (VOC 2010 and later)"}
    note = f"AP at IoU 0.5, {method[voc.interpolation]}. Difficult objects and crowd regions are ignored."
    folded = _folded(table, len(voc.categories))
    mean = _tiles({"mAP": voc.mean})
    return f'<section><h2>Pascal VOC</h2>{mean}<p class="note">{note}</p>{folded}</section>'


def _training(history: Sequence[Mapping[str, Any]]) -> str:
    steps = [line for line in history if line.get("kind") == "train"]
    evaluations = [line for line in history if line.get("kind") == "evaluation"]
    charts = []
    if steps:
        xs = [line["step"] for line in steps]
        curves = [Curve("total", xs, [line["total"] for line in steps])]
        names = list(steps[-1]["losses"])[: NUM_COLOURS - 1]
        if len(names) > 1:
            curves += [Curve(name, xs, [line["losses"].get(name, np.nan) for line in steps]) for name in names]
        charts.append(line_chart(curves, title="Loss", x_label="step", size=TRAINING_SIZE))
        rates = [line["learning_rate"] for line in steps]
        charts.append(
            line_chart([Curve("learning rate", xs, rates)], title="Learning rate", x_label="step", size=TRAINING_SIZE)
        )
    if evaluations:
        names = [name for name in ("AP", "AP50", "AP75", "mask_AP") if name in evaluations[-1]["metrics"]]
        metric = "AP" if names else "AR"
        names = names or [name for name in evaluations[-1]["metrics"] if name.startswith("AR@")]
        xs = [line["step"] for line in evaluations]
        curves = [
            Curve(name, xs, [_percent_or_gap(line["metrics"].get(name, -1)) for line in evaluations]) for name in names
        ]
        charts.insert(
            1, line_chart(curves, title=f"{metric} on the validation split, %", x_label="step", size=TRAINING_SIZE)
        )
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>' if charts else ""


def _percent_or_gap(value: float) -> float:
    return 100 * value if value >= 0 else np.nan


def _classes(metrics: CocoMetrics) -> str:
    names, per_class = list(CLASS_COLUMNS), metrics.per_class
    if metrics.masks is not None:
        names += [f"mask {name}" for name in CLASS_COLUMNS[:3]]
        per_class = np.concatenate([per_class, metrics.masks.per_class[:, :3]], axis=1)
    head = "".join(f"<th>{name}</th>" for name in ("class", "objects", *names))
    rows = []
    for category, count, values in zip(metrics.categories, metrics.num_objects, per_class, strict=True):
        width = max(0.0, 100 * values[0])
        cells = "".join(f"<td>{percent(value)}</td>" for value in values[1:])
        rows.append(
            f'<tr><th scope="row">{escape(category.name)}</th><td>{count:,}</td>'
            f'<td class="bar" style="--width:{width:.1f}%">{percent(values[0])}</td>{cells}</tr>'
        )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><h2>Classes</h2>{_folded(table, len(rows))}</section>"


def _folded(content: str, num_classes: int) -> str:
    """The content, collapsed if there are more than `OPEN_CLASSES` classes."""
    if num_classes <= OPEN_CLASSES:
        return content
    return f"<details><summary>All {num_classes} classes</summary>{content}</details>"


def _precision_recall(metrics: CocoMetrics) -> str:
    measured = [row for row in range(len(metrics.categories)) if metrics.precision[0, 0, row] > -1]
    if not measured:
        return ""
    recalls = np.linspace(0, 1, metrics.precision.shape[1])
    labels = ("mean over IoU 0.50:0.95", "IoU 0.50", "IoU 0.75")

    def chart(precision: np.ndarray, title: str, size: tuple[int, int], *, large: bool) -> str:
        curves = [Curve(label, recalls, values) for label, values in zip(labels, precision, strict=True)]
        axis = "recall" if large else ""
        ends = (0.0, 1.0)
        return line_chart(curves, title=title, x_label=axis, x_range=ends, y_range=ends, size=size, legend=large)

    title = "Precision over recall, mean over the classes"
    overall = chart(metrics.precision[:, :, measured].mean(axis=2), title, (520, 280), large=True)
    if metrics.masks is not None:
        precision = metrics.masks.precision
        precision = precision[:, :, precision[0, 0] > -1]  # no object of a class may have a mask
        if precision.size:
            overall += chart(precision.mean(axis=2), f"{title}: masks", (520, 280), large=True)
    ordered = sorted(measured, key=lambda row: -metrics.per_class[row, 0])
    small = "".join(
        chart(
            metrics.precision[:, :, row],
            f"{metrics.categories[row].name} · {percent(metrics.per_class[row, 0])}",
            (220, 150),
            large=False,
        )
        for row in ordered
    )
    grid = _folded(f'<div class="small-charts">{small}</div>', len(measured))
    return f'<section><h2>Precision and recall</h2><div class="charts">{overall}</div>{grid}</section>'


def _confusion(mistakes: Mistakes, metrics: CocoMetrics) -> str:
    counts = mistakes.confusion
    names = [category.name for category in metrics.categories]
    shown = [row for row in range(len(names)) if counts[row].any() or counts[:, row].any()]
    if not shown:
        return ""
    rows_shown = [*shown, len(names)]
    chart = matrix_chart(
        counts[np.ix_(rows_shown, rows_shown)],
        [*(names[row] for row in shown), "nothing"],
        row_title="annotated",
        column_title="predicted",
    )
    pairs = [(int(counts[r, c]), names[r], names[c]) for r in shown for c in shown if r != c and counts[r, c]]
    listed = "".join(
        f"<li><b>{count}</b> {escape(true)} predicted as {escape(predicted)}</li>"
        for count, true, predicted in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:10]
    )
    most = f"<h3>Most often confused</h3><ol>{listed}</ol>" if listed else ""
    note = (
        f"Detections with a score of at least {mistakes.score:g}, in order of score, are matched with the object of "
        f"highest IoU ({mistakes.iou:g} or more) of any class. The shade of a cell is its share of the row. The column "
        "“nothing” has the missed objects, the row “nothing” the detections without an object."
    )
    content = f'<div class="confusion">{chart}<div>{most}</div></div>'
    return f'<section><h2>Confusion</h2><p class="note">{note}</p>{content}</section>'

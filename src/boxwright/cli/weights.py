"""`boxwright weights`: convert, export, inspect and compare weights files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from boxwright.importers.convert import Imported

app = typer.Typer(
    help="Convert weights from and to other libraries, inspect and compare weights files.", no_args_is_help=True
)

File = Annotated[Path, typer.Argument(help="Weights file: .pth, .pkl or .safetensors.")]
Source = Annotated[
    str | None, typer.Option(help="Library that wrote the file.", show_default="recognised from the file")
]
Categories = Annotated[
    Path | None,
    typer.Option(
        help="Class names, if the file does not contain them: a text file with one name per line, or a COCO JSON file."
    ),
]
NormEps = Annotated[
    float | None, typer.Option(help="Epsilon of the backbone's norm layers.", show_default="usual value of the library")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Setting that the file does not contain, such as model.box.score_threshold=0.01; repeatable.",
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(help="Module outside Boxwright that parts of the model come from; repeatable. Its code is run."),
]


@app.command()
def convert(
    file: File,
    out: Annotated[Path, typer.Option(help="Weights file to write.")],
    source: Source = None,
    categories: Categories = None,
    norm_eps: NormEps = None,
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256 hash of the file.")] = None,
    changes: Changes = None,
) -> None:
    """Convert weights of another library to a Boxwright weights file.

    No code in the file is executed. Settings that the file does not contain are taken from the published models of the
    library; `weights inspect` prints them, and --set changes them.
    """
    imported = _imported(file, source, categories, norm_eps, sha256, changes, require_names=True)
    imported.save(out)
    for line in _about(imported):
        typer.echo(line)
    typer.echo(f"written: {out}")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="Folder of a run, weights file, URL, hf:OWNER/NAME, or name of a zoo model.")
    ],
    out: Annotated[Path, typer.Option(help="File to write the state dict to (.pth).")],
    to: Annotated[str, typer.Option(help="Library to export to: torchvision.")] = "torchvision",
    trust: Trust = None,
) -> None:
    """Write a state dict for torchvision's detectors, and print the Python code that builds the detector.

    The exported detector gives the same detections. A model that torchvision cannot represent is refused with the
    reason.
    """
    from boxwright.importers.torchvision_export import export as export_model
    from boxwright.predictor import load

    if to != "torchvision":
        raise ValueError(f"--to: expected torchvision, got {to!r}")
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"--out: expected a file that ends in .pth, got {out}")
    predictor = load(model, trusted_modules=trust or ())
    try:
        exported = export_model(predictor.detector, predictor.experiment, predictor.categories)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    typer.echo(exported.save(out))


@app.command()
def inspect(
    file: File,
    source: Source = None,
    categories: Categories = None,
    norm_eps: NormEps = None,
    changes: Changes = None,
    trust: Trust = None,
) -> None:
    """Print the source, the settings and the tensors of a weights file."""
    from boxwright.importers.describe import model_line, settings_of, summary_of
    from boxwright.predictor import load
    from boxwright.weights.ours import is_ours, load_weights

    if is_ours(file):
        tensors, metadata = load_weights(file)
        typer.echo(f"{file}: Boxwright weights file")
        if "experiment" in metadata:
            predictor = load(file, trusted_modules=trust or ())
            typer.echo(model_line(predictor.experiment, len(predictor.categories)))
            typer.echo("\n".join(f"  {line}" for line in settings_of(predictor.experiment)))
        for name in ("source", "versions", "step"):
            if name in metadata:
                typer.echo(f"{name}: {metadata[name]}")
    else:
        imported = _imported(file, source, categories, norm_eps, None, changes, require_names=False)
        tensors = imported.tensors
        for line in _about(imported):
            typer.echo(line)
    for line in summary_of(tensors):
        typer.echo(line)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="First weights file, of any library.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Second weights file.")],
) -> None:
    """List the tensors that differ between two weights files, by Boxwright's names. Exit status 1 if any differ."""
    from boxwright.importers.describe import differences
    from boxwright.text import plural

    first, second = _tensors(a), _tensors(b)
    lines = list(differences(first, second))
    for line in lines:
        typer.echo(line)
    num_equal = sum(name in second for name in first) - sum(line.startswith(("shape", "value")) for line in lines)
    typer.echo(f"{plural(num_equal, 'tensor')} equal, {len(lines):,} different")
    if lines:
        raise typer.Exit(1)


def _imported(
    file: Path,
    source: str | None,
    categories: Path | None,
    norm_eps: float | None,
    sha256: str | None,
    changes: list[str] | None,
    *,
    require_names: bool,
) -> Imported:
    from boxwright.importers import convert as importer
    from boxwright.importers.categories import read_categories
    from boxwright.weights.foreign import read_foreign
    from boxwright.weights.ours import is_ours

    if is_ours(file):
        raise ValueError(f"{file} is already a Boxwright weights file")
    return importer.convert(
        read_foreign(file, sha256=sha256),
        source=source,
        categories=None if categories is None else read_categories(categories),
        norm_eps=norm_eps,
        changes=changes or (),
        require_names=require_names,
    )


def _about(imported: Imported) -> list[str]:
    from boxwright.importers.describe import model_line, settings_of
    from boxwright.text import plural

    lines = [f"{imported.file.path}: {imported.source.title}, sha256 {imported.file.sha256}"]
    if imported.experiment is None:
        lines.append("backbone only: use it with boxwright train --init")
    else:
        names = [category.name for category in imported.categories]
        lines.append(f"{model_line(imported.experiment, len(names))}: {', '.join(names)}")
        lines.append("settings that the file does not contain:")
        lines += [f"  {line}" for line in settings_of(imported.experiment)]
    lines.append(f"  epsilon of the backbone's norm layers: {imported.settings.norm_eps:g} (--norm-eps)")
    if imported.unused:
        lines.append(f"{plural(len(imported.unused), 'unused tensor')}: {', '.join(imported.unused)}")
    return lines


def _tensors(path: Path) -> dict[str, Tensor]:
    from boxwright.importers.convert import our_tensors
    from boxwright.weights.foreign import read_foreign
    from boxwright.weights.ours import is_ours, load_weights

    return load_weights(path)[0] if is_ours(path) else our_tensors(read_foreign(path))

"""`boxwright weights`: files of other code bases into ours, ours into theirs; what a file is; how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from boxwright.importers.convert import Imported

app = typer.Typer(
    help="Convert weights of other code bases and back, look into weights files, compare them.", no_args_is_help=True
)

File = Annotated[Path, typer.Argument(help="A weights file: .pth, .pkl or .safetensors.")]
Source = Annotated[str | None, typer.Option(help="Where it comes from, if the file does not tell.")]
Categories = Annotated[
    Path | None, typer.Option(help="The classes, if the file does not name them: a name a line, or a COCO JSON file.")
]
NormEps = Annotated[
    float | None, typer.Option(help="What the norms of the backbone add to the variance, if not the source's usual.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A number that the file does not hold; may be repeated."),
]
Trust = Annotated[
    list[str] | None, typer.Option(help="A module of yours that the model's parts come from; may be repeated.")
]


@app.command()
def convert(
    file: File,
    out: Annotated[Path, typer.Option(help="Where our weights file goes.")],
    source: Source = None,
    categories: Categories = None,
    norm_eps: NormEps = None,
    sha256: Annotated[str | None, typer.Option(help="What the file must hash to.")] = None,
    changes: Changes = None,
) -> None:
    """Convert weights of another code base into a file that predict, test and --init take.

    Nothing in the file is run. Where it does not say something, its source's published models do; `weights inspect`
    shows what is so assumed, and --set changes it.
    """
    imported = _imported(file, source, categories, norm_eps, sha256, changes, require_names=True)
    imported.save(out)
    for line in _about(imported):
        typer.echo(line)
    typer.echo(f"written to {out}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, a weights file, its URL, or a name of the zoo.")],
    out: Annotated[Path, typer.Option(help="Where the state dict goes, a .pth file.")],
    to: Annotated[str, typer.Option(help="Whose model it is to be: torchvision.")] = "torchvision",
    trust: Trust = None,
) -> None:
    """Write weights as torchvision's detectors load them, and print the Python that builds the detector.

    It then detects what the model detects here. A model that torchvision's code cannot be is an error that says why.
    """
    from boxwright.importers.torchvision_export import export as export_model
    from boxwright.predictor import load

    if to != "torchvision":
        raise ValueError(f"models cannot be exported to {to!r}: give --to torchvision")
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"{out}: torchvision's weights are torch's own files: give a name that ends in .pth")
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
    """Print what a weights file is, what would be assumed of it, and what is in it."""
    from boxwright.importers.describe import model_line, numbers_of, summary_of
    from boxwright.predictor import load
    from boxwright.weights.ours import is_ours, load_weights

    if is_ours(file):
        tensors, page = load_weights(file)
        typer.echo(f"{file}: Boxwright's own")
        if "experiment" in page:
            predictor = load(file, trusted_modules=trust or ())
            typer.echo(model_line(predictor.experiment, len(predictor.categories)))
            typer.echo("\n".join(f"  {line}" for line in numbers_of(predictor.experiment)))
        for name in ("source", "versions", "step"):
            if name in page:
                typer.echo(f"{name}: {page[name]}")
    else:
        imported = _imported(file, source, categories, norm_eps, None, changes, require_names=False)
        tensors = imported.tensors
        for line in _about(imported):
            typer.echo(line)
    for line in summary_of(tensors):
        typer.echo(line)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A weights file, of any kind.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
) -> None:
    """List the tensors in which two weights files differ, under our names; exit status 1 if any does."""
    from boxwright.importers.describe import differences

    first, second = _tensors(a), _tensors(b)
    lines = list(differences(first, second))
    for line in lines:
        typer.echo(line)
    num_equal = sum(name in second for name in first) - sum(line.startswith(("shape", "value")) for line in lines)
    typer.echo(f"{num_equal} tensors are equal, {len(lines)} are not")
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
        raise ValueError(f"{file} is one of Boxwright's already")
    return importer.convert(
        read_foreign(file, sha256=sha256),
        source=source,
        categories=None if categories is None else read_categories(categories),
        norm_eps=norm_eps,
        changes=changes or (),
        require_names=require_names,
    )


def _about(imported: Imported) -> list[str]:
    from boxwright.importers.describe import model_line, numbers_of

    lines = [f"{imported.file.path}: {imported.source.title}, sha256 {imported.file.sha256}"]
    if imported.experiment is None:
        lines.append("a backbone alone, to start training from with --init")
    else:
        names = [category.name for category in imported.categories]
        lines.append(f"{model_line(imported.experiment, len(names))}: {', '.join(names)}")
        lines.append("assumed, where the file does not say:")
        lines += [f"  {line}" for line in numbers_of(imported.experiment)]
    lines.append(f"  norms of the backbone add {imported.settings.norm_eps:g} to the variance (--norm-eps)")
    if imported.unused:
        lines.append(f"{len(imported.unused)} tensors without use here: {', '.join(imported.unused)}")
    return lines


def _tensors(path: Path) -> dict[str, Tensor]:
    from boxwright.importers.convert import our_tensors
    from boxwright.weights.foreign import read_foreign
    from boxwright.weights.ours import is_ours, load_weights

    return load_weights(path)[0] if is_ours(path) else our_tensors(read_foreign(path))

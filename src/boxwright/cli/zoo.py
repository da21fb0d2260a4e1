"""`boxwright zoo`: list public models, download their weights, publish models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, download and publish trained models.", no_args_is_help=True)

Zoo = Annotated[
    str | None,
    typer.Option(
        "--zoo", metavar="FILE|URL", help="TOML file of another zoo.", show_default="BOXWRIGHT_ZOO, or the built-in zoo"
    ),
]


@app.command("list")
def list_models(
    family: Annotated[
        str | None, typer.Option(help="Model family, such as mask_rcnn.", show_default="all families")
    ] = None,
    zoo: Zoo = None,
    model: Annotated[str | None, typer.Option(hidden=True, help="Deprecated name of --family.")] = None,
) -> None:
    """List the models with their published metrics and the source of the metrics."""
    from boxwright.cli.options import renamed
    from boxwright.training.experiment import nearest
    from boxwright.zoo import load_zoo

    entries = list(load_zoo(zoo).values())
    families = {entry.model.family for entry in entries}
    family = renamed(family, "--family", model, "--model")
    if family is not None and family not in families:
        raise ValueError(f"--family: the zoo has no models of family {family!r}{nearest(family, sorted(families))}")
    titles = {entry.collection.title: entry.collection for entry in entries}
    for title, collection in titles.items():
        models = [e.model for e in entries if e.collection is collection and family in (None, e.model.family)]
        if not models:
            continue
        typer.echo(f"{title}\n  measured by {collection.source}\n  data: {collection.data or 'not named'}")
        width = max(len(one.name) for one in models)
        for one in models:
            figures = ", ".join(f"{name} {value}" for name, value in one.figures.items())
            typer.echo(f"    {one.name.ljust(width)}  {figures or 'not measured'}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the model, as in boxwright zoo list.")],
    zoo: Zoo = None,
) -> None:
    """Print the metadata of a model."""
    from boxwright.weights.download import sha256_of
    from boxwright.weights.fetch import cached_path
    from boxwright.zoo import find_model, load_zoo

    entry = find_model(load_zoo(zoo), name)
    model, collection, remote = entry.model, entry.collection, entry.remote
    place = cached_path(remote)
    known = "complete" if len(remote.sha256) == 64 else f"first {len(remote.sha256)} digits"
    weak = f"first {len(remote.md5)} digits; detects damaged files, but not forged ones"
    note = f" ({collection.licence_note})" if collection.licence_note else ""
    lines = [
        ("model", f"{model.name}, of {collection.title}"),
        ("recipe", model.recipe or "no recipe has this architecture"),
        ("data", collection.data or "not named"),
        *[(figure, str(value)) for figure, value in model.figures.items()],
        ("measured by", collection.source),
        ("licence", f"{collection.licence}{note}"),
        ("file", remote.name),
        ("sha256", f"{remote.sha256} ({known})" if remote.sha256 else "not published"),
        ("md5", f"{remote.md5} ({weak})" if remote.md5 else ""),
        *[("mirror", url) for url in remote.urls],
        *[("results", mirror + model.results) for mirror in collection.mirrors if model.results],
        ("cached file", str(place) if place.is_file() else "no"),
        ("sha256 of cached file", sha256_of(place) if place.is_file() else ""),
        ("note", collection.note),
    ]
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        if value:
            typer.echo(f"{key.ljust(width)}{value}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="Name of the model, as in boxwright zoo list.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for a copy.", show_default="only in the cache")
    ] = None,
    zoo: Zoo = None,
) -> None:
    """Download the weights of a model into the cache, verify their hash, and print the path."""
    from boxwright.weights.fetch import copy_into, fetch
    from boxwright.zoo import find_model, load_zoo

    path = fetch(find_model(load_zoo(zoo), name).remote)
    typer.echo(path if out is None else copy_into(path, out))


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    data: Annotated[
        str, typer.Option(metavar="TEXT", help="Short description of the training and test data, for the model card.")
    ],
    licence: Annotated[str, typer.Option(metavar="ID", help="Licence of the weights, such as Apache-2.0.")],
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default="name of the run")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="hf:OWNER/NAME",
            help="Repository of the Hugging Face Hub to which the folder is pushed.",
            show_default="do not push",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --to, create a private repository.")] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Module outside Boxwright that parts of the model come from; repeatable. Its code is run."),
    ] = None,
) -> None:
    """Create a folder to publish: weights with their hash in the name, results, log and a model card."""
    from boxwright.hub import push, repository
    from boxwright.publish import About
    from boxwright.publish import publish as publish_run

    if private and to is None:
        raise ValueError("--private needs --to hf:OWNER/NAME")
    # Checked before anything is written.
    repo = None if to is None else repository(to)
    about = About(name=name or run.resolve().name, licence=licence, data=data)
    files = publish_run(run, out, about, trusted_modules=trust or ())
    for path in files:
        typer.echo(path)
    if repo is not None:
        typer.echo(f"{push(out, repo, private=private)}/resolve/main/{files[0].name}")


@app.command()
def page(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Markdown file to write.")],
    measured: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the JSON files that boxwright benchmark wrote.")
    ] = Path("docs/benchmarks/measured"),
    zoo: Zoo = None,
) -> None:
    """Write the page "Benchmark and Model Zoo" from stored measurements and published figures."""
    from boxwright.benchmark.page import write_page
    from boxwright.zoo import load_zoo

    if not measured.is_dir():
        raise ValueError(f"{measured}: folder not found. Use --measured with the folder of boxwright benchmark --json.")
    text = write_page(measured, load_zoo(zoo))
    out.write_text(text, encoding="utf-8")
    typer.echo(out)

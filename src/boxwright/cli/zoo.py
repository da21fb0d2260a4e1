"""`boxwright zoo`: list public models, fetch their weights, publish one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Public models: list them, fetch their weights, publish yours.", no_args_is_help=True)

Zoo = Annotated[
    str | None,
    typer.Option(
        "--zoo", metavar="FILE|URL", help="A list of your own.", show_default="BOXWRIGHT_ZOO, or Boxwright's list"
    ),
]


@app.command("list")
def list_models(
    model: Annotated[str | None, typer.Option(help="Models of this kind alone, such as mask_rcnn.")] = None,
    zoo: Zoo = None,
) -> None:
    """List the models by kind, with what they measured and who says so."""
    from boxwright.training.experiment import nearest
    from boxwright.zoo import load_zoo

    entries = list(load_zoo(zoo).values())
    families = {entry.model.family for entry in entries}
    if model is not None and model not in families:
        raise ValueError(f"the zoo has no models of kind {model!r}{nearest(model, sorted(families))}")
    titles = {entry.collection.title: entry.collection for entry in entries}
    for title, collection in titles.items():
        found = [e.model for e in entries if e.collection is collection and model in (None, e.model.family)]
        if not found:
            continue
        typer.echo(f"{title}\n  measured by {collection.source}\n  data: {collection.data or 'not named'}")
        width = max(len(one.name) for one in found)
        for one in found:
            figures = ", ".join(f"{name} {value}" for name, value in one.figures.items())
            typer.echo(f"    {one.name.ljust(width)}  {figures or 'not measured'}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="As zoo list prints it.")],
    zoo: Zoo = None,
) -> None:
    """Print all that is known of a model."""
    from boxwright.weights.download import sha256_of
    from boxwright.weights.fetch import cached_path
    from boxwright.zoo import find_model, load_zoo

    entry = find_model(load_zoo(zoo), name)
    model, collection, remote = entry.model, entry.collection, entry.remote
    place = cached_path(remote)
    known = "in full" if len(remote.sha256) == 64 else f"its first {len(remote.sha256)} digits are known"
    weak = f"its first {len(remote.md5)} digits, checked: they tell damage and mix-ups, and stop no forger"
    note = f" ({collection.licence_note})" if collection.licence_note else ""
    lines = [
        ("model", f"{model.name}, of {collection.title}"),
        ("recipe", model.recipe or "none has its architecture"),
        ("data", collection.data or "not named"),
        *[(figure, str(value)) for figure, value in model.figures.items()],
        ("measured by", collection.source),
        ("licence", f"{collection.licence}{note}"),
        ("file", remote.name),
        ("sha256", f"{remote.sha256} ({known})" if remote.sha256 else "not stated by those who published it"),
        ("md5", f"{remote.md5} ({weak})" if remote.md5 else ""),
        *[("mirror", url) for url in remote.urls],
        *[("results", mirror + model.results) for mirror in collection.mirrors if model.results],
        ("in the cache", str(place) if place.is_file() else "no"),
        ("its sha256", sha256_of(place) if place.is_file() else ""),
        ("note", collection.note),
    ]
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        if value:
            typer.echo(f"{key.ljust(width)}{value}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="As zoo list prints it.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put a copy here.", show_default="it stays in the cache")
    ] = None,
    zoo: Zoo = None,
) -> None:
    """Fetch a model's weights into the cache, checked by their hash, and print the path."""
    from boxwright.weights.fetch import copy_into, fetch
    from boxwright.zoo import find_model, load_zoo

    path = fetch(find_model(load_zoo(zoo), name).remote)
    typer.echo(path if out is None else copy_into(path, out))


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    data: Annotated[str, typer.Option(metavar="TEXT", help="What was learnt from and measured with, in a few words.")],
    licence: Annotated[str, typer.Option(metavar="ID", help="The licence of the weights, such as Apache-2.0.")],
    name: Annotated[str | None, typer.Option(help="Of the model.", show_default="the run's")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="hf:OWNER/NAME",
            help="Push the folder to this repository of the Hugging Face hub.",
            show_default="no",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --to: only for the repository's owner.")] = False,
    trust: Annotated[
        list[str] | None, typer.Option(help="A module of yours that the model's parts come from; may be repeated.")
    ] = None,
) -> None:
    """Make a folder to put on the network: weights with their hash in the name, results, log, and a model card."""
    from boxwright.hub import push, repository
    from boxwright.publish import About
    from boxwright.publish import publish as publish_run

    if private and to is None:
        raise ValueError("--private is of what is pushed: give --to too")
    # Told before anything is made.
    repo = None if to is None else repository(to)
    about = About(name=name or run.resolve().name, licence=licence, data=data)
    files = publish_run(run, out, about, trusted_modules=trust or ())
    for path in files:
        typer.echo(path)
    if repo is not None:
        typer.echo(f"{push(out, repo, private=private)}/resolve/main/{files[0].name}")


@app.command()
def page(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Markdown file to write.")],
    measured: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of what boxwright benchmark --json wrote.")
    ] = Path("docs/benchmarks/measured"),
    zoo: Zoo = None,
) -> None:
    """Write the page "Benchmark and Model Zoo" from stored measurements and published figures."""
    from boxwright.benchmark.page import write_page
    from boxwright.zoo import load_zoo

    if not measured.is_dir():
        raise ValueError(f"{measured}: there is no such folder: give --measured, of boxwright benchmark --json")
    text = write_page(measured, load_zoo(zoo))
    out.write_text(text, encoding="utf-8")
    typer.echo(out)

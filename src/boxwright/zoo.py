"""Public models: where their weights are, what they measured and who says so.

The list is `zoo.toml` beside this file. A zoo of one's own is a file or a URL of the same form: collections, each with
models that share their mirrors, licence and source of figures.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from boxwright import __version__
from boxwright.importers.convert import convert
from boxwright.training.experiment import nearest
from boxwright.weights.fetch import Remote, fetch, hash_in_name, is_file_name, is_hash, is_url, read_page
from boxwright.weights.foreign import read_foreign
from boxwright.weights.ours import is_ours

BUILT_IN = Path(__file__).with_name("zoo.toml")


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One weights file."""

    name: str
    """What `zoo show` and `zoo download` call it; letters, digits, `_`, `-`, `+` and dots."""
    file: str
    """Its path behind a mirror's URL."""
    family: str
    """The kind of model, such as mask_rcnn."""
    recipe: str = ""
    """The recipe that has the same architecture; empty if none has."""
    sha256: str = ""
    """The file's hash, in full or its first 8 digits or more; empty if the file's name carries it."""
    md5_prefix: str = ""
    """The MD5 hash's first 6 digits or more, where those who published the file state nothing better. It tells damage
    and mix-ups; whoever wants to can make another file of the same."""
    results: str = ""
    """The path of what it detected, a COCO results file, behind a mirror's URL; empty if there is none."""
    figures: dict[str, float] = {}
    """What was measured, by name; AP and AR in percent."""


class Collection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models that come from one place."""

    title: str
    """What they are."""
    licence: str
    """The licence of the weights, as an SPDX identifier where there is one."""
    source: str
    """Who measured the figures, and how."""
    mirrors: list[str]
    """URLs that end with a slash, the first to ask first."""
    models: list[Model]
    """The models."""
    licence_note: str = ""
    """What else is to be known of the licence."""
    data: str = ""
    """What they were trained and measured on."""
    note: str = ""
    """What else is to be known."""


class _Zoo(msgspec.Struct, forbid_unknown_fields=True):
    collections: list[Collection]


class Entry(msgspec.Struct, frozen=True):
    """A model with the collection that it is in."""

    model: Model
    """The weights file."""
    collection: Collection
    """What it shares with others."""

    @property
    def remote(self) -> Remote:
        """The weights file, to fetch."""
        return Remote(
            name=self.model.file.rpartition("/")[2],
            urls=tuple(mirror + self.model.file for mirror in self.collection.mirrors),
            sha256=self.model.sha256 or hash_in_name(self.model.file),
            md5=self.model.md5_prefix,
        )


def load_zoo(source: str | Path | None = None) -> dict[str, Entry]:
    """The models of a zoo by name, in the order of its file.

    Args:
        source: A TOML file or its URL; left out, what `BOXWRIGHT_ZOO` names, or else Boxwright's own list.

    Raises:
        ValueError: It is no such list; the message names the entry.
        OSError: It cannot be read.
    """
    place = str(source or os.environ.get("BOXWRIGHT_ZOO") or BUILT_IN)
    content = read_page(place) if is_url(place) else Path(place).read_bytes()
    try:
        page = msgspec.toml.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place} is no TOML file: {error}") from None
    try:
        zoo = msgspec.convert(page, _Zoo)
    except msgspec.ValidationError as error:
        raise ValueError(f"{place}: {_with_names(str(error), page)}") from None
    entries: dict[str, Entry] = {}
    for collection in zoo.collections:
        _check_mirrors(place, collection)
        for model in collection.models:
            fault = _fault(model) or ("there is another of this name" if model.name in entries else "")
            if fault:
                raise ValueError(f"{place}: model {model.name!r}: {fault}")
            entries[model.name] = Entry(model, collection)
    return entries


def find_model(zoo: dict[str, Entry], name: str) -> Entry:
    """A model by name.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    if name not in zoo:
        raise ValueError(f"the zoo has no model {name!r}{nearest(name, zoo)}")
    return zoo[name]


def fetch_weights(entry: Entry) -> Path:
    """A model's weights in a file that `boxwright.load` opens: fetched, and brought into that form the first time.

    Raises:
        ValueError: The file is none that can be brought into our form (see `importers.convert`).
        OSError: It cannot be fetched.
    """
    fetched = fetch(entry.remote)
    if fetched.suffix == ".safetensors" and is_ours(fetched):
        return fetched
    # A later version may read the same file otherwise.
    ours = fetched.with_name(f"{fetched.stem}.boxwright-{__version__}.safetensors")
    if not ours.exists():
        convert(read_foreign(fetched)).save(ours)
    return ours


def _check_mirrors(place: str, collection: Collection) -> None:
    wrong = [mirror for mirror in collection.mirrors if not is_url(mirror) or not mirror.endswith("/")]
    if wrong or not collection.mirrors:
        found = repr(wrong[0]) if wrong else "no mirror"
        raise ValueError(
            f"{place}: collection {collection.title!r} has {found}: give http or https URLs that end with a slash"
        )


def _fault(model: Model) -> str:
    """What is wrong with a model; empty if nothing is."""
    if not is_file_name(model.name):
        return "a name has letters, digits, _, -, + and dots alone, and begins with a letter, digit or _"
    for path in filter(None, (model.file, model.results)):
        if not all(map(is_file_name, path.split("/"))):
            return f"{path!r} is no path of a file behind a mirror: give one such as models/name.pth"
    stated, carried = model.sha256, hash_in_name(model.file)
    if model.md5_prefix and not re.fullmatch(r"[0-9a-f]{6,32}", model.md5_prefix):
        return f"md5_prefix {model.md5_prefix!r} is none: give the first 6 to 32 lower-case hexadecimal digits"
    if not stated and not carried and not model.md5_prefix:
        return (
            "nothing tells the file's SHA-256 hash: give sha256, or let the file's name end in -<8 digits of it>; or "
            "where its makers state an MD5 hash alone, md5_prefix"
        )
    if stated and not is_hash(stated):
        return f"sha256 {stated!r} is no hash: give 64 lower-case hexadecimal digits, or at least the first 8"
    if stated and carried and not (stated.startswith(carried) or carried.startswith(stated)):
        return f"sha256 {stated!r} is not the {carried!r} that the file's name ends in"
    return ""


def _with_names(message: str, page: Any) -> str:
    """A fault that msgspec found, with the title and the name of the entry that it is in."""
    found = re.search(r"collections\[(\d+)\](?:\.models\[(\d+)\])?", message)
    if found is None:
        return message
    entry = page["collections"][int(found[1])]
    key, kind = "title", "collection"
    if found[2] is not None:
        entry, key, kind = entry["models"][int(found[2])], "name", "model"
    name = entry.get(key) if isinstance(entry, dict) else None
    return message if name is None else f"{kind} {name!r}: {message}"

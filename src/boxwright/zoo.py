"""Model zoo: public models with the locations of their weights, their published metrics and their sources.

Boxwright's list is `zoo.toml` in this folder. Another zoo is a file or URL in the same format: collections, each with
models that share mirrors, licence and source.
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
from boxwright.weights.fetch import Remote, fetch, hash_in_name, is_file_name, is_hash, is_url, read_remote
from boxwright.weights.foreign import read_foreign
from boxwright.weights.ours import is_ours

BUILT_IN = Path(__file__).with_name("zoo.toml")


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One weights file."""

    name: str
    """Name of the model in `zoo show` and `zoo download`: letters, digits, `_`, `-`, `+` and dots."""
    file: str
    """Path of the file, relative to a mirror's URL."""
    family: str
    """Model family, such as mask_rcnn."""
    recipe: str = ""
    """Recipe with the same architecture; empty if there is none."""
    sha256: str = ""
    """SHA-256 hash, complete or at least the first 8 digits; empty if the file name contains it."""
    md5_prefix: str = ""
    """First 6 or more digits of the MD5 hash, if the publisher states no SHA-256 hash. It detects damaged and wrong
    files, but not files that were forged on purpose."""
    results: str = ""
    """Path of the model's detections, a COCO results file, relative to a mirror's URL; empty if there is none."""
    figures: dict[str, float] = {}
    """Published metrics by name; AP and AR in percent."""


class Collection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models of the same publisher."""

    title: str
    """Title of the collection."""
    licence: str
    """Licence of the weights, as an SPDX identifier if there is one."""
    source: str
    """Where the metrics were published, and how they were measured."""
    mirrors: list[str]
    """URLs that end with a slash, in order of preference."""
    models: list[Model]
    """The models."""
    licence_note: str = ""
    """Remarks on the licence."""
    data: str = ""
    """Training and validation data."""
    note: str = ""
    """Other remarks."""


class _Zoo(msgspec.Struct, forbid_unknown_fields=True):
    collections: list[Collection]


class Entry(msgspec.Struct, frozen=True):
    """A model and its collection."""

    model: Model
    """The model."""
    collection: Collection
    """The collection that holds it."""

    @property
    def remote(self) -> Remote:
        """The weights file, as an argument for `fetch`."""
        return Remote(
            name=self.model.file.rpartition("/")[2],
            urls=tuple(mirror + self.model.file for mirror in self.collection.mirrors),
            sha256=self.model.sha256 or hash_in_name(self.model.file),
            md5=self.model.md5_prefix,
        )


def load_zoo(source: str | Path | None = None) -> dict[str, Entry]:
    """Read the list of models of a zoo, by name in the order of the file. No weights are downloaded.

    Args:
        source: path or URL of a TOML file; by default the value of `BOXWRIGHT_ZOO`, or Boxwright's list.

    Raises:
        ValueError: the file is not TOML, or an entry is invalid; the message names the entry.
        OSError: the file cannot be read.
    """
    path = str(source or os.environ.get("BOXWRIGHT_ZOO") or BUILT_IN)
    content = read_remote(path) if is_url(path) else Path(path).read_bytes()
    try:
        document = msgspec.toml.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}. Correct the file.") from None
    try:
        zoo = msgspec.convert(document, _Zoo)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {_name_entry(str(error), document)}") from None
    entries: dict[str, Entry] = {}
    for collection in zoo.collections:
        _check_mirrors(path, collection)
        for model in collection.models:
            error_text = _model_error(model) or (
                "duplicate name. Give each model a different name." if model.name in entries else ""
            )
            if error_text:
                raise ValueError(f"{path}: model {model.name!r}: {error_text}")
            entries[model.name] = Entry(model, collection)
    return entries


def find_model(zoo: dict[str, Entry], name: str) -> Entry:
    """Look up a model by name.

    Raises:
        ValueError: there is no model of this name; the message suggests similar names.
    """
    if name not in zoo:
        raise ValueError(f"the zoo has no model {name!r}{nearest(name, zoo)}")
    return zoo[name]


def fetch_weights(entry: Entry) -> Path:
    """Download a model's weights and return a file that `boxwright.load` can open.

    Weights in another format are converted on first use; the converted file is cached.

    Raises:
        ValueError: the file is in a format that cannot be converted (see `importers.convert`).
        OSError: the file cannot be downloaded.
    """
    fetched = fetch(entry.remote)
    if fetched.suffix == ".safetensors" and is_ours(fetched):
        return fetched
    # The name contains the version, since another version of Boxwright may convert the file differently.
    converted = fetched.with_name(f"{fetched.stem}.boxwright-{__version__}.safetensors")
    if not converted.exists():
        convert(read_foreign(fetched)).save(converted)
    return converted


def _check_mirrors(path: str, collection: Collection) -> None:
    invalid = [mirror for mirror in collection.mirrors if not is_url(mirror) or not mirror.endswith("/")]
    if invalid or not collection.mirrors:
        fault = f"the invalid mirror {invalid[0]!r}" if invalid else "no mirror"
        raise ValueError(
            f"{path}: collection {collection.title!r} has {fault}. Mirrors are http or https URLs that end with /."
        )


def _model_error(model: Model) -> str:
    """Error message for an invalid model; empty if the model is valid."""
    if not is_file_name(model.name):
        return "a name may only contain letters, digits, _, -, + and dots, and starts with a letter, digit or _"
    for path in filter(None, (model.file, model.results)):
        if not all(map(is_file_name, path.split("/"))):
            return f"{path!r} is not a relative path. Give a path below the mirror's URL, such as models/name.pth."
    sha256, sha256_in_name = model.sha256, hash_in_name(model.file)
    if model.md5_prefix and not re.fullmatch(r"[0-9a-f]{6,32}", model.md5_prefix):
        return f"md5_prefix: expected 6 to 32 lower-case hexadecimal digits, got {model.md5_prefix!r}"
    if not sha256 and not sha256_in_name and not model.md5_prefix:
        return (
            "no hash. Set sha256, or use a file name that ends with - and the first 8 digits of the hash. If the "
            "publisher only states an MD5 hash, set md5_prefix."
        )
    if sha256 and not is_hash(sha256):
        return f"sha256: expected 8 to 64 lower-case hexadecimal digits, got {sha256!r}"
    if sha256 and sha256_in_name and not (sha256.startswith(sha256_in_name) or sha256_in_name.startswith(sha256)):
        return f"sha256 {sha256!r} contradicts the hash {sha256_in_name!r} in the file name"
    return ""


def _name_entry(message: str, document: Any) -> str:
    """Prefix msgspec's error message with the title or name of the invalid entry."""
    match = re.search(r"collections\[(\d+)\](?:\.models\[(\d+)\])?", message)
    if match is None:
        return message
    entry = document["collections"][int(match[1])]
    key, kind = "title", "collection"
    if match[2] is not None:
        entry, key, kind = entry["models"][int(match[2])], "name", "model"
    name = entry.get(key) if isinstance(entry, dict) else None
    return message if name is None else f"{kind} {name!r}: {message}"

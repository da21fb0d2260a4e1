"""Weights files of the Hugging Face hub by the name of their repository: `hf:owner/name`, or `hf:owner/name/FILE`."""

from __future__ import annotations

import re
from urllib.parse import quote

import msgspec

from boxwright.weights.download import hub
from boxwright.weights.fetch import Remote, hash_in_name, is_file_name, read_page

_PLACE = re.compile(r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>.+))?", re.ASCII)


class _Stored(msgspec.Struct):
    """How the hub keeps a large file."""

    sha256: str


class _File(msgspec.Struct):
    """A file of a repository."""

    rfilename: str
    lfs: _Stored | None = None


class _Repository(msgspec.Struct):
    """What the hub says of one."""

    siblings: list[_File] = []


def is_hub_place(text: str) -> bool:
    """Whether it names a repository of the hub rather than a path."""
    return text.startswith("hf:")


def hub_file(place: str) -> Remote:
    """The weights file of a repository, with the hash that the hub states.

    The hub is asked each time, since a repository may hold another file tomorrow; of a private one, with `HF_TOKEN`.

    Args:
        place: `hf:owner/name`, where `weights.safetensors` or the only file of that kind is meant; `hf:owner/name/FILE`
            names one, of any kind.

    Raises:
        ValueError: It is no such place, or the repository has no such file, or several.
        FetchError: The hub cannot be asked, or refuses.
    """
    match = _PLACE.fullmatch(place)
    if match is None:
        raise ValueError(f"{place!r} is no place on the Hugging Face hub: give hf:owner/name or hf:owner/name/FILE")
    repo, wanted = match["repo"], match["file"]
    url = f"{hub()}/api/models/{repo}?blobs=true"
    try:
        page = msgspec.json.decode(read_page(url), type=_Repository)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{url} says nothing of a repository: {error}") from None
    files = {file.rfilename: file for file in page.siblings}
    kind = [name for name in files if name.endswith(".safetensors")]
    if wanted is None and "weights.safetensors" in files:
        wanted = "weights.safetensors"
    if wanted is None and len(kind) == 1:
        wanted = kind[0]
    name = (wanted or "").rpartition("/")[2]
    if wanted not in files or not is_file_name(name):
        what = f"no file {wanted}" if wanted else "several weights files" if kind else "no .safetensors file"
        listed = ", ".join(sorted(kind or files)) or "nothing"
        raise ValueError(f"hf:{repo} holds {what}: there is {listed}. Name one as hf:{repo}/FILE")
    stored = files[wanted].lfs
    return Remote(
        name=name,
        urls=(f"{hub()}/{repo}/resolve/main/{quote(wanted)}",),
        sha256=stored.sha256 if stored is not None else hash_in_name(name),
    )

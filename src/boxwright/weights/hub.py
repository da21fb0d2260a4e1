"""Weights files in repositories of the Hugging Face Hub: `hf:owner/name` or `hf:owner/name/FILE`."""

from __future__ import annotations

import re
from urllib.parse import quote

import msgspec

from boxwright.weights.download import hub_url
from boxwright.weights.fetch import Remote, hash_in_name, is_file_name, read_remote

_HUB_URI = re.compile(r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>.+))?", re.ASCII)


class _LargeFile(msgspec.Struct):
    """Git LFS information of a file."""

    sha256: str


class _File(msgspec.Struct):
    """A file of a repository."""

    rfilename: str
    lfs: _LargeFile | None = None


class _Repository(msgspec.Struct):
    """The part of the hub's answer about a repository that is used here."""

    siblings: list[_File] = []


def is_hub_uri(text: str) -> bool:
    """Whether a text names a repository of the hub (`hf:...`) and not a path."""
    return text.startswith("hf:")


def hub_file(uri: str) -> Remote:
    """Find the weights file of a repository, with the hash that the hub reports.

    Each call asks the hub, since the files of a repository can change. `HF_TOKEN` gives access to private repositories.

    Args:
        uri: `hf:owner/name/FILE` for a file of any type, or `hf:owner/name` for `weights.safetensors` or else the only
            .safetensors file of the repository.

    Raises:
        ValueError: the URI is invalid, the repository does not have the file, or it has several .safetensors files.
        FetchError: the hub cannot be reached or denies access.
    """
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise ValueError(f"invalid Hugging Face Hub name {uri!r}. Use hf:owner/name or hf:owner/name/FILE.")
    repo, path = match["repo"], match["file"]
    url = f"{hub_url()}/api/models/{repo}?blobs=true"
    try:
        repository = msgspec.json.decode(read_remote(url), type=_Repository)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{url} did not return a repository description: {error}") from None
    files = {file.rfilename: file for file in repository.siblings}
    safetensors = [name for name in files if name.endswith(".safetensors")]
    if path is None and "weights.safetensors" in files:
        path = "weights.safetensors"
    if path is None and len(safetensors) == 1:
        path = safetensors[0]
    name = (path or "").rpartition("/")[2]
    if path not in files or not is_file_name(name):
        fault = f"no file {path}" if path else "several weights files" if safetensors else "no .safetensors file"
        listed = ", ".join(sorted(safetensors or files)) or "none"
        raise ValueError(f"hf:{repo} has {fault}. Files: {listed}. Select one with hf:{repo}/FILE.")
    lfs = files[path].lfs
    return Remote(
        name=name,
        urls=(f"{hub_url()}/{repo}/resolve/main/{quote(path)}",),
        sha256=lfs.sha256 if lfs is not None else hash_in_name(name),
    )

"""Published folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from boxwright.weights.fetch import is_offline


def repository(place: str) -> str:
    """The `owner/name` of `hf:owner/name`, where it can be pushed to from here; nobody is asked.

    Raises:
        ValueError: It is no such place, huggingface_hub is not installed, or nothing may be asked of the network.
    """
    scheme, _, repo = place.partition(":")
    if scheme != "hf" or repo.count("/") != 1:
        raise ValueError(f"{place!r} is no place to push to: give hf:owner/name, a repository of the Hugging Face hub")
    try:
        from huggingface_hub.utils import validate_repo_id
    except ModuleNotFoundError as error:
        raise ValueError(
            f"to push to {place} needs huggingface_hub, which is not installed: pip install 'boxwright[hub]'"
        ) from error
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"{place!r} cannot be a repository of the Hugging Face hub: {error}") from error
    if is_offline():
        raise ValueError(f"nothing can be pushed to {place}, because BOXWRIGHT_OFFLINE is set: unset it")
    return repo


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Put the files of a folder into a model repository, in one commit.

    The repository is made unless it is there; what else is in it stays. The token and the host are those that
    huggingface_hub finds: `HF_TOKEN`, or what `hf auth login` left, and `HF_ENDPOINT`.

    Args:
        folder: What `publish` made.
        repo: `owner/name`.
        private: Only for its owner to see.

    Returns:
        The repository's URL.

    Raises:
        ValueError: The repository is public where `private` is asked for; nothing has been put there.
        OSError: The hub refused or cannot be reached; the commit has not been made.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        exposed = private and not api.model_info(repo).private
        if not exposed:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Publish {folder.name}")
    except Exception as error:  # those of its HTTP client too, which is another in each version
        raise OSError(
            f"{folder} is made, but was not pushed to {repo} ({type(error).__name__}: {str(error).strip()}): "
            f"mend that, then run: hf upload {repo} {folder}"
        ) from error
    if exposed:
        raise ValueError(f"{repo} is there already and public, and --private is given: {folder} was not pushed")
    return url

"""Push published models to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from boxwright.weights.fetch import is_offline


def repository(uri: str) -> str:
    """Return the repository `owner/name` of `hf:owner/name`, after local checks that do not access the network.

    Raises:
        ValueError: the URI is invalid, huggingface_hub is not installed, or `BOXWRIGHT_OFFLINE` is set.
    """
    scheme, _, repo = uri.partition(":")
    if scheme != "hf" or repo.count("/") != 1:
        raise ValueError(f"cannot push to {uri!r}. Give a repository of the Hugging Face Hub as hf:owner/name.")
    try:
        from huggingface_hub.utils import validate_repo_id
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot push to {uri}: huggingface_hub is not installed. Run pip install 'boxwright[hub]'."
        ) from error
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"{uri!r} is not a valid repository name: {error}") from error
    if is_offline():
        raise ValueError(f"cannot push to {uri}: BOXWRIGHT_OFFLINE is set. Unset it to use the network.")
    return repo


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload the files of a folder to a model repository in one commit.

    The repository is created if it does not exist; its other files are kept. huggingface_hub takes the token from
    `HF_TOKEN` or `hf auth login`, and the host from `HF_ENDPOINT`.

    Args:
        folder: folder that `publish` wrote.
        repo: `owner/name`.
        private: create a private repository.

    Returns:
        URL of the repository.

    Raises:
        ValueError: `private` is True but the repository is public; nothing was uploaded.
        OSError: the hub denied the upload or cannot be reached; no commit was made.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        exposed = private and not api.model_info(repo).private
        if not exposed:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Publish {folder.name}")
    except Exception as error:  # includes the exceptions of its HTTP client, which differ between versions
        raise OSError(
            f"{folder} was written but not pushed to {repo} ({type(error).__name__}: {str(error).strip()}). "
            f"Fix the cause, then run: hf upload {repo} {folder}"
        ) from error
    if exposed:
        raise ValueError(
            f"--private: {repo} already exists and is public, so {folder} was not pushed. Make the repository private, "
            "use another name, or remove --private."
        )
    return url

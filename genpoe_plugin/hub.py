"""The Hugging Face hub: parse names with revisions, download files, find commits, and upload directories.

The token is the one that huggingface_hub finds, in ``HF_TOKEN`` or from ``hf auth login``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RevisionNotFoundError

from genpoe_plugin.errors import InputError

UNREACHABLE = (HTTPError, HFValidationError, OSError)
"""The errors of huggingface_hub for a repository that is missing, private or unreachable, or has an invalid name."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER = "adapter_config.json"


def split_revision(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Split ``user/name@revision`` into repository and revision; the name of a directory is returned unchanged.

    Args:
        name: a directory or a hub repository.
        revision: branch, tag or commit, if it is not part of ``name``.

    Returns:
        The directory or repository, and the revision; None without a revision.

    Raises:
        InputError: there are two different revisions, nothing after the ``@``, or a revision for a directory.
    """
    text = str(name)
    if Path(text).is_dir():
        if revision is not None:
            raise InputError(f"{text}: a directory, which has no revision {revision}; leave the revision out")
        return text, None
    repository, at, revision_in_name = text.partition("@")
    if at and not revision_in_name:
        raise InputError(f"{text}: no revision after the @; give a branch, a tag or a commit")
    if at and revision not in (None, revision_in_name):
        raise InputError(f"{text}: two revisions, {revision_in_name} and {revision}; give one")
    return repository, revision_in_name or revision


def download(name: str | Path, files: Sequence[str], revision: str | None = None) -> tuple[Path, str]:
    """Download files of a repository into the hub's cache; files that it does not have are skipped.

    Args:
        name: ``user/name`` or ``user/name@revision``.
        files: names or patterns of the files.
        revision: branch, tag or commit, if it is not part of ``name``.

    Returns:
        The directory with the files, and the commit.

    Raises:
        InputError: there is no such revision.
        `UNREACHABLE`: the repository does not exist, or it is unreachable and not in the cache.
    """
    repository, revision = split_revision(name, revision)
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: the repository has no revision {revision}") from error
    return directory, directory.name


def commit_of(name: str | Path, revision: str | None = None) -> str | None:
    """The commit of a model that was loaded from the hub; None for a directory or if the commit is unknown."""
    if Path(name).is_dir():
        return None
    try:
        _, commit = download(name, ("config.json", _ADAPTER), revision)
    except (InputError, *UNREACHABLE):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def loaded_from(name: str | Path) -> tuple[str, dict[str, str]]:
    """The name and the options for transformers to load a model with.

    An adapter with a revision is downloaded here, because transformers would look for the same revision in the
    repository of its base model.

    Raises:
        InputError: there is nothing after the ``@``.
    """
    repository, revision = split_revision(name)
    if revision is None:
        return repository, {}
    try:
        directory, _ = download(name, ["*.json"])
        if (directory / _ADAPTER).is_file():
            return str(download(name, ["*"])[0]), {}
    except (InputError, *UNREACHABLE):
        pass  # transformers will report the error
    return repository, {"revision": revision}


def make_repository(name: str, revision: str | None = None, *, private: bool | None = None) -> str:
    """Create a hub repository, and a branch in it, if they do not exist.

    Args:
        name: ``user/name``, or a name in the user's own namespace.
        revision: branch to create.
        private: whether a new repository is private; by default the hub decides.

    Returns:
        The repository's name, as ``user/name``.

    Raises:
        InputError: the hub is unreachable, or refuses the request.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
    except UNREACHABLE as error:
        raise _refused(name, error) from error
    return repository


def upload(directory: Path, repository: str, revision: str | None = None) -> str:
    """Upload the files of a directory to a repository as one commit; other files of the repository stay.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the hub is unreachable, or refuses the upload.
    """
    try:
        commit = HfApi().upload_folder(repo_id=repository, folder_path=directory, revision=revision)
    except UNREACHABLE as error:
        raise _refused(repository, error) from error
    return str(commit.commit_url)


def _refused(name: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"{name}: cannot be pushed to the hub ({reason}); pushing needs a token with write access, from "
        "`hf auth login` or HF_TOKEN"
    )

"""The Hugging Face hub: names with a revision, the commit behind one, and a directory as a repository.

The token is the one that huggingface_hub finds: ``HF_TOKEN``, or what ``hf auth login`` keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RevisionNotFoundError

from genpoe_plugin.errors import InputError

UNREACHABLE = (HTTPError, HFValidationError, OSError)
"""What huggingface_hub raises where a repository is not there, not for everyone, not named rightly, or out of reach."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER = "adapter_config.json"


def split_revision(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """The repository and the revision of ``user/name@revision``; a directory of that name is left as it is.

    Args:
        revision: a branch, a tag or a commit, where it is not part of ``name``.

    Raises:
        InputError: two revisions, none behind the ``@``, or one of a directory.
    """
    text = str(name)
    if Path(text).is_dir():
        if revision is not None:
            raise InputError(f"{text}: a directory, which has no revision {revision}; leave the revision out")
        return text, None
    repository, at, behind = text.partition("@")
    if at and not behind:
        raise InputError(f"{text}: no revision behind the @; give a branch, a tag or a commit")
    if at and revision not in (None, behind):
        raise InputError(f"{text}: two revisions, {behind} and {revision}; give one")
    return repository, behind or revision


def download(name: str | Path, files: Sequence[str], revision: str | None = None) -> tuple[Path, str]:
    """Those of ``files`` that a repository has, in the hub's cache, and its commit.

    Raises:
        InputError: there is no such revision.
        `UNREACHABLE`: there is no such repository, or it is neither within reach nor in the cache.
    """
    repository, revision = split_revision(name, revision)
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: the repository has no revision {revision}") from error
    return directory, directory.name


def commit_of(name: str | Path, revision: str | None = None) -> str | None:
    """The commit of a model that was loaded from the hub; None for a directory, and where it cannot be told."""
    if Path(name).is_dir():
        return None
    try:
        _, commit = download(name, ("config.json", _ADAPTER), revision)
    except (InputError, *UNREACHABLE):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def loaded_from(name: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers loads a model from, and the options that it needs.

    Files of an adapter with a revision are downloaded here: transformers looks for its revision in its base model too.

    Raises:
        InputError: there is nothing behind the ``@``.
    """
    repository, revision = split_revision(name)
    if revision is None:
        return repository, {}
    try:
        directory, _ = download(name, ["*.json"])
        if (directory / _ADAPTER).is_file():
            return str(download(name, ["*"])[0]), {}
    except (InputError, *UNREACHABLE):
        pass  # transformers says what is wrong
    return repository, {"revision": revision}


def make_repository(name: str, revision: str | None = None, *, private: bool | None = None) -> str:
    """Make a repository of the hub, and a branch of it, unless they are there.

    Args:
        name: ``user/name``, or a name among one's own.

    Returns:
        ``user/name``.

    Raises:
        InputError: the hub is out of reach, or does not let the user do that.
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
    """Make the files of a directory a commit of a repository; other files there stay.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub is out of reach, or does not let the user do that.
    """
    try:
        commit = HfApi().upload_folder(repo_id=repository, folder_path=directory, revision=revision)
    except UNREACHABLE as error:
        raise _refused(repository, error) from error
    return str(commit.commit_url)


def _refused(name: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"{name}: cannot be pushed to the hub ({reason}); that needs a token that may write, by `hf auth login` or "
        "HF_TOKEN"
    )

"""``index.json``, the manifest of an index directory: what retrieves, of which passages, and the files to check it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest, refuse_pickles
from genpoe_plugin.json_text import read_json

FORMAT, VERSION = "genpoe-index", 3
READABLE = (2, VERSION)
"""Versions that can be read. Version 2 has one more file, which nothing reads."""
MANIFEST = "index.json"
DENSE, BM25 = "dense", "bm25"  # kinds of retrievers


def retriever_kind(manifest: Mapping[str, Any]) -> str:
    """What searches the index; manifests of vectors do not say it."""
    return str(manifest.get("retriever", DENSE))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of an index, and check that its files have the sizes that were written.

    Raises:
        InputError: the directory is not an index, or a file is missing, has another size or is in another directory.
    """
    path = directory / MANIFEST
    refuse_pickles(directory)
    if not path.is_file():
        raise InputError(f"{directory}: not an index (no {MANIFEST}); create one with `genpoe index build`")
    try:
        manifest = read_json(path)
        format_and_version = manifest.get("format"), manifest.get("version")
        sizes = {name: int(file["bytes"]) for name, file in manifest.get("files", {}).items()}
        hashes = [file["sha256"] for file in manifest.get("files", {}).values()]
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise invalid(directory) from error
    if format_and_version not in [(FORMAT, version) for version in READABLE]:
        stored = f"version {format_and_version[1]}" if format_and_version[0] == FORMAT else "another format"
        raise InputError(f"{path}: {stored} instead of version {VERSION} of an index; build the index again")
    if not all(isinstance(text, str) for text in hashes):
        raise invalid(directory)
    for name, size in sizes.items():
        file = directory / name
        if name != file.name:
            raise InputError(f"{path}: names {name!r}, which is not a file of its directory; build the index again")
        try:
            actual_size = file.stat().st_size if file.is_file() else None
        except OSError as error:  # the name is too long for a file
            raise invalid(directory) from error
        if actual_size != size:
            actual = "no file" if actual_size is None else f"{actual_size:,} bytes"
            raise InputError(f"{file}: {actual} where {size:,} bytes were written; build the index again")
    return manifest


def invalid(directory: Path) -> InputError:
    """The error of a manifest that lacks something."""
    return InputError(f"{directory / MANIFEST}: not a valid index manifest; build the index again")


def written_files(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of some files of an index, for its manifest."""
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": file_digest(directory / name)} for name in names
    }


def verify_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the SHA-256 of every file with the manifest.

    Raises:
        InputError: a file is damaged; the message names it.
    """
    for name, file in manifest["files"].items():
        if file_digest(directory / name) != file["sha256"]:
            raise InputError(f"{directory / name}: damaged (sha256 differs); build the index again")

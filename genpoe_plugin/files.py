"""Reading plain or gzipped text, and writing so that a reader never sees half a file."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from genpoe_plugin.errors import InputError

PICKLES = (
    "DPR publishes its embeddings and indexes as pickles, which are not read here, for unpickling can run anything;"
    " encode its passages instead: `genpoe data download data.wikipedia_split.psgs_w100`, then `genpoe index build`"
)


def refuse_pickles(path: str | Path) -> None:
    """Raise an ``InputError`` with advice for a pickle, or a directory that has one."""
    path = Path(path)
    files = sorted(path.glob("*.pkl")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        with file.open("rb") as content:
            # No UTF-8 text begins with this byte; all pickles but those of Python 2 do.
            if file.suffix == ".pkl" or content.read(1) == b"\x80":
                raise InputError(f"{file}: {PICKLES}")


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """Open ``path`` as UTF-8 text, through gzip where its name ends in ``.gz``.

    A byte order mark is dropped; newlines are left as they are.

    Raises:
        InputError: there is no such file, or it is not the gzip or UTF-8 that it should be.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline="")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        with cast(BinaryIO, opener(path, "rb")) as file:
            if file.read(1) == b"\x80":  # the first byte of every pickle since 2003, and of no UTF-8
                raise InputError(
                    f"{path}: a pickle, which is not opened since that can run any code; DPR's questions, passages and"
                    " results come as TSV and JSON (`genpoe data list`), embeddings from `genpoe index build`"
                ) from error
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error


@contextmanager
def atomic_file(target: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that becomes ``target`` when the block ends without an error.

    Raises:
        FileExistsError: ``target`` is there and not to be replaced; of several processes that make it, one succeeds.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        if replace:
            temporary.replace(target)
        else:
            os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path, kept: str) -> Iterator[None]:
    """Turn a full disk, or whatever else keeps ``path`` from being written, into one line, which ends in ``kept``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {kept}") from error


def check_replaceable(target: str | Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Refuse to replace what is not ours: to be called before the work whose result `atomic_directory` writes.

    Args:
        target: where the result will be; it may be missing or an empty directory.
        is_ours: whether what is there is a ``kind``, such as "an index", which may be replaced.

    Raises:
        InputError: something else is there.
    """
    target = Path(target)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not is_ours(target):
        raise InputError(f"{target}: holds something that is not {kind}; give another directory")


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``target`` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(new: Path, target: Path) -> None:
    """Give the directory ``new`` the name ``target``, on the same file system; what is there is removed."""
    if target.exists():
        # A directory cannot be renamed over a full one, so the old one steps aside first.
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        target.replace(old / "previous")
        new.replace(target)
        shutil.rmtree(old)
    else:
        new.replace(target)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

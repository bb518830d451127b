"""Reading of plain or gzipped text, and atomic writing of files and directories."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from genpoe_plugin.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LONGEST_LINE = 1 << 24  # characters; a question with a thousand passages has less than a tenth
TOO_LONG = f"longer than {LONGEST_LINE:,} characters, which no question or passage is; the file is damaged"
PICKLES = (
    "DPR publishes its embeddings and indexes as pickles, which are not read, because unpickling can run any code;"
    " encode its passages instead: `genpoe data download data.wikipedia_split.psgs_w100`, then `genpoe index build`"
)

TEMPORARY = ".tmp"
"""Ending of the temporary files and directories beside their targets; their names begin with a dot."""


def refuse_pickles(path: str | Path) -> None:
    """Refuse a pickle, or a directory that has one.

    Raises:
        InputError: ``path`` is or has a pickle.
    """
    path = Path(path)
    files = sorted(path.glob("*.pkl")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        with file.open("rb") as content:
            # All pickles since protocol 2 begin with this byte; no UTF-8 text does.
            if file.suffix == ".pkl" or content.read(1) == b"\x80":
                raise InputError(f"{file}: {PICKLES}")


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """Open ``path`` as UTF-8 text, decompressed if its name ends in ``.gz``.

    A byte order mark is dropped; newlines are unchanged.

    Raises:
        InputError: there is no such file, or it is not valid gzip or UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline="")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged or incomplete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        with cast(BinaryIO, opener(path, "rb")) as file:
            if file.read(1) == b"\x80":  # a pickle; see `refuse_pickles`
                raise InputError(
                    f"{path}: a pickle, which is not read, because unpickling can run any code; DPR's questions,"
                    " passages and results come as TSV and JSON (`genpoe data list`), embeddings from"
                    " `genpoe index build`"
                ) from error
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that `open_text` opens, each with its number from 1.

    Raises:
        InputError: see `open_text`; or a line is longer than `LONGEST_LINE`. A small ``.gz`` may hold a line of any
            length, so none is read as a whole before its length is known.
    """
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                raise InputError(f"{path}:{number}: {TOO_LONG}")
            yield number, line


@contextmanager
def atomic_file(target: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that is renamed to ``target`` when the block ends without an error.

    Args:
        replace: whether to replace an existing file. Without, exactly one of several concurrent processes succeeds.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is false.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY)
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
def writing(path: str | Path, advice: str) -> Iterator[None]:
    """Turn an error in writing ``path``, such as a full disk, into an ``InputError`` that ends in ``advice``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error


@contextmanager
def only_writer(target: str | Path, *, wait: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """Lock the output ``target`` against other processes that write it, until the block ends.

    The lock is that of the kernel on the file `lock_file`. It ends with the process, also a killed one, so it never has
    to be removed by hand. On file systems without locks, nothing is locked. Temporary files that killed processes have
    left beside and in ``target`` are deleted.

    Args:
        target: the file or directory that is written.
        wait: called before waiting for another process; by default there is no waiting.

    Yields:
        The lock file. A process that inherits it holds the lock as well.

    Raises:
        InputError: another process writes ``target``, or the lock file cannot be written.
    """
    target = Path(target)
    path = lock_file(target)
    with ExitStack() as opened:
        while True:
            with writing(target, "give another output"):
                target.parent.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(path.open("ab"))
            if fcntl is None:
                locked = False
                break
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait is None:
                    raise InputError(
                        f"{target}: another process writes it; wait until it has ended, or give another output"
                    ) from None
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # no locks here
                locked = False
                break
            with suppress(FileNotFoundError):  # its last owner may just have deleted it
                if locked := os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
        try:
            if locked:
                _delete_temporaries(target)
            yield file
        finally:
            with suppress(OSError):
                path.unlink()


def lock_file(target: str | Path) -> Path:
    """The lock file of an output. It exists while a process writes the output, and after that process was killed."""
    return Path(target).with_name(f".{Path(target).name}.lock")


def clear_leftovers(target: str | Path, *work: Path) -> None:
    """Delete what a process has left that was killed just after it had completed ``target``.

    Args:
        target: the complete output.
        work: directories of unfinished work for it.

    Raises:
        InputError: another process writes ``target``.
    """
    if lock_file(target).exists():
        with only_writer(target):
            for directory in work:
                shutil.rmtree(directory, ignore_errors=True)


def _delete_temporaries(target: Path) -> None:
    beside = target.parent.glob(f".{glob.escape(target.name)}.*{TEMPORARY}")
    for path in [*beside, *(target.rglob(f".*{TEMPORARY}") if target.is_dir() else ())]:
        # Of this target, not of one whose name begins with it, and named by `tempfile`.
        if re.fullmatch(r"\.[a-z0-9_]{8}", path.name.removesuffix(TEMPORARY)[-9:]) and (
            path.parent != target.parent or len(path.name) == len(f".{target.name}.12345678{TEMPORARY}")
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_replaceable(target: str | Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Check that `atomic_directory` may replace ``target``. Call it before the work, not after.

    Args:
        target: output path, which may be missing or an empty directory.
        is_ours: whether a path holds a ``kind``, which may be replaced.
        kind: description of the output, such as "an index".

    Raises:
        InputError: ``target`` holds something else.
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
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY))
    try:
        yield temporary
        temporary.chmod(0o755)
        replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(new: Path, target: Path) -> None:
    """Rename the directory ``new`` to ``target``, on the same file system; an existing ``target`` is deleted."""
    if target.exists():
        # A directory cannot be renamed over a non-empty one, so the old one is moved away first.
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY))
        target.replace(old / "previous")
        new.replace(target)
        shutil.rmtree(old)
    else:
        new.replace(target)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Build an index from shards: train it on a sample, fill it chunk by chunk, and resume after any interruption.

Unfinished work is in a directory beside the index, ``NAME.building``:

- ``build.json``: the settings of the build;
- ``trained.faiss``: the trained, empty index;
- ``filled.faiss``: the partly filled index, if filling takes long;
- ``index``: the finished files of the index;
- ``shards``: the shards, if they are temporary.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, check_replaceable, only_writer, replace_directory, writing
from genpoe_plugin.indexing.corpus import source_of
from genpoe_plugin.indexing.factory import (
    CHUNK,
    POINTS_PER_CENTROID,
    Choice,
    centroids,
    choose_factory,
    describe_factory,
    filling_bytes,
    gigabytes,
    train,
    training_rows,
)
from genpoe_plugin.indexing.passage_writing import write_passages
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.indexing.tuning import nearest, query_vectors, tune
from genpoe_plugin.indexing.vectors import chunks, gathered, sampled_rows
from genpoe_plugin.json_text import read_json
from genpoe_plugin.retrieval.faiss_setup import faiss, faiss_reason, make_index, parts, read_faiss
from genpoe_plugin.retrieval.index import VECTORS, PassageIndex, open_vectors
from genpoe_plugin.retrieval.manifest import FORMAT, MANIFEST, VERSION, written_files
from genpoe_plugin.retrieval.passage_store import PASSAGES

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.encoder import Encoder

BUILD, TRAINED, FILLED, INDEX, SHARDS = "build.json", "trained.faiss", "filled.faiss", "index", "shards"
TRAINING_SEED = 0
SECONDS_BETWEEN_SAVES = 600
MAX_PARTS = 1000
RECALL = 0.95
RESUME_ADVICE = "finished work is saved; rerun the same command to resume"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queries:
    """Question vectors to tune an index with.

    Attributes:
        vectors: the vectors, float32 ``[n, dimension]``.
        name: source of the questions, for the manifest.
    """

    vectors: np.ndarray
    name: str


def building_directory(directory: str | Path) -> Path:
    """The directory with unfinished work for the index in ``directory``."""
    directory = Path(directory).resolve()
    return directory.with_name(f"{directory.name}.building")


def check_directory(directory: str | Path) -> None:
    """Raise an `InputError` if ``directory`` holds something that is not an index."""
    check_replaceable(Path(directory), lambda path: (path / MANIFEST).is_file(), "an index")


@contextmanager
def shards_directory(directory: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield the folder for the shards of an index: ``folder``, or by default a temporary folder.

    The temporary folder is deleted when the index is finished, or after an error before the first shard.
    """
    work = building_directory(directory)
    try:
        yield folder or work / SHARDS
    except InputError:
        if not any((work / SHARDS).glob("shard-*")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    except FileNotFoundError as error:
        if folder is None and not work.exists():
            raise InputError(
                f"{directory}: another process has built it meanwhile; rerun the same command to check it"
            ) from error
        raise


def already_built(
    directory: str | Path,
    passages: Path,
    encoder: Encoder,
    *,
    factory: str | None,
    memory: int | None,
    recall: float,
    queries: Path | None,
) -> bool:
    """Whether ``directory`` has an index of the same file of passages, built with the same arguments."""
    try:
        manifest = PassageIndex.load(directory).manifest
    except InputError:
        return False
    requested = _requested(factory, memory, recall, None if queries is None else str(queries.resolve()))
    expected = {"source": source_of(passages), "fingerprint": encoder.fingerprint, "asked": requested}
    return expected["source"] is not None and all(manifest[name] == value for name, value in expected.items())


def build_index(
    shards: Shards,
    directory: str | Path,
    *,
    factory: str | None = None,
    memory: int | None = None,
    recall: float = RECALL,
    queries: Queries | None = None,
    progress: bool = True,
) -> PassageIndex:
    """Build an index from complete shards, or resume an interrupted build.

    With the same number of threads, a resumed build yields the same bytes as an uninterrupted one, except for index
    types that FAISS builds with random numbers.

    Args:
        shards: the encoded passages; all shards must exist.
        directory: directory of the index; an existing index is replaced.
        factory: FAISS factory string; by default `choose_factory` chooses it.
        memory: memory limit of the process, in bytes. An index of a given type that does not fit is built in parts. By
            default the free memory for choosing a type, and no limit for a given type.
        recall: target recall@20 against exact search, to which an approximate index is tuned.
        queries: question vectors for tuning; by default perturbed passages.
        progress: whether to show progress bars.

    Returns:
        The opened index.

    Raises:
        InputError: shards are missing, another process writes ``directory``, FAISS cannot build the index, there are
            too few passages to train it, or memory or disk space is insufficient. Finished work is saved.
    """
    directory = Path(directory).resolve()
    check_directory(directory)
    if missing := shards.missing():
        raise InputError(
            f"{shards.directory}: {len(missing):,} of {len(shards):,} shards are missing; rerun `genpoe index encode`"
        )
    with only_writer(directory):
        build = _Build(shards, building_directory(directory), factory, memory, progress)
        build.prepare()
        with writing(build.work, RESUME_ADVICE):
            for number, name in enumerate(build.names):
                if not (build.finished / name).exists():
                    build.fill(number, build.finished / name)
            write_passages(shards, build.finished, progress=progress)
            search = tuned([build.finished / name for name in build.names], shards, recall, queries, progress=progress)
            build.write_manifest(search, _requested(factory, memory, recall, None if queries is None else queries.name))
        PassageIndex.load(build.finished)
        replace_directory(build.finished, directory)
        shutil.rmtree(build.work)
    return PassageIndex.load(directory)


def retune(
    index: PassageIndex, shards: Shards, recall: float, queries: Queries | None = None, *, progress: bool = True
) -> PassageIndex:
    """Tune an index again, for another recall or with other questions, and reopen it.

    Args:
        index: the index; its manifest is rewritten.
        shards: the shards that the index was built from.
        recall: target recall@20 against exact search.
        queries: question vectors for tuning; by default perturbed passages.
        progress: whether to show progress bars.

    Raises:
        InputError: the index was not built from these shards.
    """
    if shards.manifest["digest"] != index.manifest["digest"] or shards.encoder_fingerprint != index.encoder_fingerprint:
        raise InputError(
            f"{shards.directory}: these shards have other passages or another encoder ({shards.encoder_name}) than the"
            f" index in {index.directory}"
        )
    paths = [index.directory / name for name in index.manifest["vectors"]]
    search = tuned(paths, shards, recall, queries, progress=progress)
    with writing(index.directory / MANIFEST, "nothing is lost"):
        _write_json(index.directory / MANIFEST, {**index.manifest, "search": search})
    return PassageIndex.load(index.directory)


class _Build:
    """A build in progress, with its settings and files."""

    def __init__(self, shards: Shards, work: Path, factory: str | None, memory: int | None, progress: bool) -> None:
        self.shards, self.work, self.memory, self.progress = shards, work, memory, progress
        self.finished = work / INDEX
        self.identity = {name: value for name, value in shards.manifest.items() if name != "source"}
        self.choice = self._choose(factory)
        self.empty = make_index(self.choice.factory, shards.dimension)
        self.part_rows = _part_rows(self.empty, shards.count, memory)
        number = -(-shards.count // self.part_rows)
        self.names = [VECTORS] if number == 1 else [f"index-{part:05d}.faiss" for part in range(number)]
        self.training_rows = training_rows(self.empty, shards.count, memory)
        _check_training(self.choice.factory, centroids(self.empty), self.training_rows, shards.count)

    def _choose(self, factory: str | None) -> Choice:
        count, dimension = self.shards.count, self.shards.dimension
        if factory is None and self.memory is None:
            # The free memory varies, so a resumed build keeps its first choice.
            earlier = _read_json(self.work / BUILD)
            if not isinstance(earlier, dict) or earlier.get("shards") != self.identity:
                from genpoe_plugin.device_memory import available_memory  # here, because it imports torch

                return choose_factory(count, dimension, available_memory("cpu"))
            factory = str(earlier["factory"])
        if factory is None:
            return choose_factory(count, dimension, self.memory)
        return describe_factory(factory, count, dimension)

    def prepare(self) -> None:
        """Create the working directory; keep the files of an earlier build with the same settings, delete others."""
        settings = {
            "shards": self.identity,
            "factory": self.choice.factory,
            "part_rows": self.part_rows,
            "training_rows": self.training_rows,
            "faiss": faiss.__version__,
        }
        with writing(self.work, RESUME_ADVICE):
            self.finished.mkdir(parents=True, exist_ok=True)
            if _read_json(self.work / BUILD) != settings:
                for path in (self.work / TRAINED, self.work / FILLED):
                    path.unlink(missing_ok=True)
                shutil.rmtree(self.finished)
                self.finished.mkdir()
                _write_json(self.work / BUILD, settings)
            for temporary in (*self.work.glob(".*"), *self.finished.glob(".*")):  # of a killed process
                temporary.unlink()
        self._check_disk()
        if self.progress:
            in_parts = f"; in {len(self.names)} parts, because of the limit of {gigabytes(self.memory or 0)}"
            reason = f"{self.choice.reason}{in_parts if len(self.names) > 1 else ''}"
            tqdm.write(f"{self.choice.factory}: {reason}", sys.stderr)

    def _check_disk(self) -> None:
        passages = sum(self.shards.passages_file(number).stat().st_size for number in self.shards.numbers)
        needed = self.choice.bytes + passages + 16 * self.shards.count
        existing = sum(path.stat().st_size for path in self.finished.iterdir())
        if (free := shutil.disk_usage(self.work).free) < needed - existing:
            raise InputError(
                f"{self.work}: {gigabytes(needed - existing)} are needed on the disk, {gigabytes(free)} are free; "
                f"{RESUME_ADVICE}"
            )

    def trained(self) -> Any:
        """The trained, empty index, from its file if it exists."""
        path = self.work / TRAINED
        if not path.exists():
            rows = self.training_rows
            if not self.empty.is_trained:
                with tqdm(
                    desc=f"training on {rows:,} passages", bar_format="{desc}: {elapsed}", disable=not self.progress
                ):
                    sample = gathered(self.shards, sampled_rows(self.shards.count, rows, TRAINING_SEED))
                    train(self.choice.factory, self.empty, sample)
            _write(self.empty, path)
        return _read(path)

    def fill(self, number: int, path: Path) -> None:
        """Fill part ``number`` of the index and write it to ``path``."""
        start = number * self.part_rows
        stop = min(start + self.part_rows, self.shards.count)
        index = self.trained()
        try:
            # The refining vectors are a plain array, filled as fast as they are read, so only the base index is saved
            # in between. Writing both to one file at the end avoids a second copy in memory.
            if type(index) in (faiss.IndexRefine, faiss.IndexRefineFlat):
                base = self._add_saving(faiss.downcast_index(index.base_index), start, stop)
                refine = faiss.downcast_index(index.refine_index)
                self._add(refine, start, stop, "storing vectors")
                _write(faiss.IndexRefine(base, refine), path)
            else:
                _write(self._add_saving(index, start, stop), path)
        except RuntimeError as error:
            raise InputError(
                f"factory {self.choice.factory!r}: FAISS cannot fill the index ({faiss_reason(error)})"
            ) from error
        (self.work / FILLED).unlink(missing_ok=True)

    def _add_saving(self, index: Any, start: int, stop: int) -> Any:
        """Add the rows that are not in the saved index yet, and save in between.

        Graphs cannot be saved in between, because FAISS does not save the state of their random numbers.
        """
        path = self.work / FILLED
        resumable = faiss.try_extract_index_ivf(index) is not None
        if path.exists():
            index = _read(path)
        self._add(index, start + index.ntotal, stop, "filling the index", path if resumable else None)
        return index

    def _add(self, index: Any, start: int, stop: int, what: str, save_to: Path | None = None) -> None:
        if isinstance(index, faiss.IndexFlatCodes) and not isinstance(index, faiss.IndexFastScan):
            # Otherwise the array would grow by doubling, with a second copy in memory.
            index.codes.resize((stop - start) * index.code_size)
            index.codes.resize(0)
        saved = time.monotonic()
        done = self.shards.count if start >= stop else start
        with tqdm(desc=what, total=self.shards.count, initial=done, unit="passage", disable=not self.progress) as bar:
            for chunk in chunks(self.shards, start, stop, CHUNK):
                index.add(chunk)
                bar.update(len(chunk))
                if save_to is not None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    _write(index, save_to)
                    saved = time.monotonic()
        if save_to is not None and start < stop:
            _write(index, save_to)

    def write_manifest(self, search: dict[str, Any], requested: dict[str, Any]) -> None:
        """Write the manifest, which completes the index."""
        copied = ["encoder", "fingerprint", "pooling", "precision", "dimension", "count", "digest", "source"]
        if "encoder_options" in self.shards.manifest:  # not in shards from before there were options
            copied.append("encoder_options")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **{name: self.shards.manifest[name] for name in copied},
            "factory": self.choice.factory,
            "training_rows": self.training_rows,
            "vectors": self.names,
            "search": search,
            "asked": requested,
            "files": written_files(self.finished, [*self.names, PASSAGES]),
            "faiss": faiss.__version__,
        }
        _write_json(self.finished / MANIFEST, manifest)


def tuned(
    paths: Sequence[Path], shards: Shards, recall: float, queries: Queries | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Tune the index in some FAISS files; return the search settings for its manifest."""
    index = open_vectors(paths)
    if isinstance(parts(index)[0], faiss.IndexFlat):
        return {"parameters": {}, "recall": 1.0, "queries": "none, for the search is exact"}
    vectors = query_vectors(shards) if queries is None else queries.vectors
    tuning = tune(index, vectors, nearest(shards, vectors, progress=progress), recall, progress=progress)
    if tuning.recall < recall:
        _log.warning(
            "recall@%d of this index is at most %.3f, below the target %g; an index type with larger codes has more",
            tuning.at,
            tuning.recall,
            recall,
        )
    return {
        "parameters": tuning.parameters,
        "recall": round(tuning.recall, 4),
        "recall_at": tuning.at,
        "target": recall,
        "queries": f"{len(vectors):,} changed passages" if queries is None else queries.name,
    }


def _requested(factory: str | None, memory: int | None, recall: float, queries: str | None) -> dict[str, Any]:
    return {"factory": factory, "memory": memory, "recall": recall, "queries": queries}


def _part_rows(index: Any, count: int, memory: int | None) -> int:
    """The number of rows in each part of the index, so that a part fits into memory; all rows if they fit."""
    for number in range(1, MAX_PARTS + 1):
        rows = -(-count // number)
        if memory is None or filling_bytes(index, rows) <= memory:
            return rows
    least = filling_bytes(index, -(-count // MAX_PARTS))
    raise InputError(f"{gigabytes(memory or 0)} of memory: too little even in parts; give {gigabytes(least)} or more")


def _check_training(factory: str, needed: int, rows: int, count: int) -> None:
    available = f"{rows:,} passages to train on" + (" (all that memory allows)" if rows < count else "")
    advised = f"FAISS advises {POINTS_PER_CENTROID * needed:,}"
    if rows < needed:
        raise InputError(
            f"factory {factory!r}: {needed:,} centroids need more than {available}; {advised}; use fewer lists, or Flat"
        )
    if rows < POINTS_PER_CENTROID * needed:
        _log.warning(
            "factory %r: only %s for %d centroids; %s; recall may be lower", factory, available, needed, advised
        )


def _write(index: Any, path: Path) -> None:
    with writing(path, RESUME_ADVICE), atomic_file(path) as temporary, temporary.open("wb") as file:
        # Written through a Python file, because FAISS's own writer may not notice a full disk at the last bytes.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read(path: Path) -> Any:
    try:
        return read_faiss(path)
    except RuntimeError as error:
        raise InputError(f"{path}: damaged ({faiss_reason(error)}); delete it and rerun the same command") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None

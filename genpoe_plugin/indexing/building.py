"""Building an index from shards: trained on a sample, filled a chunk at a time, and resumed after any interruption.

All that is not finished is in a directory beside the index, ``NAME.building``:

- ``build.json``: what is being built;
- ``trained.faiss``: the index, trained and empty;
- ``filled.faiss``: what has been filled of it, where that takes long;
- ``index``: the files of the finished index, each complete, as far as they are there;
- ``shards``: the shards, where they are made for this index alone.
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
from genpoe_plugin.files import atomic_file, check_replaceable, file_digest, replace_directory, writing
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
from genpoe_plugin.retrieval.faiss_setup import faiss, faiss_reason, make_index, parts
from genpoe_plugin.retrieval.index import FORMAT, MANIFEST, VECTORS, VERSION, PassageIndex, open_vectors
from genpoe_plugin.retrieval.passage_store import IDS, PASSAGES

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.encoder import Encoder

BUILD, TRAINED, FILLED, INDEX, SHARDS = "build.json", "trained.faiss", "filled.faiss", "index", "shards"
TRAINING_SEED = 0
SECONDS_BETWEEN_SAVES = 600
MAX_PARTS = 1000
RECALL = 0.95
KEPT = "what is finished is kept, and the same command goes on"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queries:
    """Question vectors to tune an index by, float32 [n, dimension], and what they are, for people."""

    vectors: np.ndarray
    name: str


def building_directory(directory: str | Path) -> Path:
    """Where the unfinished parts of the index in ``directory`` are."""
    directory = Path(directory).resolve()
    return directory.with_name(f"{directory.name}.building")


def check_directory(directory: str | Path) -> None:
    """Raise an ``InputError`` where ``directory`` holds something that is not an index."""
    check_replaceable(Path(directory), lambda found: (found / MANIFEST).is_file(), "an index")


@contextmanager
def shards_directory(directory: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Where to encode the shards for an index: ``folder``, or, if it is None, a folder that goes when the index is
    there. An error before the first shard leaves nothing behind there."""
    work = building_directory(directory)
    try:
        yield folder or work / SHARDS
    except InputError:
        if not any((work / SHARDS).glob("shard-*")):
            shutil.rmtree(work, ignore_errors=True)
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
    """Whether ``directory`` has an index of just this file of passages, built with just these arguments."""
    try:
        manifest = PassageIndex.load(directory).manifest
    except InputError:
        return False
    asked = _asked(factory, memory, recall, None if queries is None else str(queries.resolve()))
    known = {"source": source_of(passages), "fingerprint": encoder.fingerprint, "asked": asked}
    return known["source"] is not None and all(manifest[name] == value for name, value in known.items())


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
    """Build an index of all passages of complete shards, or go on where an earlier process was stopped.

    At a fixed number of threads, and for all index types but those that FAISS itself makes at random, an interrupted
    build ends in the same bytes as one that was not.

    Args:
        factory: FAISS factory string; chosen by `choose_factory` if it is not given.
        memory: bytes that the process may take. An index of a given type that does not fit is built in parts. If it is
            not given: what is free, to choose by; any, for a type that is given.
        recall: of exact search's results among the best 20, for which an approximate index is tuned.
        queries: to tune it by; without them, passages that are changed a little.

    Raises:
        InputError: shards are missing; FAISS cannot make the index, or has too few passages to train it; it takes
            more memory than there is; the disk is full. What is finished is kept.
    """
    directory = Path(directory).resolve()
    check_directory(directory)
    if missing := shards.missing():
        raise InputError(
            f"{shards.directory}: {len(missing):,} of {len(shards):,} shards are missing; `genpoe index encode` goes on"
        )
    build = _Build(shards, building_directory(directory), factory, memory, progress)
    build.begin()
    with writing(build.work, KEPT):
        for number, name in enumerate(build.names):
            if not (build.finished / name).exists():
                build.fill(number, build.finished / name)
        write_passages(shards, build.finished, progress=progress)
        search = tuned([build.finished / name for name in build.names], shards, recall, queries, progress=progress)
        asked = _asked(factory, memory, recall, None if queries is None else queries.name)
        build.describe(search, asked)
    PassageIndex.load(build.finished)
    replace_directory(build.finished, directory)
    shutil.rmtree(build.work)
    return PassageIndex.load(directory)


def retune(
    index: PassageIndex, shards: Shards, recall: float, queries: Queries | None = None, *, progress: bool = True
) -> PassageIndex:
    """Tune an index for another recall, or by other questions, and open it anew.

    Raises:
        InputError: the shards are not those that it was built from.
    """
    if shards.manifest["digest"] != index.manifest["digest"] or shards.encoder_fingerprint != index.encoder_fingerprint:
        raise InputError(
            f"{shards.directory}: shards of other passages or of another encoder ({shards.encoder_name}) than the index"
            f" in {index.directory}"
        )
    paths = [index.directory / name for name in index.manifest["vectors"]]
    search = tuned(paths, shards, recall, queries, progress=progress)
    with writing(index.directory / MANIFEST, "nothing is lost"):
        _write_json(index.directory / MANIFEST, {**index.manifest, "search": search})
    return PassageIndex.load(index.directory)


class _Build:
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
            # What is free differs from time to time, and a build that was begun goes on as it was begun.
            begun = _read_json(self.work / BUILD)
            if not isinstance(begun, dict) or begun.get("shards") != self.identity:
                from genpoe_plugin.device_memory import available_memory  # here, for it loads torch

                return choose_factory(count, dimension, available_memory("cpu"))
            factory = str(begun["factory"])
        if factory is None:
            return choose_factory(count, dimension, self.memory)
        return describe_factory(factory, count, dimension)

    def begin(self) -> None:
        """Make the directory, keep what an earlier process has made of the same, and delete what it made of other."""
        wanted = {
            "shards": self.identity,
            "factory": self.choice.factory,
            "part_rows": self.part_rows,
            "training_rows": self.training_rows,
            "faiss": faiss.__version__,
        }
        with writing(self.work, KEPT):
            self.finished.mkdir(parents=True, exist_ok=True)
            if _read_json(self.work / BUILD) != wanted:
                for path in (self.work / TRAINED, self.work / FILLED):
                    path.unlink(missing_ok=True)
                shutil.rmtree(self.finished)
                self.finished.mkdir()
                _write_json(self.work / BUILD, wanted)
            for left_over in (*self.work.glob(".*"), *self.finished.glob(".*")):  # by a process that was killed
                left_over.unlink()
        self._check_disk()
        if self.progress:
            in_parts = f"; in {len(self.names)} parts, to stay within {gigabytes(self.memory or 0)}"
            reason = f"{self.choice.reason}{in_parts if len(self.names) > 1 else ''}"
            tqdm.write(f"{self.choice.factory}: {reason}", sys.stderr)

    def _check_disk(self) -> None:
        passages = sum(self.shards.passages_file(number).stat().st_size for number in self.shards.numbers)
        needed = self.choice.bytes + passages + 16 * self.shards.count
        there = sum(path.stat().st_size for path in self.finished.iterdir())
        if (free := shutil.disk_usage(self.work).free) < needed - there:
            raise InputError(
                f"{self.work}: {gigabytes(needed - there)} are needed on the disk, {gigabytes(free)} are free; {KEPT}"
            )

    def trained(self) -> Any:
        """The trained, empty index, from the file where it is there."""
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
        """Write the part of the index that has the rows from ``number`` times ``part_rows`` on."""
        start = number * self.part_rows
        stop = min(start + self.part_rows, self.shards.count)
        index = self.trained()
        try:
            # What refines is a plain array, filled as fast as it is read. So only the rest is saved on the way, and in
            # one file of both nothing is in memory twice.
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
        """Add rows, those that are not in the saved index yet; graphs cannot be saved on the way, since FAISS does not
        write where their random numbers are."""
        path = self.work / FILLED
        resumable = faiss.try_extract_index_ivf(index) is not None
        if path.exists():
            index = _read(path)
        self._add(index, start + index.ntotal, stop, "filling the index", path if resumable else None)
        return index

    def _add(self, index: Any, start: int, stop: int, what: str, save_to: Path | None = None) -> None:
        if isinstance(index, faiss.IndexFlatCodes) and not isinstance(index, faiss.IndexFastScan):
            # Else the array would grow by doubling, and be there twice while it does.
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

    def describe(self, search: dict[str, Any], asked: dict[str, Any]) -> None:
        """Write the description of the index, which makes it one."""
        files = {}
        for name in [*self.names, PASSAGES, IDS]:
            path = self.finished / name
            files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        copied = ("encoder", "fingerprint", "pooling", "precision", "dimension", "count", "digest", "source")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **{name: self.shards.manifest[name] for name in copied},
            "factory": self.choice.factory,
            "training_rows": self.training_rows,
            "vectors": self.names,
            "search": search,
            "asked": asked,
            "files": files,
            "faiss": faiss.__version__,
        }
        _write_json(self.finished / MANIFEST, manifest)


def tuned(
    paths: Sequence[Path], shards: Shards, recall: float, queries: Queries | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """How the index in some FAISS files is to be searched, for its description."""
    index = open_vectors(paths)
    if isinstance(parts(index)[0], faiss.IndexFlat):
        return {"parameters": {}, "recall": 1.0, "queries": "none, for the search is exact"}
    vectors = query_vectors(shards) if queries is None else queries.vectors
    tuning = tune(index, vectors, nearest(shards, vectors, progress=progress), recall, progress=progress)
    if tuning.recall < recall:
        _log.warning(
            "recall@%d of this index is %.3f at most, not %g; a type that keeps more of the vectors finds more",
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


def _asked(factory: str | None, memory: int | None, recall: float, queries: str | None) -> dict[str, Any]:
    return {"factory": factory, "memory": memory, "recall": recall, "queries": queries}


def _part_rows(index: Any, count: int, memory: int | None) -> int:
    """The rows of a part of the index, so that it fits into memory; all, where they do."""
    for number in range(1, MAX_PARTS + 1):
        rows = -(-count // number)
        if memory is None or filling_bytes(index, rows) <= memory:
            return rows
    least = filling_bytes(index, -(-count // MAX_PARTS))
    raise InputError(f"{gigabytes(memory or 0)} of memory: too little even in parts; give {gigabytes(least)} or more")


def _check_training(factory: str, wanted: int, rows: int, count: int) -> None:
    why = f"{rows:,} passages to train on" + (", which is what memory allows" if rows < count else "")
    advised = f"{POINTS_PER_CENTROID * wanted:,} are what FAISS asks for"
    if rows < wanted:
        raise InputError(
            f"factory {factory!r}: {wanted:,} centroids take more than {why}; {advised}; take fewer lists, or Flat"
        )
    if rows < POINTS_PER_CENTROID * wanted:
        _log.warning("factory %r: %s for %d centroids, and %s; it may find less", factory, why, wanted, advised)


def _write(index: Any, path: Path) -> None:
    with writing(path, KEPT), atomic_file(path) as temporary, temporary.open("wb") as file:
        # Through Python's file, for FAISS's own writer does not notice when the last bytes find the disk full.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read(path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"{path}: damaged ({faiss_reason(error)}); delete it and run the same command again"
        ) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

"""Encode a corpus into shards, with one process or many on many machines; resumable after any interruption."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import get_cpu_distributed_information
from tqdm import tqdm

from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import writing
from genpoe_plugin.indexing.building import build_index, check_directory, shards_directory
from genpoe_plugin.indexing.claims import Claim, can_be_claimed, claim, owner
from genpoe_plugin.indexing.corpus import Corpus, check_corpus, source_of
from genpoe_plugin.indexing.shards import MANIFEST, RESUME_ADVICE, SHARD_SIZE, Shards
from genpoe_plugin.retrieval.encoder import Encoder
from genpoe_plugin.retrieval.faiss_setup import make_index
from genpoe_plugin.retrieval.index import PassageIndex

SLICE = 512  # passages between updates of the progress bar
PAUSE = 2  # seconds between checks for the shards of other processes


def encode_shards(
    passages: str | Path | Iterable[Passage],
    encoder: Encoder,
    directory: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    dtype: str = "float16",
    progress: bool = True,
) -> Shards:
    """Encode the missing shards of a folder, and return the folder when it is complete.

    Any number of processes may share the work if they see the same folder: the ranks of ``accelerate launch``, and
    others that are started separately at any time. The process that claims a shard encodes it (`claims` describes the
    requirements on the file system). A rank starts with the shards whose number modulo the number of ranks is its rank;
    then it takes other shards, including those claimed by processes on its machine that have ended. All processes
    return when the last shard exists.

    A shard's vectors do not depend on the other shards or on the process, so with the same number of threads and the
    same hardware, a resumed run yields the same bytes as an uninterrupted one.

    Args:
        passages: a file for `read_passages`, or an iterable that can be read again, such as a list. It is checked
            before the encoding, unless an earlier process has checked the same file (path, size, modification time).
        encoder: the encoder.
        directory: the folder.
        shard_size: passages per shard; one shard at a time is in memory.
        dtype: dtype of the vectors on disk, "float16" or "float32".
        progress: whether to show progress bars.

    Raises:
        InputError: the passages are malformed, or their file changes meanwhile; the folder has other settings or is
            damaged; the disk is full; or a vector is not finite. Finished shards are saved.
        KeyboardInterrupt: interrupted; the message says how many shards are saved.
    """
    # Read from the environment, also on GPUs: a process group would time out while it waits for slower ranks.
    process, source = get_cpu_distributed_information(), source_of(passages)
    progress = progress and process.local_rank == 0
    shards = _begin(passages, source, encoder, Path(directory).resolve(), shard_size, dtype, progress)
    try:
        with tqdm(
            desc="encoding passages",
            total=shards.count,
            initial=_encoded(shards),
            unit="passage",
            smoothing=0,  # a shard begins with its longest passages, so only the overall rate predicts the end
            disable=not progress,
        ) as bar:
            _Encoding(passages, source, encoder, shards, bar).run(process.rank, process.world_size)
    except KeyboardInterrupt as error:
        done = len(shards) - len(shards.missing())
        raise KeyboardInterrupt(
            f"stopped; {done:,} of {len(shards):,} shards are saved in {shards.directory}; rerun the same command to "
            "resume"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError("the device has too little memory; give a smaller batch size") from error
    _clean_up(shards.directory)
    return Shards.open(shards.directory)


def _begin(
    passages: str | Path | Iterable[Passage],
    source: dict[str, Any] | None,
    encoder: Encoder,
    directory: Path,
    shard_size: int,
    dtype: str,
    progress: bool,
) -> Shards:
    """Check the passages, unless the folder has recorded the same file, and create or open the folder."""
    corpus = None
    if (directory / MANIFEST).is_file():
        existing = Shards.open(directory)
        if source is not None and existing.manifest.get("source") == source:
            corpus = Corpus(existing.count, existing.manifest["digest"])
    if corpus is None:
        corpus = check_corpus(passages, progress=progress)
    return Shards.create(
        directory,
        encoder,
        count=corpus.count,
        digest=corpus.digest,
        shard_size=shard_size,
        dtype=dtype,
        source=source,
    )


class _Encoding:
    """The work of one process."""

    def __init__(
        self,
        passages: str | Path | Iterable[Passage],
        source: dict[str, Any] | None,
        encoder: Encoder,
        shards: Shards,
        bar: tqdm,
    ) -> None:
        self.passages, self.source = passages, source
        self.encoder, self.shards, self.bar = encoder, shards, bar

    def run(self, rank: int, ranks: int) -> None:
        """Encode this rank's share of the missing shards, then other missing shards, until all exist."""
        selected, waiting_for = {number for number in self.shards.missing() if number % ranks == rank}, None
        while True:
            if selected:
                self._encode(selected)
            self.bar.update(_encoded(self.shards) - self.bar.n)
            if not (missing := self.shards.missing()):
                return
            selected = {number for number in missing if can_be_claimed(self._claim_path(number))}
            if not selected:
                path = self._claim_path(missing[0])
                if waiting_for != missing[0] and not self.bar.disable:
                    self.bar.write(
                        f"{path.stem}: waiting for {owner(path)}; if that process has ended, delete {path}", sys.stderr
                    )
                waiting_for = missing[0]
                time.sleep(PAUSE)

    def _encode(self, selected: set[int]) -> None:
        """Read the passages once, and encode those of the selected shards that no other process has claimed."""
        rows = iter(read_passages(self.passages) if isinstance(self.passages, str | Path) else self.passages)
        for number in range(max(selected) + 1):
            claimed = self._claim(number) if number in selected else None
            if claimed is None:
                deque(islice(rows, self.shards.rows(number)), maxlen=0)
                continue
            try:
                block = list(islice(rows, self.shards.rows(number)))
                if number in self.shards.missing():  # otherwise another process was faster
                    self._encode_shard(number, block)
            finally:
                claimed.release()

    def _encode_shard(self, number: int, block: list[Passage]) -> None:
        vectors = np.empty((len(block), self.shards.dimension), np.float32)
        # Sorted by length over the whole shard, to reduce padding.
        order = sorted(range(len(block)), key=lambda row: len(block[row].title) + len(block[row].text), reverse=True)
        for start in range(0, len(order), SLICE):
            rows = order[start : start + SLICE]
            vectors[rows] = self.encoder.encode_passages([block[row] for row in rows])
            self.bar.update(len(rows))
        if len(block) != self.shards.rows(number) or source_of(self.passages) != self.source:
            raise InputError(f"{self.passages}: changed during the encoding; start over in another directory")
        self.shards.write(number, block, vectors)
        self.bar.update(_encoded(self.shards) - self.bar.n)  # includes the shards of other processes

    def _claim(self, number: int) -> Claim | None:
        path = self._claim_path(number)
        with writing(path, RESUME_ADVICE):
            return claim(path)

    def _claim_path(self, number: int) -> Path:
        return self.shards.path(number, ".claim")


def _encoded(shards: Shards) -> int:
    """The number of passages in existing shards."""
    return shards.count - sum(map(shards.rows, shards.missing()))


def _clean_up(directory: Path) -> None:
    """Delete files of killed processes from a complete folder."""
    for path in directory.glob("shard-*.claim"):
        if (claimed := claim(path)) is not None:
            claimed.release()
    for path in directory.glob(".shard*"):
        path.unlink(missing_ok=True)


def index_passages(
    passages: Sequence[Passage],
    encoder: Encoder,
    directory: str | Path,
    *,
    factory: str = "Flat",
    progress: bool = True,
) -> PassageIndex:
    """Encode passages and build an index, like ``genpoe index build``; an existing index is replaced.

    Args:
        passages: the passages.
        encoder: the encoder.
        directory: directory of the index.
        factory: FAISS factory string.
        progress: whether to show progress bars.

    Raises:
        InputError: there are no passages, two have the same id, FAISS cannot build the index, or ``directory`` holds
            something that is not an index.
    """
    check_directory(directory)
    make_index(factory, encoder.dimension)
    with shards_directory(directory) as folder:
        shards = encode_shards(passages, encoder, folder, dtype="float32", progress=progress)
    return build_index(shards, directory, factory=factory, progress=progress)

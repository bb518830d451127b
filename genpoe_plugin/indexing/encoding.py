"""Encoding a corpus into shards: by one process or by many on many machines, and resumed after any interruption."""

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
from genpoe_plugin.indexing.shards import KEPT, MANIFEST, SHARD_SIZE, Shards
from genpoe_plugin.retrieval.encoder import Encoder
from genpoe_plugin.retrieval.faiss_setup import make_index
from genpoe_plugin.retrieval.index import PassageIndex

SLICE = 512  # passages encoded between two steps of the progress bar
PAUSE = 2  # seconds between two looks at what other processes have done


def encode_shards(
    passages: str | Path | Iterable[Passage],
    encoder: Encoder,
    directory: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    dtype: str = "float16",
    progress: bool = True,
) -> Shards:
    """Encode all passages into a folder of shards, those that it has not yet, and return it when it is complete.

    Any number of processes may do this at once, in one folder that all see: the ranks of ``accelerate launch``, and
    others started by hand, now or later. Every shard is encoded by the one that claims it (see `claims`, also for what
    that needs of the file system). A rank begins with the shards whose number, divided by the number of ranks, leaves
    its own; then it takes what is left over, also what an ended process on its machine had claimed. All return when
    the last shard is there.

    A shard's vectors do not depend on the other shards nor on who encodes it, so at a fixed number of threads, on the
    same hardware, an interrupted run ends in the same bytes as one that was not.

    Args:
        passages: a file of `read_passages`, or an iterable that can be read again, such as a list. It is read through
            before the encoding begins, so that what is wrong with it shows at once; not again if the folder was begun
            with the same file, by path, size and time of its last change.
        shard_size: passages a shard; one shard of them is in memory.
        dtype: of the vectors on disk, "float16" or "float32".

    Raises:
        InputError: the passages are malformed, or their file changes meanwhile; the folder was begun otherwise, or is
            damaged; the disk is full; the encoder makes vectors that are not finite. What has been encoded is kept.
    """
    # Read from the environment, on GPUs too: no process group, which would give up on the slower ranks after a while.
    place, source = get_cpu_distributed_information(), source_of(passages)
    progress = progress and place.local_rank == 0
    shards = _begin(passages, source, encoder, Path(directory).resolve(), shard_size, dtype, progress)
    try:
        with tqdm(
            desc="encoding passages",
            total=shards.count,
            initial=_encoded(shards),
            unit="passage",
            smoothing=0,  # a shard begins with its longest passages, so only the rate over all says what is left
            disable=not progress,
        ) as bar:
            _Encoding(passages, source, encoder, shards, bar).run(place.rank, place.world_size)
    except KeyboardInterrupt as error:
        done = len(shards) - len(shards.missing())
        raise KeyboardInterrupt(
            f"stopped; {done:,} of {len(shards):,} shards are in {shards.directory}, and the same command goes on"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError("the device has too little memory for batches of this size; give a smaller one") from error
    _tidy(shards.directory)
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
    """Look through the passages, unless they are known, and begin the folder, unless it was."""
    corpus = None
    if (directory / MANIFEST).is_file():
        begun = Shards.open(directory)
        if source is not None and begun.manifest.get("source") == source:
            corpus = Corpus(begun.count, begun.manifest["digest"])
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
    """What one of the processes does."""

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
        """Encode this rank's share of what is missing, then whatever is left, until nothing is."""
        wanted, waiting_for = {number for number in self.shards.missing() if number % ranks == rank}, None
        while True:
            if wanted:
                self._encode(wanted)
            self.bar.update(_encoded(self.shards) - self.bar.n)
            if not (missing := self.shards.missing()):
                return
            wanted = {number for number in missing if can_be_claimed(self._claim_path(number))}
            if not wanted:
                path = self._claim_path(missing[0])
                if waiting_for != missing[0] and not self.bar.disable:
                    self.bar.write(
                        f"{path.stem}: {owner(path)} encodes it; if that has ended, delete {path}", sys.stderr
                    )
                waiting_for = missing[0]
                time.sleep(PAUSE)

    def _encode(self, wanted: set[int]) -> None:
        """Go through the passages, and encode those shards of ``wanted`` that nobody else has."""
        rows = iter(read_passages(self.passages) if isinstance(self.passages, str | Path) else self.passages)
        for number in range(max(wanted) + 1):
            claimed = self._claim(number) if number in wanted else None
            if claimed is None:
                deque(islice(rows, self.shards.rows(number)), maxlen=0)
                continue
            try:
                block = list(islice(rows, self.shards.rows(number)))
                if number in self.shards.missing():  # else another process was faster
                    self._encode_shard(number, block)
            finally:
                claimed.release()

    def _encode_shard(self, number: int, block: list[Passage]) -> None:
        vectors = np.empty((len(block), self.shards.dimension), np.float32)
        # Sorted over the whole shard, so that little is padding.
        order = sorted(range(len(block)), key=lambda row: len(block[row].title) + len(block[row].text), reverse=True)
        for start in range(0, len(order), SLICE):
            rows = order[start : start + SLICE]
            vectors[rows] = self.encoder.encode_passages([block[row] for row in rows])
            self.bar.update(len(rows))
        if len(block) != self.shards.rows(number) or source_of(self.passages) != self.source:
            raise InputError(f"{self.passages}: changed while it was encoded; begin anew in another directory")
        self.shards.write(number, block, vectors)
        self.bar.update(_encoded(self.shards) - self.bar.n)  # what others have done meanwhile

    def _claim(self, number: int) -> Claim | None:
        path = self._claim_path(number)
        with writing(path, KEPT):
            return claim(path)

    def _claim_path(self, number: int) -> Path:
        return self.shards.path(number, ".claim")


def _encoded(shards: Shards) -> int:
    """How many passages are in the shards that are there."""
    return shards.count - sum(map(shards.rows, shards.missing()))


def _tidy(directory: Path) -> None:
    """Remove what killed processes have left in a complete folder."""
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
    """Encode passages and build an index of them, as ``genpoe index build`` does it in steps.

    Raises:
        InputError: there are no passages, an id comes twice, FAISS cannot make the index, or ``directory`` holds
            something that is not an index. An index that is there already is replaced.
    """
    check_directory(directory)
    make_index(factory, encoder.dimension)
    with shards_directory(directory) as folder:
        shards = encode_shards(passages, encoder, folder, dtype="float32", progress=progress)
    return build_index(shards, directory, factory=factory, progress=progress)

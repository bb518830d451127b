"""A folder of shards: the passages of a corpus and their vectors, encoded once, for any index to be built from.

- ``shards.json``: what all shards share: the encoder, the numbers' type, how many passages, and a digest of them;
- ``shard-00000.npy``: the vectors of the first ``shard_size`` passages, [rows, dimension], and so on;
- ``shard-00000.arrow``: the same passages, in the same order, an Arrow file in record batches of `BLOCK`;
- ``shard-00000.json``: rows, sizes and sha256 of both. It is written last: without it, there is no shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, check_replaceable, file_digest, refuse_pickles, writing
from genpoe_plugin.retrieval.passage_store import BLOCK, SCHEMA

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.encoder import Encoder

FORMAT, VERSION = "genpoe-shards", 1
MANIFEST = "shards.json"
SHARD_SIZE = 2**16
DTYPES = ("float16", "float32")
FIELDS = {
    "encoder": str,
    "fingerprint": str,
    "pooling": str,
    "precision": str,
    "dimension": int,
    "dtype": str,
    "shard_size": int,
    "count": int,
    "digest": str,
}
PARTS = (".npy", ".arrow")
KEPT = "the shards that are there are whole, and the same command goes on with the others"


class Shards:
    """A folder of shards, whole or on the way to be; shards count from 0, in the order of the passages."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest

    @classmethod
    def create(
        cls,
        directory: str | Path,
        encoder: Encoder,
        *,
        count: int,
        digest: str,
        shard_size: int = SHARD_SIZE,
        dtype: str = "float16",
        source: dict[str, Any] | None = None,
    ) -> Shards:
        """Begin a folder of shards, or open one that was begun in the same way, by this process or another.

        Args:
            count: of all passages.
            digest: stands for all passages, as that of `check_corpus`.
            dtype: of the numbers on disk, "float16" or "float32".
            source: of the passages, for people and for `encode_shards`; not compared.

        Raises:
            InputError: there is a folder of other shards, or something else; as `open`.
        """
        directory = Path(directory).resolve()
        if shard_size < 1 or dtype not in DTYPES or count < 1:
            raise InputError(
                f"{directory}: {count:,} passages in shards of {shard_size:,} in {dtype}; at least one passage is"
                f" needed, at least one a shard, and {' or '.join(DTYPES)}"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": encoder.name,
            "fingerprint": encoder.fingerprint,
            "pooling": encoder.pooling,
            "precision": encoder.precision,
            "dimension": encoder.dimension,
            "dtype": dtype,
            "shard_size": shard_size,
            "count": count,
            "digest": digest,
            "source": source,
        }
        refuse_pickles(directory)
        # A process that begins the same folder right now, or was killed at that, may have left a temporary file.
        check_replaceable(directory, lambda found: any(found.glob(f"*{MANIFEST}*")), "a folder of shards")
        if not (directory / MANIFEST).exists():
            with (
                writing(directory / MANIFEST, KEPT),
                suppress(FileExistsError),  # another process was faster
                _durable_file(directory / MANIFEST, replace=False) as file,
            ):
                file.write(_json(manifest))
        shards = cls.open(directory)
        if changes := _changes(shards.manifest, manifest):
            raise InputError(f"{directory}: begun with {'; '.join(changes)}; go on as begun, or give another directory")
        return shards

    @classmethod
    def open(cls, directory: str | Path) -> Shards:
        """Open a folder of shards; descriptions and file sizes are checked, which takes no time at any size.

        Raises:
            InputError: it is none, or a shard of it is damaged.
        """
        directory = Path(directory).resolve()
        refuse_pickles(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise InputError(f"{directory}: not a folder of shards (no {MANIFEST}); `genpoe index build` makes one")
        manifest = _read_json(path, "begin anew in another directory")
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{path}: not the description of shards of version {VERSION}; give another directory")
        if not all(isinstance(manifest.get(field), kind) for field, kind in FIELDS.items()):
            raise InputError(f"{path}: damaged (fields are missing); begin anew in another directory")
        shards = cls(directory, manifest)
        for number in shards.numbers:
            shards._check_size(number)
        return shards

    @property
    def count(self) -> int:
        """Of all passages, encoded or not yet."""
        return self.manifest["count"]

    @property
    def dimension(self) -> int:
        return self.manifest["dimension"]

    @property
    def dtype(self) -> np.dtype:
        """Of the vectors on disk, float16 or float32."""
        return np.dtype(self.manifest["dtype"])

    @property
    def encoder_name(self) -> str:
        return self.manifest["encoder"]

    @property
    def encoder_fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        """How many shards there are when all are encoded."""
        return -(-self.count // self.manifest["shard_size"])

    @property
    def numbers(self) -> range:
        return range(len(self))

    def rows(self, number: int) -> int:
        """How many passages a shard has: ``shard_size``, but for the last one."""
        return min(self.manifest["shard_size"], self.count - number * self.manifest["shard_size"])

    def vectors(self, number: int) -> np.memmap:
        """[rows, dimension] of ``dtype``, memory-mapped.

        Raises:
            InputError: the shard is missing or damaged.
        """
        path = self.path(number, ".npy")
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(path, "not whole vectors") from error
        if vectors.shape != (self.rows(number), self.dimension) or vectors.dtype != self.dtype:
            raise self._damaged(path, f"vectors of shape {vectors.shape} in {vectors.dtype}")
        return vectors

    def passages_file(self, number: int) -> Path:
        """Where the Arrow file of a shard's passages is."""
        return self.path(number, ".arrow")

    def path(self, number: int, suffix: str) -> Path:
        return self.directory / f"shard-{number:05d}{suffix}"

    def missing(self) -> list[int]:
        """The shards that are not there yet, as of now; a shard without one of its files is not there."""
        names = set(os.listdir(self.directory))
        return [n for n in self.numbers if not names.issuperset(self.path(n, s).name for s in (".json", *PARTS))]

    @property
    def is_complete(self) -> bool:
        return not self.missing()

    def write(self, number: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Write a shard: [rows, dimension] of any float type, and the passages in the same order.

        Raises:
            InputError: a vector is not finite in ``dtype``, or the files cannot be written; nothing is lost by that.
        """
        expected = (self.rows(number), self.dimension)
        if vectors.shape != expected or len(passages) != expected[0]:
            raise InputError(
                f"{self.path(number, '')}: {len(passages):,} passages and vectors of shape {vectors.shape} where"
                f" {expected} was announced"
            )
        with np.errstate(over="ignore"):  # what overflows is infinite, and that is looked for
            vectors = np.ascontiguousarray(vectors, self.dtype)
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            bad = passages[int(np.flatnonzero(~finite)[0])]
            advice = "store them in float32, or use another encoder" if self.dtype == "float16" else "use another one"
            raise InputError(
                f"{self.encoder_name}: the vector of passage {bad.id!r} is not finite in {self.dtype}; {advice}"
            )
        description = self.path(number, ".json")
        with writing(self.path(number, ""), KEPT):
            # A shard that lost a file and is made again must not be taken for whole in between.
            description.unlink(missing_ok=True)
            with _durable_file(self.path(number, ".npy")) as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(vectors))
                file.write(vectors.data)
            with _durable_file(self.passages_file(number)) as file, pa.ipc.new_file(file, SCHEMA) as writer:
                for start in range(0, len(passages), BLOCK):
                    block = passages[start : start + BLOCK]
                    columns = [pa.array([getattr(passage, field) for passage in block]) for field in SCHEMA.names]
                    writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            parts = [self.path(number, suffix) for suffix in PARTS]
            files = {part.name: {"bytes": part.stat().st_size, "sha256": file_digest(part)} for part in parts}
            with _durable_file(description) as file:
                file.write(_json({"rows": len(passages), "files": files}))

    def verify(self) -> None:
        """Read every byte of the shards that are there; an ``InputError`` names the first damaged file."""
        missing = set(self.missing())
        for number in self.numbers:
            if number not in missing:
                for name, file in self._check_size(number).items():
                    if file_digest(self.directory / name) != file["sha256"]:
                        raise self._damaged(self.directory / name, "sha256 differs")

    def _check_size(self, number: int) -> dict[str, Any]:
        """What is known of the files of a shard; nothing, if it is missing."""
        description, parts = self.path(number, ".json"), [self.path(number, suffix) for suffix in PARTS]
        if not all(path.is_file() for path in (description, *parts)):
            return {}
        found = _read_json(description, "delete it and run the same command again, which encodes this shard again")
        try:
            sizes = [found["files"][part.name]["bytes"] for part in parts]
            if found["rows"] != self.rows(number):
                raise self._damaged(description, f"{found['rows']} rows where {self.rows(number)} belong")
        except (KeyError, TypeError) as error:
            raise self._damaged(description, "fields are missing") from error
        for part, size in zip(parts, sizes, strict=True):
            if (actual := part.stat().st_size) != size:
                raise self._damaged(part, f"{actual:,} bytes where {size:,} were written")
        return found["files"]

    def _damaged(self, path: Path, reason: str) -> InputError:
        return InputError(
            f"{path}: damaged or missing ({reason}); delete it and run the same command again, which encodes this"
            " shard again"
        )


def _changes(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, for people."""
    described = {
        "fingerprint": lambda m: f"encoder {m['encoder']} ({m['fingerprint'][:12]})",
        "pooling": lambda m: f"pooling {m['pooling']}",
        "precision": lambda m: f"an encoder in {m['precision']}",
        "dimension": lambda m: f"{m['dimension']} dimensions",
        "dtype": lambda m: f"vectors in {m['dtype']}",
        "shard_size": lambda m: f"{m['shard_size']:,} passages a shard",
        "digest": lambda m: f"{m['count']:,} passages of digest {m['digest'][:12]}",
    }
    return [f"{say(begun)}, not {say(now)}" for field, say in described.items() if begun[field] != now[field]]


@contextmanager
def _durable_file(target: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """As `atomic_file`, open, and on the disk before it gets its name: a crash of the machine leaves no half shard."""
    with atomic_file(target, replace=replace) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged (not JSON); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (not a JSON object); {advice}")
    return value

"""A folder of shards: the passages of a corpus and their vectors, encoded once for any number of indexes.

- ``shards.json``, the manifest: the encoder, the vectors' dtype, the number of passages, and their digest;
- ``shard-00000.npy`` and so on: the vectors of the first ``shard_size`` passages, ``[rows, dimension]``;
- ``shard-00000.arrow``: the same passages in the same order, an Arrow file with record batches of `BLOCK` passages;
- ``shard-00000.json``: rows, sizes and SHA-256 of both files. It is written last, so a shard without it is incomplete.
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
from genpoe_plugin.json_text import read_json
from genpoe_plugin.retrieval.encoder_options import EncoderOptions, in_words, options_of
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
MOST = 100_000  # shards of a folder
PARTS = (".npy", ".arrow")
RESUME_ADVICE = "finished shards are saved; rerun the same command to resume"


class Shards:
    """A folder of shards, complete or not. Shards are numbered from 0, in the order of the passages.

    Args:
        directory: the folder.
        manifest: content of ``shards.json``.
    """

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
        """Create a folder of shards, or open one that this or another process has created with the same settings.

        Args:
            directory: the folder.
            encoder: encoder of the passages.
            count: number of passages.
            digest: digest of the passages, from `check_corpus`.
            shard_size: passages per shard.
            dtype: dtype of the vectors on disk, "float16" or "float32".
            source: source of the passages, for information and for `encode_shards`; it is not compared.

        Raises:
            InputError: a setting is out of range, the folder has shards with other settings or something else, or see
                `open`.
        """
        directory = Path(directory).resolve()
        if shard_size < 1 or dtype not in DTYPES or count < 1 or _number(count, shard_size) > MOST:
            raise InputError(
                f"{directory}: count is {count:,}, shard_size is {shard_size:,}, dtype is {dtype}; count and shard_size"
                f" must be at least 1, for at most {MOST:,} shards, and dtype {' or '.join(DTYPES)}"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": encoder.name,
            "encoder_options": encoder.options.manifest,
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
        # Another process that creates the same folder now, or was killed meanwhile, may have a temporary file there.
        check_replaceable(directory, lambda path: any(path.glob(f"*{MANIFEST}*")), "a folder of shards")
        if not (directory / MANIFEST).exists():
            with (
                writing(directory / MANIFEST, RESUME_ADVICE),
                suppress(FileExistsError),  # another process was faster
                _durable_file(directory / MANIFEST, replace=False) as file,
            ):
                file.write(_json(manifest))
        shards = cls.open(directory)
        if changes := _changes(shards.manifest, manifest):
            raise InputError(
                f"{directory}: created with {'; '.join(changes)}; use the earlier settings, or another directory"
            )
        return shards

    @classmethod
    def open(cls, directory: str | Path) -> Shards:
        """Open a folder of shards and check its descriptions and file sizes.

        Raises:
            InputError: it is not a folder of shards, or a shard is damaged.
        """
        directory = Path(directory).resolve()
        refuse_pickles(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{directory}: not a folder of shards (no {MANIFEST}); create one with `genpoe index encode`"
            )
        manifest = _read_json(path, "start over in another directory")
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{path}: not a manifest of shards of version {VERSION}; give another directory")
        if not all(type(manifest.get(field)) is kind for field, kind in FIELDS.items()):  # a bool is no number
            raise InputError(f"{path}: damaged (fields are missing); start over in another directory")
        count, size, dimension = (manifest[field] for field in ("count", "shard_size", "dimension"))
        if min(count, size, dimension) < 1 or _number(count, size) > MOST or manifest["dtype"] not in DTYPES:
            raise InputError(f"{path}: damaged (sizes out of range); start over in another directory")
        try:
            options_of(manifest)
        except TypeError as error:
            raise InputError(f"{path}: damaged (encoder_options); start over in another directory") from error
        shards = cls(directory, manifest)
        for number in shards.numbers:
            shards._check_size(number)
        return shards

    @property
    def count(self) -> int:
        """Number of passages, including those that are not encoded yet."""
        return self.manifest["count"]

    @property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        return self.manifest["dimension"]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the vectors on disk, float16 or float32."""
        return np.dtype(self.manifest["dtype"])

    @property
    def encoder_name(self) -> str:
        """Name or path of the encoder."""
        return self.manifest["encoder"]

    @property
    def encoder_fingerprint(self) -> str:
        """Fingerprint of the encoder."""
        return self.manifest["fingerprint"]

    @property
    def encoder_options(self) -> EncoderOptions:
        """Prompts and cut of the encoder."""
        return options_of(self.manifest)

    def __len__(self) -> int:
        """Number of shards of the complete folder."""
        return _number(self.count, self.manifest["shard_size"])

    @property
    def numbers(self) -> range:
        """Numbers of all shards."""
        return range(len(self))

    def rows(self, number: int) -> int:
        """Number of passages in a shard: ``shard_size``, except for the last shard."""
        return min(self.manifest["shard_size"], self.count - number * self.manifest["shard_size"])

    def vectors(self, number: int) -> np.memmap:
        """The vectors of a shard, ``[rows, dimension]`` in ``dtype``, memory-mapped.

        Raises:
            InputError: the shard is missing or damaged.
        """
        path = self.path(number, ".npy")
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses a header of Python's syntax, and raises nearly anything
            raise self._damaged(path, "incomplete vectors") from error
        if vectors.shape != (self.rows(number), self.dimension) or vectors.dtype != self.dtype:
            raise self._damaged(path, f"vectors of shape {vectors.shape} in {vectors.dtype}")
        return vectors

    def passages_file(self, number: int) -> Path:
        """Path of the Arrow file with a shard's passages."""
        return self.path(number, ".arrow")

    def path(self, number: int, suffix: str) -> Path:
        """Path of a shard's file with the given suffix."""
        return self.directory / f"shard-{number:05d}{suffix}"

    def missing(self) -> list[int]:
        """Numbers of the shards that are missing or incomplete at this moment."""
        names = set(os.listdir(self.directory))
        return [n for n in self.numbers if not names.issuperset(self.path(n, s).name for s in (".json", *PARTS))]

    def write(self, number: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Write a shard.

        Args:
            number: number of the shard.
            passages: its passages.
            vectors: their vectors in the same order, ``[rows, dimension]`` of any float dtype.

        Raises:
            InputError: the shapes are wrong, a vector is not finite in ``dtype``, or the files cannot be written. Other
                shards are not affected.
        """
        expected = (self.rows(number), self.dimension)
        if vectors.shape != expected or len(passages) != expected[0]:
            raise InputError(
                f"{self.path(number, '')}: {len(passages):,} passages and vectors of shape {vectors.shape}, expected"
                f" {expected}"
            )
        with np.errstate(over="ignore"):  # overflows become infinite and are detected below
            vectors = np.ascontiguousarray(vectors, self.dtype)
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            bad = passages[int(np.flatnonzero(~finite)[0])]
            advice = (
                "store vectors in float32, or use another encoder" if self.dtype == "float16" else "use another encoder"
            )
            raise InputError(
                f"{self.encoder_name}: the vector of passage {bad.id!r} is not finite in {self.dtype}; {advice}"
            )
        description = self.path(number, ".json")
        with writing(self.path(number, ""), RESUME_ADVICE):
            # While a damaged shard is written again, it must not count as complete.
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
        """Compare the SHA-256 of all existing shards with their descriptions.

        Raises:
            InputError: a file is damaged; the message names it.
        """
        missing = set(self.missing())
        for number in self.numbers:
            if number not in missing:
                for name, file in self._check_size(number).items():
                    if file_digest(self.directory / name) != file["sha256"]:
                        raise self._damaged(self.directory / name, "sha256 differs")

    def _check_size(self, number: int) -> dict[str, Any]:
        """The recorded sizes and hashes of a shard's files, after checking the sizes; empty if the shard is missing."""
        description, parts = self.path(number, ".json"), [self.path(number, suffix) for suffix in PARTS]
        if not all(path.is_file() for path in (description, *parts)):
            return {}
        record = _read_json(description, "delete it and rerun the same command to encode this shard again")
        try:
            sizes = [record["files"][part.name]["bytes"] for part in parts]
            if record["rows"] != self.rows(number):
                raise self._damaged(description, f"{record['rows']} rows instead of {self.rows(number)}")
        except (KeyError, TypeError) as error:
            raise self._damaged(description, "fields are missing") from error
        for part, size in zip(parts, sizes, strict=True):
            if (actual := part.stat().st_size) != size:
                raise self._damaged(part, f"{actual:,} bytes where {size!r} were written")
        return record["files"]

    def _damaged(self, path: Path, reason: str) -> InputError:
        return InputError(
            f"{path}: damaged or missing ({reason}); delete it and rerun the same command to encode this shard again"
        )


def _number(count: int, shard_size: int) -> int:
    """The number of shards of ``count`` passages."""
    return -(-count // shard_size)


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two manifests, as text."""
    described = {
        "fingerprint": lambda m: f"encoder {in_words(m['encoder'], m['fingerprint'], options_of(m))}",
        "pooling": lambda m: f"pooling {m['pooling']}",
        "precision": lambda m: f"an encoder in {m['precision']}",
        "dimension": lambda m: f"{m['dimension']} dimensions",
        "dtype": lambda m: f"vectors in {m['dtype']}",
        "shard_size": lambda m: f"{m['shard_size']:,} passages per shard",
        "digest": lambda m: f"{m['count']:,} passages of digest {m['digest'][:12]}",
    }
    return [f"{say(earlier)}, not {say(now)}" for field, say in described.items() if earlier[field] != now[field]]


@contextmanager
def _durable_file(target: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """As `atomic_file`, but opened, and synced to disk before it is renamed: a crash leaves no partial shard."""
    with atomic_file(target, replace=replace) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged (not JSON); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (not a JSON object); {advice}")
    return value

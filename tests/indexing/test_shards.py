from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.indexing.vectors import gathered
from genpoe_plugin.retrieval.passage_store import BLOCK

Corpus = Callable[[np.ndarray], tuple[list[Passage], object]]


@pytest.fixture
def numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2 * BLOCK + 30, 8)).astype(np.float32)


def make(corpus: Corpus, vectors: np.ndarray, directory: Path, **options: object) -> Shards:
    """Shards of given vectors, whole unless ``leave_out`` names some of them."""
    passages, encoder = corpus(vectors)
    size, left_out = options.setdefault("shard_size", BLOCK + 20), options.pop("leave_out", ())
    shards = Shards.create(directory, encoder, count=len(passages), digest="digest", **options)
    for number in set(shards.numbers) - set(left_out):
        rows = slice(number * size, (number + 1) * size)
        shards.write(number, passages[rows], vectors[rows])
    return shards


def stored_passages(shards: Shards, number: int) -> list[Passage]:
    with pa.OSFile(str(shards.passages_file(number))) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    return [Passage(**row) for row in rows]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_was_written(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, dtype: str
) -> None:
    make(fixed_corpus, numbers, tmp_path / "shards", dtype=dtype)
    shards = Shards.open(tmp_path / "shards")
    assert (len(shards), shards.count, shards.dimension, shards.dtype) == (2, len(numbers), 8, np.dtype(dtype))
    assert (shards.encoder_name, shards.encoder_fingerprint) == ("fixed", "fixed-fingerprint")
    assert shards.missing() == []
    assert [shards.rows(number) for number in shards.numbers] == [BLOCK + 20, BLOCK + 10]
    blocks = [shards.vectors(number) for number in shards.numbers]
    assert all(isinstance(block, np.memmap) and block.dtype == dtype for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), numbers.astype(dtype))
    assert stored_passages(shards, 0) + stored_passages(shards, 1) == fixed_corpus(numbers)[0]
    shards.verify()


def test_a_shard_counts_once_all_its_files_are_there(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    shards = make(fixed_corpus, numbers, tmp_path / "shards", leave_out=[0])
    assert shards.missing() == [0]
    with pytest.raises(InputError, match=r"shard-00000.npy: damaged or missing .*rerun the same command"):
        shards.vectors(0)
    for suffix in (".npy", ".arrow", ".json"):
        shards = make(fixed_corpus, numbers, tmp_path / suffix)
        shards.path(1, suffix).unlink()
        assert Shards.open(tmp_path / suffix).missing() == [1]


@pytest.mark.parametrize("suffix", [".npy", ".arrow", ".json"])
def test_a_truncated_file_is_noticed_on_open(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    path = make(fixed_corpus, numbers, tmp_path / "shards").path(1, suffix)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=f"shard-00001{suffix}: damaged .*delete it and rerun") as caught:
        Shards.open(tmp_path / "shards")
    assert "\n" not in str(caught.value)
    path.unlink()
    assert Shards.open(tmp_path / "shards").missing() == [1]


@pytest.mark.parametrize("suffix", [".npy", ".arrow"])
def test_a_changed_byte_is_noticed_by_verify(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    path = make(fixed_corpus, numbers, tmp_path / "shards", leave_out=[0]).path(1, suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shards = Shards.open(tmp_path / "shards")
    with pytest.raises(InputError, match=f"shard-00001{suffix}: damaged .*sha256"):
        shards.verify()


def test_a_header_that_says_otherwise_is_noticed(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    shards = make(fixed_corpus, numbers, tmp_path / "shards")
    content = shards.path(1, ".npy").read_bytes()
    shards.path(1, ".npy").write_bytes(content.replace(b"'<f2'", b"'<i2'"))
    with pytest.raises(InputError, match=r"shard-00001.npy: .*int16"):
        Shards.open(tmp_path / "shards").vectors(1)
    shards.path(0, ".npy").write_bytes(pickle.dumps(np.zeros(3)))
    with pytest.raises(InputError, match=r"shard-00000.npy: .*incomplete vectors"):
        shards.vectors(0)


def test_a_folder_goes_on_only_as_it_was_begun(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    shards = make(fixed_corpus, numbers, tmp_path / "shards")
    _, encoder = fixed_corpus(numbers)
    begun = {"count": shards.count, "digest": "digest", "shard_size": BLOCK + 20}
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    encoder.name = "the same, moved"
    assert not Shards.create(tmp_path / "shards", encoder, **begun, source={"path": "moved"}).missing()
    for change, message in [
        ({"digest": "another", "count": 7}, "1,054 passages of digest digest, not 7 passages of digest another"),
        ({"shard_size": 5}, "532 passages per shard, not 5 passages per shard"),
        ({"dtype": "float32"}, "vectors in float16, not vectors in float32"),
    ]:
        with pytest.raises(InputError, match=f"created with {message}; use the earlier"):
            Shards.create(tmp_path / "shards", encoder, **begun | change)
    encoder.fingerprint, encoder.precision = "another-fingerprint", "bfloat16"
    with pytest.raises(
        InputError,
        match=r"encoder fixed \(fixed-finger\), not encoder the same, moved \(another-fing\);"
        " an encoder in float32, not an encoder in bfloat16",
    ):
        Shards.create(tmp_path / "shards", encoder, **begun)
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"format": "other"}, "version 1"),
        ({"count": "7"}, "fields are missing"),
        ({"dimension": True}, "fields are missing"),
    ],
)
def test_another_description_is_refused(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, change: dict, message: str
) -> None:
    path = make(fixed_corpus, numbers, tmp_path / "shards").directory / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"shards.json: .*{message}"):
        Shards.open(tmp_path / "shards")
    for content in ("{", "[1]"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"shards.json: damaged"):
            Shards.open(tmp_path / "shards")


@pytest.mark.parametrize("dimension", [10**9, 10**30])
def test_a_dimension_of_no_shard_is_refused_before_memory_is_allocated(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, dimension: int
) -> None:
    path = make(fixed_corpus, numbers, tmp_path / "shards").directory / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dimension": dimension}))
    with pytest.raises(InputError, match=r"shard-00000.npy: damaged .*vectors of shape"):
        gathered(Shards.open(tmp_path / "shards"), np.arange(3))


def test_what_is_no_folder_of_shards(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    _, encoder = fixed_corpus(numbers)
    with pytest.raises(InputError, match="not a folder of shards"):
        Shards.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something that is not a folder of shards"):
        Shards.create(tmp_path, encoder, count=3, digest="d")
    for impossible in ({"count": 0}, {"shard_size": 0}, {"dtype": "int8"}):
        with pytest.raises(InputError, match="at least 1"):
            Shards.create(tmp_path / "new", encoder, **{"count": 3, "digest": "d"} | impossible)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_published_pickles_are_refused_and_not_opened(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = tmp_path / "dpr"
    folder.mkdir()
    (folder / "wikipedia_passages_0.pkl").write_bytes(pickle.dumps(Trap()))
    for work in [
        lambda: Shards.open(folder),
        lambda: Shards.create(folder, fixed_corpus(numbers)[1], count=3, digest="d"),
    ]:
        with pytest.raises(InputError, match=r"wikipedia_passages_0.pkl: .*pickles.*psgs_w100.*`genpoe index build`"):
            work()
    assert not (tmp_path / "sprung").exists()


def test_vectors_that_are_not_finite_are_not_stored(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    numbers[BLOCK + 21, 3] = 1e5
    with pytest.raises(InputError, match=f"fixed: the vector of passage 'p{BLOCK + 21}' is not finite in float16"):
        make(fixed_corpus, numbers, tmp_path / "half")
    assert Shards.open(tmp_path / "half").missing() == [1]
    make(fixed_corpus, numbers, tmp_path / "single", dtype="float32").verify()
    numbers[0, 0] = np.nan
    with pytest.raises(InputError, match="passage 'p0' is not finite in float32"):
        make(fixed_corpus, numbers, tmp_path / "nan", dtype="float32")


def test_what_was_not_announced_is_not_stored(fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path) -> None:
    shards = make(fixed_corpus, numbers, tmp_path / "shards", leave_out=[0, 1])
    passages = fixed_corpus(numbers)[0]
    for block, vectors in [(passages[:3], numbers[:3]), (passages[: BLOCK + 20], numbers[: BLOCK + 19])]:
        with pytest.raises(InputError, match="expected"):
            shards.write(0, block, vectors)
    assert shards.missing() == [0, 1]


@pytest.mark.parametrize("suffix", [".npy", ".arrow"])
def test_a_shard_made_again_is_not_whole_in_between(
    fixed_corpus: Corpus, numbers: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """It has lost a file, and the disk is full before the last file is made again."""
    shards = make(fixed_corpus, numbers, tmp_path / "shards")
    shards.path(0, suffix).unlink()
    calls = []

    def full_at_third(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_at_third)
    rows = slice(0, BLOCK + 20)
    with pytest.raises(InputError, match="No space left"):
        shards.write(0, fixed_corpus(numbers)[0][rows], numbers[rows])
    assert shards.missing() == [0]

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing import building
from genpoe_plugin.indexing.building import Queries, already_built, build_index, retune
from genpoe_plugin.indexing.encoding import encode_shards
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.faiss_setup import faiss
from genpoe_plugin.retrieval.index import VECTORS, PassageIndex
from genpoe_plugin.retrieval.manifest import MANIFEST

COUNT, DIMENSION = 700, 8
REFINED = "PCA8,IVF16,PQ4x4fs,Refine(SQ8)"


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIMENSION), np.float32)


@pytest.fixture(scope="module")
def shards(fixed_corpus: Callable[..., tuple], vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    passages, encoder = fixed_corpus(vectors)
    folder = tmp_path_factory.mktemp("building") / "shards"
    return encode_shards(passages, encoder, folder, shard_size=150, dtype="float32", progress=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they end within shards, and shards within them; and everything is saved on the way."""
    monkeypatch.setattr(building, "CHUNK", 200)
    monkeypatch.setattr(building, "SECONDS_BETWEEN_SAVES", -1)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def recall_at_20(index: PassageIndex, vectors: np.ndarray, queries: np.ndarray) -> float:
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :20]
    _, rows = index.search(queries, 20)
    return float(np.mean([len(set(a) & set(b)) / 20 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]))


def test_flat_has_every_vector_in_its_row(shards: Shards, vectors: np.ndarray, tmp_path: Path) -> None:
    index = build_index(shards, tmp_path / "index", progress=False)
    assert index.manifest["factory"] == "Flat" and index.manifest["search"]["recall"] == 1
    np.testing.assert_array_equal(index.vectors.reconstruct_n(0, COUNT), vectors)
    assert [index.passage(row).id for row in range(COUNT)] == [f"p{row}" for row in range(COUNT)]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert not shards.missing()


def test_only_a_chunk_is_in_memory(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = faiss.IndexIVFPQFastScan.add

    def add(self: object, chunk: np.ndarray) -> None:
        sizes.append(len(chunk))
        original(self, chunk)

    monkeypatch.setattr(faiss.IndexIVFPQFastScan, "add", add)
    build_index(shards, tmp_path / "index", factory="IVF16,PQ4x4fs,Refine(SQ8)", progress=False)
    assert sizes == [200, 200, 200, 100]


@pytest.mark.parametrize("recall", [0.5, 0.95])
def test_recall_is_what_was_asked_for(shards: Shards, vectors: np.ndarray, tmp_path: Path, recall: float) -> None:
    index = build_index(shards, tmp_path / "index", factory=REFINED, recall=recall, progress=False)
    search = index.manifest["search"]
    assert search["target"] == recall <= search["recall"] and search["recall_at"] == 20
    assert faiss.extract_index_ivf(index.vectors).nprobe == search["parameters"]["nprobe"]
    assert index.vectors.k_factor == search["parameters"]["k_factor_rf"]
    others = np.random.default_rng(9).standard_normal((300, DIMENSION), np.float32)
    assert recall_at_20(index, vectors, others) == pytest.approx(search["recall"], abs=0.1)


def test_tuning_anew(shards: Shards, vectors: np.ndarray, fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    queries = np.random.default_rng(1).standard_normal((100, DIMENSION), np.float32)
    index = build_index(
        shards, tmp_path / "index", factory=REFINED, recall=0.3, queries=Queries(queries, "q.tsv"), progress=False
    )
    assert index.manifest["search"]["queries"] == "q.tsv"
    assert recall_at_20(index, vectors, queries) >= 0.3
    tuned = retune(index, shards, 0.97, Queries(queries, "again.tsv"), progress=False)
    assert recall_at_20(tuned, vectors, queries) >= 0.97 > recall_at_20(index, vectors, queries)
    assert PassageIndex.load(tmp_path / "index").manifest["search"] == tuned.manifest["search"]
    assert tuned.fingerprint != index.fingerprint
    passages, encoder = fixed_corpus(2 * vectors[:30])
    others = encode_shards(passages, encoder, tmp_path / "others", progress=False)
    with pytest.raises(InputError, match=r"others: these shards have other passages .*fixed.* in .*index"):
        retune(index, others, 0.9, progress=False)


def test_a_recall_out_of_reach_is_said(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = build_index(shards, tmp_path / "index", factory="PQ2x4", recall=0.99, progress=False)
    reached = index.manifest["search"]["recall"]
    assert reached < 0.9 and f"recall@20 of this index is at most {reached:.3f}, below the target 0.99" in caplog.text


def in_child(work: Callable[[], object]) -> int:
    """How a forked process that does ``work`` ends."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("did not end")


@pytest.mark.parametrize("factory", ["IVF4,PQ4x4fs,Refine(SQ8)", "HNSW4"])
def test_killed_at_any_moment(
    fixed_corpus: Callable[..., tuple],
    vectors: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factory: str,
) -> None:
    """Before the first time that a file gets its name or goes, before the second, and so on."""
    monkeypatch.setattr(building, "CHUNK", 70)
    passages, encoder = fixed_corpus(vectors[:160])
    shards = encode_shards(passages, encoder, tmp_path / "shards", shard_size=100, progress=False)
    whole = content(build_index(shards, tmp_path / "whole", factory=factory, progress=False).directory)
    survived = 0
    while True:
        directory = tmp_path / f"killed-{survived}"

        def work(directory: Path = directory, survive: int = survived) -> None:
            left = [survive]

            def watch(event: str, arguments: tuple) -> None:
                changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
                if event in changes and str(directory) in str(arguments[0]):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            build_index(shards, directory, factory=factory, progress=False)

        ended = in_child(work)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        build_index(shards, directory, factory=factory, progress=False)
        assert content(directory) == whole, survived
        assert not directory.with_name(f"{directory.name}.building").exists()
        survived += 1
    assert survived > 20


def test_what_is_done_is_not_done_again(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while adding the third chunk, and then while the passages are stored."""
    original, added = faiss.IndexIVFFlat.add, []

    def add(self: object, chunk: np.ndarray) -> None:
        added.append(len(chunk))
        if len(added) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, chunk)

    def build() -> None:
        build_index(shards, tmp_path / "index", factory="IVF8,Flat", progress=False)

    monkeypatch.setattr(faiss.IndexIVFFlat, "add", add)
    assert in_child(build) == -signal.SIGKILL
    added[:] = [0] * 3
    monkeypatch.setattr(faiss.IndexIVFFlat, "train", lambda *arguments: pytest.fail("trained again"))
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_passages", lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL))

        def rest() -> None:
            monkeypatch.setattr(building, "_write", lambda index, path, w=building._write: (log(), w(index, path)))
            build()

        def log() -> None:
            (tmp_path / "added").write_text(str(sum(added)))

        assert in_child(rest) == -signal.SIGKILL
    assert (tmp_path / "added").read_text() == "300"
    monkeypatch.setattr(faiss.IndexIVFFlat, "add", lambda *arguments: pytest.fail("filled again"))
    build()
    assert len(PassageIndex.load(tmp_path / "index")) == COUNT


def test_another_build_begins_anew(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_passages", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(shards, tmp_path / "index", factory="SQ8", progress=False)
    assert (tmp_path / "index.building").is_dir() and not (tmp_path / "index").exists()
    index = build_index(shards, tmp_path / "index", factory="IVF8,Flat", progress=False)
    assert isinstance(index.vectors, faiss.IndexIVFFlat) and index.manifest["factory"] == "IVF8,Flat"


def test_a_choice_by_free_memory_is_kept(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would differ from time to time."""
    given: list[int | None] = []

    def choose(count: int, dimension: int, memory: int | None = None) -> object:
        given.append(memory)
        factory = "SQ8" if len(given) == 1 else "Flat"
        return SimpleNamespace(factory=factory, bytes=1, peak=1, reason="")

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "choose_factory", choose)
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_passages", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(shards, tmp_path / "index", progress=False)
    assert build_index(shards, tmp_path / "index", progress=False).manifest["factory"] == "SQ8"
    assert len(given) == 1 and given[0] is not None and given[0] > 10**8
    assert build_index(shards, tmp_path / "index", memory=10**10, progress=False).manifest["factory"] == "Flat"


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF8,PQ4x4fs,Refine(SQ8)"])
def test_what_does_not_fit_is_built_in_parts(
    shards: Shards, vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    monkeypatch.setattr(building, "filling_bytes", lambda index, rows: 10**9 + 10**6 * rows)
    index = build_index(
        shards, tmp_path / "index", factory=factory, memory=10**9 + 300 * 10**6, recall=0.99, progress=False
    )
    assert index.manifest["vectors"] == [f"index-{number:05d}.faiss" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "index").glob("*.faiss")) == index.manifest["vectors"]
    assert index.vectors.ntotal == len(index) == COUNT
    queries = np.random.default_rng(3).standard_normal((80, DIMENSION), np.float32)
    if factory == "Flat":
        _, rows = index.search(queries, 20)
        np.testing.assert_array_equal(rows, np.argsort(-(queries @ vectors.T), axis=1)[:, :20])
    else:
        assert index.manifest["search"]["recall"] >= 0.99
        assert recall_at_20(index, vectors, queries) > 0.95
    with pytest.raises(InputError, match=r"0.5 GB of memory: too little even in parts; give 1.\d GB or more"):
        build_index(shards, tmp_path / "other", factory=factory, memory=5 * 10**8, progress=False)


def test_what_takes_less_than_memory_is_one_file(shards: Shards, tmp_path: Path) -> None:
    index = build_index(shards, tmp_path / "index", memory=2 * 10**9, progress=False)
    assert index.manifest["vectors"] == [VECTORS]


def test_bad_builds_are_one_line(
    shards: Shards,
    vectors: np.ndarray,
    fixed_corpus: Callable[..., tuple],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(message: str, given: Shards = shards, **options: object) -> None:
        with pytest.raises(InputError, match=message) as caught:
            build_index(given, tmp_path / "index", progress=False, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "index").exists()

    refused("factory 'Flt': FAISS cannot create it", factory="Flt")
    refused(
        r"factory 'IVF1024,Flat': 1,024 centroids need more than 700 passages to train on; FAISS advises 39,936",
        factory="IVF1024,Flat",
    )
    refused("factory 'IDMap,Flat': FAISS cannot fill .*add_with_ids", factory="IDMap,Flat")
    refused(r"0.1 GB of memory: too little for 700 passages", memory=10**8)
    with monkeypatch.context() as patched:
        patched.setattr(building.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        refused(r"index.building: 0.0 GB are needed on the disk, 0.0 GB are free; finished work is saved")
    passages, encoder = fixed_corpus(vectors)
    part = Shards.create(tmp_path / "part", encoder, count=20, digest="d", shard_size=10)
    part.write(0, passages[:10], vectors[:10])
    refused(r"part: 1 of 2 shards are missing; rerun `genpoe index encode`", part)
    whole = encode_shards(passages[:20], encoder, tmp_path / "whole", shard_size=10, progress=False)
    path = whole.path(1, ".npy")
    path.write_bytes(path.read_bytes()[:-4])
    refused(r"shard-00001.npy: damaged or missing", whole)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis").write_text("precious")
    with pytest.raises(InputError, match="not an index; give another directory"):
        build_index(shards, tmp_path / "index", progress=False)


def test_few_passages_to_train_on_are_said(
    shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    build_index(shards, tmp_path / "index", factory="IVF32,PQ4x4", progress=False)
    assert "'IVF32,PQ4x4': only 700 passages to train on for 32 centroids; FAISS advises 1,248" in caplog.text
    assert "WARNING" not in capfd.readouterr().err  # of FAISS itself, many times


def test_damaged_unfinished_files_are_named(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(building, "chunks", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_index(shards, tmp_path / "index", factory="IVF8,Flat", progress=False)
    trained = tmp_path / "index.building" / "trained.faiss"
    trained.write_bytes(trained.read_bytes()[:50])
    with pytest.raises(InputError, match=r"trained.faiss: damaged .*delete it and rerun the same command"):
        build_index(shards, tmp_path / "index", factory="IVF8,Flat", progress=False)
    trained.unlink()
    assert len(build_index(shards, tmp_path / "index", factory="IVF8,Flat", progress=False)) == COUNT


def test_a_full_disk_loses_nothing(shards: Shards, tmp_path: Path) -> None:
    """The system refuses to write more than so many bytes to a file."""
    said = tmp_path / "said"
    whole = content(build_index(shards, tmp_path / "whole", factory=REFINED, progress=False).directory)

    def work(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            build_index(shards, tmp_path / "index", factory=REFINED, progress=False)
        except InputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(str(error))
            raise

    sizes = [100, 1000, len(whole[VECTORS]) - 1, len(whole["passages.arrow"]) - 1]
    for limit in sizes:
        assert in_child(lambda limit=limit: work(limit)) == 1
        assert re.fullmatch(r".*: cannot be written \(File too large\); .* saved; rerun .*", said.read_text())
        assert not (tmp_path / "index").exists()
    build_index(shards, tmp_path / "index", factory=REFINED, progress=False)
    assert content(tmp_path / "index") == whole


def test_already_built(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    passages, encoder = fixed_corpus(np.eye(4))
    file.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in passages))
    asked: dict = {"factory": None, "memory": None, "recall": 0.95}
    assert not already_built(tmp_path / "index", file, encoder, **asked, queries=None)
    build_index(encode_shards(file, encoder, tmp_path / "shards", progress=False), tmp_path / "index", progress=False)
    assert already_built(tmp_path / "index", file, encoder, **asked, queries=None)
    assert not already_built(tmp_path / "index", file, encoder, **{**asked, "factory": "SQ8"}, queries=None)
    assert not already_built(tmp_path / "index", file, encoder, **asked, queries=tmp_path / "questions")
    other = SimpleNamespace(fingerprint="other")
    assert not already_built(tmp_path / "index", file, other, **asked, queries=None)
    os.utime(file, (1, 1))
    assert not already_built(tmp_path / "index", file, encoder, **asked, queries=None)
    (tmp_path / "index" / MANIFEST).write_text("{}")
    assert not already_built(tmp_path / "index", file, encoder, **asked, queries=None)

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing import encoding
from genpoe_plugin.indexing.claims import claim
from genpoe_plugin.indexing.encoding import encode_shards
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.encoder import load_encoder
from genpoe_plugin.retrieval.encoder_options import EncoderOptions

PASSAGES = [Passage(f"id{n}", f"title {n}" if n % 3 else "", "word " * (1 + n * 7 % 5) + str(n)) for n in range(22)]
SIZE = 4  # 6 shards, the last of 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "passages.tsv"
    path.write_text("".join(f"{p.id}\t{p.text}\t{p.title}\n" for p in PASSAGES))
    return path


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PAUSE", 0.02)


class Numbering:
    """An encoder of whole numbers that belong to a passage; ``before`` sees every batch first."""

    name, fingerprint, precision, pooling, dimension = "numbering", "of-numbers", "float32", "none", 3
    options = EncoderOptions("", "")

    def __init__(self, before: Callable[[Sequence[Passage]], object] = lambda batch: None) -> None:
        self.before = before

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        self.before(passages)
        return expected(passages)


def expected(passages: Sequence[Passage]) -> np.ndarray:
    return np.array([[int(p.id[2:]), len(p.title), len(p.text)] for p in passages], np.float32).reshape(-1, 3)


def encode(source: object, directory: Path, encoder: object = None, **options: object) -> Shards:
    options = {"shard_size": SIZE, "progress": False} | options
    return encode_shards(source, encoder or Numbering(), directory, **options)


def content(directory: Path) -> dict[str, bytes]:
    """All files, but for the line of the manifest that says where the passages came from."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(files["shards.json"])
    del manifest["source"]
    return files | {"shards.json": json.dumps(manifest).encode()}


def begun(file: Path, tmp_path: Path) -> dict[str, object]:
    """How a folder over ``file`` is begun."""
    manifest = encode(file, tmp_path / "example").manifest
    return {field: manifest[field] for field in ("count", "digest", "shard_size", "source")}


def check_whole(directory: Path) -> None:
    """Every passage once, in order, beside its vector; and nothing else in the folder."""
    shards = Shards.open(directory)
    shards.verify()
    passages = []
    for number in shards.numbers:
        with pa.OSFile(str(shards.passages_file(number))) as file:
            block = [Passage(**row) for row in pa.ipc.open_file(file).read_all().to_pylist()]
        np.testing.assert_array_equal(shards.vectors(number), expected(block))
        passages += block
    assert passages == PASSAGES
    suffixes = (".npy", ".arrow", ".json")
    names = {f"shard-{number:05d}{suffix}" for number in range(6) for suffix in suffixes}
    assert {path.name for path in directory.iterdir()} == {"shards.json", *names}


def in_child(work: Callable[[], object]) -> int:
    """The process id of a forked process that does ``work`` and ends with status 0, or with 1 if it raises."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def exit_code(child: int) -> int:
    """Of a process that has some minutes to end by itself."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("did not end")


def kill_me(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("size", [1, 4, 21, 22, 100])
def test_every_passage_is_beside_its_vector(file: Path, tmp_path: Path, size: int) -> None:
    shards = encode(file, tmp_path / "shards", shard_size=size)
    assert [shards.rows(n) for n in shards.numbers] == [min(size, 22 - start) for start in range(0, 22, size)]
    vectors = np.concatenate([shards.vectors(number) for number in shards.numbers])
    np.testing.assert_array_equal(vectors, expected(PASSAGES))
    assert vectors.dtype == np.float16 and not shards.missing()
    if size == SIZE:
        check_whole(tmp_path / "shards")
        encode(PASSAGES, tmp_path / "list")
        assert content(tmp_path / "list") == content(tmp_path / "shards")


def test_batches_are_of_like_length(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SLICE", 5)
    lengths: list[list[int]] = []
    encoder = Numbering(lambda batch: lengths.append([len(p.title) + len(p.text) for p in batch]))
    encode(file, tmp_path / "shards", encoder, shard_size=22)
    assert list(map(len, lengths)) == [5, 5, 5, 5, 2]
    assert [n for batch in lengths for n in batch] == sorted(
        (len(p.title) + len(p.text) for p in PASSAGES), reverse=True
    )
    np.testing.assert_array_equal(Shards.open(tmp_path / "shards").vectors(0), expected(PASSAGES))


def test_killed_at_any_moment(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is killed before its first operation on the folder's files, another before its second, and so on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and of no effect on a killed process
    encode(file, tmp_path / "whole", shard_size=22)
    whole = content(tmp_path / "whole")
    survived = 0
    while True:
        directory = tmp_path / f"killed-{survived}"

        def work(directory: Path = directory, survive: int = survived) -> None:
            left = [survive]

            def watch(event: str, arguments: tuple) -> None:
                if event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.chmod") and (
                    str(arguments[0]).startswith(str(directory))
                ):
                    left[0] -= 1
                    if left[0] < 0:
                        kill_me()

            sys.addaudithook(watch)
            encode(file, directory, shard_size=22)

        ended = exit_code(in_child(work))
        encode(file, directory, shard_size=22)
        assert content(directory) == whole, survived
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        survived += 1
    assert survived > 20


def test_what_is_there_is_not_encoded_again(file: Path, tmp_path: Path) -> None:
    def stop_in_third(batch: Sequence[Passage]) -> None:
        if PASSAGES[2 * SIZE] in batch:
            kill_me()

    assert exit_code(in_child(lambda: encode(file, tmp_path / "shards", Numbering(stop_in_third)))) == -signal.SIGKILL
    encoded: list[Passage] = []
    encode(file, tmp_path / "shards", Numbering(encoded.extend))
    assert sorted(p.id for p in encoded) == sorted(p.id for p in PASSAGES[2 * SIZE :])
    check_whole(tmp_path / "shards")
    (tmp_path / "shards" / "shard-00001.npy").unlink()  # what the message about a damaged shard advises
    encoded.clear()
    encode(file, tmp_path / "shards", Numbering(encoded.extend))
    assert sorted(p.id for p in encoded) == sorted(p.id for p in PASSAGES[SIZE : 2 * SIZE])
    check_whole(tmp_path / "shards")


def test_an_encoder_gives_the_same_bytes_after_a_kill(dpr_pair: tuple[Path, Path], file: Path, tmp_path: Path) -> None:
    encoder = load_encoder(",".join(map(str, dpr_pair)), batch_size=3)
    encode(file, tmp_path / "whole", encoder)
    calls = []
    encode_passages = encoder.encode_passages

    def killed_at_third_call(passages: Sequence[Passage]) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            kill_me()
        return encode_passages(passages)

    def work() -> None:
        encoder.encode_passages = killed_at_third_call
        encode(file, tmp_path / "shards", encoder)

    assert exit_code(in_child(work)) == -signal.SIGKILL
    assert len(Shards.open(tmp_path / "shards").missing()) == 4
    encode(file, tmp_path / "shards", encoder)
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    stored = np.concatenate([Shards.open(tmp_path / "whole").vectors(number) for number in range(6)])
    np.testing.assert_allclose(stored, encode_passages(PASSAGES), atol=5e-3)


def as_rank(rank: int) -> None:
    """Make this forked process one of two, as ``accelerate launch`` does it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def log_to(path: Path) -> Callable[[Sequence[Passage]], None]:
    """Notes who encodes what: a line of process id and passage for each."""

    def log(batch: Sequence[Passage]) -> None:
        with path.open("a") as file:
            file.write("".join(f"{os.getpid()} {passage.id}\n" for passage in batch))

    return log


def test_two_ranks_share_the_work(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    encode(file, tmp_path / "whole")
    log = tmp_path / "log"

    def work(rank: int) -> None:
        as_rank(rank)

        def before(batch: Sequence[Passage]) -> None:
            (tmp_path / f"began-{rank}").touch()
            wait_for(tmp_path / f"began-{1 - rank}")
            log_to(log)(batch)

        if rank == 0:  # so that what is not its share would not be left by the other
            wait_for(tmp_path / "began-1")
        encode(file, tmp_path / "shards", Numbering(before), progress=True)

    children = [in_child(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    check_whole(tmp_path / "shards")
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(identifier for _, identifier in lines) == sorted(p.id for p in PASSAGES)
    for rank, child in enumerate(children):  # each began with its own share
        first = next(identifier for process, identifier in lines if int(process) == child)
        assert PASSAGES.index(next(p for p in PASSAGES if p.id == first)) // SIZE == rank
    bars = capfd.readouterr().err.split("\n")  # a bar is redrawn within its line, more often on a slow machine
    assert sum("encoding passages: 100%" in bar for bar in bars) == 1


def test_the_other_rank_does_what_a_killed_one_had_claimed(
    dpr_pair: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(",".join(map(str, dpr_pair)), batch_size=3)
    encode(file, tmp_path / "whole", encoder)
    log, dead = tmp_path / "log", tmp_path / "dead"
    encode_passages = encoder.encode_passages

    def work(rank: int) -> None:
        as_rank(rank)

        def logged(passages: Sequence[Passage]) -> np.ndarray:
            if rank == 1:
                dead.touch()
                kill_me()
            wait_for(dead)
            log_to(log)(passages)
            return encode_passages(passages)

        encoder.encode_passages = logged
        encode(file, tmp_path / "shards", encoder)

    children = [in_child(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [exit_code(child) for child in children] == [0, -signal.SIGKILL]
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(identifier for _, identifier in lines) == sorted(p.id for p in PASSAGES)
    assert {int(process) for process, _ in lines} == {children[0]}


def test_processes_started_by_hand_share_the_work(file: Path, tmp_path: Path) -> None:
    """Both are killed, one after its second shard, one in its first; a third does the rest."""
    encode(file, tmp_path / "whole")
    log = tmp_path / "log"
    counts = [0, 0]

    def work(which: int, limit: int) -> None:
        def before(batch: Sequence[Passage]) -> None:
            counts[which] += 1
            if counts[which] > limit:
                kill_me()
            log_to(log)(batch)

        encode(file, tmp_path / "shards", Numbering(before))

    children = [in_child(lambda which=which: work(which, limit=2 * (1 - which))) for which in range(2)]
    assert [exit_code(child) for child in children] == [-signal.SIGKILL] * 2
    assert len(Shards.open(tmp_path / "shards").missing()) == 4
    encode(file, tmp_path / "shards", Numbering(log_to(log)))
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(identifier for _, identifier in lines) == sorted(p.id for p in PASSAGES)


def test_a_claimed_shard_is_waited_for(file: Path, tmp_path: Path) -> None:
    shards = Shards.create(tmp_path / "shards", Numbering(), **begun(file, tmp_path))
    mine = claim(shards.path(2, ".claim"))
    assert mine is not None
    log = tmp_path / "log"
    child = in_child(lambda: encode(file, tmp_path / "shards", Numbering(log_to(log))))
    while shards.missing() != [2]:
        time.sleep(0.005)
    time.sleep(0.1)  # some more looks
    assert os.waitpid(child, os.WNOHANG)[0] == 0 and shards.missing() == [2]
    shards.write(2, PASSAGES[8:12], expected(PASSAGES[8:12]))
    mine.release()
    assert exit_code(child) == 0
    check_whole(tmp_path / "shards")
    assert not {p.id for p in PASSAGES[8:12]} & {line.split()[1] for line in log.read_text().splitlines()}


def test_who_is_waited_for_is_said(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards.create(tmp_path / "shards", Numbering(), **begun(file, tmp_path))
    path = shards.path(2, ".claim")
    path.write_text(json.dumps({"host": "far", "boot": "theirs", "pid": 7}))
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            path.unlink()

    monkeypatch.setattr(encoding.time, "sleep", sleep)
    encode(file, tmp_path / "shards", progress=True)
    check_whole(tmp_path / "shards")
    line = f"shard-00002: waiting for process 7 on far; if that process has ended, delete {path}"
    assert capfd.readouterr().err.count(line) == 1


def test_bad_passages_are_found_before_anything_is_encoded(file: Path, tmp_path: Path) -> None:
    def fail(batch: Sequence[Passage]) -> None:
        raise AssertionError("encoded")

    lines = file.read_text()
    for last, message in [
        ('x\t"broken\tT\n', "passages.tsv:23: broken quoting"),
        ("x\ta\0c\tT\n", "passages.tsv:23: NUL"),
        ("x\t \tT\n", "passages.tsv:23: passage 'x' has no text"),
        ("id3\tabc\tT\n", "passages.tsv:23: id 'id3' is also the id of .*passages.tsv:4;"),
    ]:
        file.write_text(lines + last)
        with pytest.raises(InputError, match=message):
            encode(file, tmp_path / "shards", Numbering(fail))
    file.write_bytes(b"\x80\x04\x95")
    with pytest.raises(InputError, match=r"passages.tsv: .*pickles.*`genpoe index build`"):
        encode(file, tmp_path / "shards", Numbering(fail))
    assert [path.name for path in tmp_path.iterdir()] == ["passages.tsv"]


def test_a_known_file_is_not_looked_through_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(file, tmp_path / "shards")
    looked: list[object] = []
    check_corpus = encoding.check_corpus
    monkeypatch.setattr(encoding, "check_corpus", lambda *a, **k: looked.append(a) or check_corpus(*a, **k))
    encode(file, tmp_path / "shards")
    assert not looked
    copy = tmp_path / "copy.tsv"
    copy.write_text(file.read_text())
    encode(copy, tmp_path / "shards")
    assert len(looked) == 1
    file.write_text(file.read_text().replace("word", "Word"))
    with pytest.raises(InputError, match=r"created with 22 passages of digest .*, not 22 passages of digest"):
        encode(file, tmp_path / "shards")


def test_a_file_that_changes_meanwhile_is_noticed(file: Path, tmp_path: Path) -> None:
    def change(batch: Sequence[Passage]) -> None:
        if PASSAGES[SIZE] in batch:
            file.write_text(file.read_text().replace("word", "Word"))

    with pytest.raises(InputError, match=r"passages.tsv: changed during the encoding"):
        encode(file, tmp_path / "shards", Numbering(change))
    assert Shards.open(tmp_path / "shards").missing() == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="changed"):
        encode(iter(PASSAGES), tmp_path / "once")  # cannot be read again


def test_interruption_says_how_to_go_on(file: Path, tmp_path: Path) -> None:
    def interrupt(batch: Sequence[Passage]) -> None:
        if PASSAGES[SIZE] in batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"1 of 6 shards are saved in .*rerun the same command to resume"):
        encode(file, tmp_path / "shards", Numbering(interrupt))
    assert not list((tmp_path / "shards").glob("*.claim"))
    encode(file, tmp_path / "shards")
    check_whole(tmp_path / "shards")


def test_too_little_memory_on_the_device_is_one_line(file: Path, tmp_path: Path) -> None:
    def exhaust(batch: Sequence[Passage]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(InputError, match="too little memory; give a smaller batch size"):
        encode(file, tmp_path / "shards", Numbering(exhaust))


def test_progress_is_of_the_whole_corpus(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def stop(batch: Sequence[Passage]) -> None:
        if PASSAGES[2 * SIZE] in batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(file, tmp_path / "shards", Numbering(stop))
    capfd.readouterr()
    encode(file, tmp_path / "shards", progress=True)
    bars = capfd.readouterr().err
    assert " 8/22 [" in bars and " 22/22 [" in bars and "passage/s" in bars


def test_a_file_that_cannot_grow_is_one_line(file: Path, tmp_path: Path) -> None:
    """The system refuses to write more than so many bytes to a file: the manifest, a claim, vectors, passages."""
    directory, said = tmp_path / "shards", tmp_path / "said"

    def work(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            encode(file, directory)
        except InputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(str(error))
            raise

    options = begun(file, tmp_path)
    for limit, name in [(10, "shards.json"), (60, "shard-00000.claim"), (140, "shard-00000"), (300, "shard-00000")]:
        assert exit_code(in_child(lambda limit=limit: work(limit))) == 1
        assert re.fullmatch(
            rf".*/{name}: cannot be written \(File too large\); .*rerun the same command.*", said.read_text()
        )
        assert not list(directory.glob(".*")) and (name.endswith(".claim") or not list(directory.glob("*.claim")))
        shards = Shards.create(directory, Numbering(), **options)
        assert len(shards.missing()) == 6
    assert shards.path(0, ".npy").exists()  # the last limit struck after it
    encode(file, directory)
    check_whole(directory)


@pytest.mark.parametrize("call", [8, 9, 10], ids=["vectors", "passages", "description"])
def test_a_full_disk_loses_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """It is full at a file of the third shard; before that come the manifest and three files a shard."""
    calls = []

    def full_at_last(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_at_last)
        with pytest.raises(InputError, match=r"shard-00002: cannot be written \(No space left on device\); "):
            encode(file, tmp_path / "shards")
    assert Shards.open(tmp_path / "shards").missing() == [2, 3, 4, 5]
    encode(file, tmp_path / "shards")
    check_whole(tmp_path / "shards")

"""Downloads from a server in this process that breaks off, changes its file, and more."""

from __future__ import annotations

import gzip
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genpoe_plugin.data import download as module
from genpoe_plugin.data.download import CHUNK, download
from genpoe_plugin.errors import InputError
from tests.http_files import HTTPFile, serve

BODY = random.Random(0).randbytes(5 * CHUNK + 123)
CUT = 3 * CHUNK + 7
# The first attempt is one response; each after it is two, of which only the second is read.
UNREAD = 10**9


@pytest.fixture
def file() -> Iterator[HTTPFile]:
    with serve(BODY) as file:
        yield file


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "data.tsv.gz"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0, 0))


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def break_off(file: HTTPFile, target: Path) -> int:
    """Download until the connection has broken for good; the number of bytes that are kept."""
    pauses = module.PAUSES
    module.PAUSES = ()
    file.cuts = [CUT]
    try:
        with pytest.raises(InputError, match="rerun the same command to resume"):
            download(file.url, target)
    finally:
        module.PAUSES = pauses
    [part] = names(target)
    assert part.startswith("data.tsv.gz.") and part.endswith(".part")
    kept = (target.parent / part).read_bytes()
    assert BODY.startswith(kept)
    file.asked.clear()
    return len(kept)


def test_a_whole_file(file: HTTPFile, target: Path) -> None:
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY
    assert names(target) == ["data.tsv.gz"]
    assert file.asked == [""]


@pytest.mark.parametrize("size", [0, 1, CHUNK])
def test_sizes(file: HTTPFile, target: Path, size: int) -> None:
    file.body = BODY[:size]
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY[:size]


def test_a_broken_connection_is_taken_up_where_it_broke(file: HTTPFile, target: Path) -> None:
    file.cuts = [CUT, UNREAD, CHUNK + 1]
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY
    ranges = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in file.asked if wanted]
    assert len(ranges) == 2
    assert 0 < ranges[0] <= CUT
    assert ranges[0] < ranges[1] <= ranges[0] + CHUNK + 1


def test_the_same_command_goes_on(file: HTTPFile, target: Path) -> None:
    kept = break_off(file, target)
    assert 0 < kept <= CUT
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY
    assert file.asked == ["", f"bytes={kept}-"]
    assert names(target) == ["data.tsv.gz"]


def test_what_is_kept_is_not_asked_for_again(file: HTTPFile, target: Path) -> None:
    """The kept bytes are taken as they are: changed here, they stay changed."""
    kept = break_off(file, target)
    part = target.parent / names(target)[0]
    part.write_bytes(b"x" * kept)
    download(file.url, target)
    assert target.read_bytes() == b"x" * kept + BODY[kept:]


def test_all_bytes_there_but_not_renamed(file: HTTPFile, target: Path) -> None:
    break_off(file, target)
    (target.parent / names(target)[0]).write_bytes(BODY)
    assert download(file.url, target) is True
    assert file.asked == [""]
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_sends_all_of_it_again(file: HTTPFile, target: Path) -> None:
    break_off(file, target)
    file.ranges = False
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY
    assert len(file.asked) == 2
    assert names(target) == ["data.tsv.gz"]


@pytest.mark.parametrize("change", ["etag", "modified", "size"])
def test_a_changed_file_is_started_over(file: HTTPFile, target: Path, change: str) -> None:
    break_off(file, target)
    file.body = BODY[::-1]
    if change == "size":
        file.body += b"more"
    else:
        setattr(file, change, '"two"')
    assert download(file.url, target) is True
    assert target.read_bytes() == file.body
    assert names(target) == ["data.tsv.gz"]


@pytest.mark.parametrize("etag", ['"one"', '"two"'])
def test_a_file_that_changes_between_two_requests_is_not_mixed(file: HTTPFile, target: Path, etag: str) -> None:
    break_off(file, target)
    file.later = (BODY[::-1] + b"more"[: 4 * (etag == '"one"')], etag)
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY


def test_an_answer_that_begins_elsewhere_is_not_used(file: HTTPFile, target: Path) -> None:
    break_off(file, target)
    file.early = 1
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY
    assert len(file.asked) == 2


def test_fewer_bytes_than_the_server_says_are_no_file(file: HTTPFile, target: Path) -> None:
    file.cuts = [len(BODY) - 1] + [UNREAD, 0] * 10
    with pytest.raises(InputError, match=r"/file: the .* of 327,803 bytes; rerun the same command to resume") as error:
        download(file.url, target)
    assert "\n" not in str(error.value)
    assert not target.exists()
    assert len(file.asked) == 1 + 2 * len(module.PAUSES)


def test_pauses_begin_anew_when_bytes_come(file: HTTPFile, target: Path) -> None:
    file.cuts = [2 * CHUNK, UNREAD, 0, UNREAD, 2 * CHUNK, UNREAD, 0]
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable")])
def test_a_refusal_is_one_line(file: HTTPFile, target: Path, status: int, reason: str) -> None:
    file.failures = [status]
    with pytest.raises(InputError) as error:
        download(file.url, target)
    assert str(error.value).startswith(f"{file.url}: the server says {status} {reason}")
    assert "\n" not in str(error.value)
    assert not target.parent.exists()


def test_a_server_that_fails_in_the_middle_is_asked_again(
    file: HTTPFile, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.cuts = [CUT]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        file.failures = [503] if len(waited) < 3 else []

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module, "PAUSES", (1, 4, 15))
    assert download(file.url, target) is True
    assert waited == [1, 4, 15]
    assert target.read_bytes() == BODY


def test_no_network(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
        with pytest.raises(InputError, match=r"127\.0\.0\.1:\d+ cannot be reached \(.*refused") as error:
            download(url, target)
    assert "\n" not in str(error.value)
    assert not target.parent.exists()


def test_a_server_that_does_not_say_the_size(file: HTTPFile, target: Path) -> None:
    file.says_size = False
    with pytest.raises(InputError, match="does not report the file's size"):
        download(file.url, target)
    assert not target.parent.exists()


def test_a_file_that_is_there(file: HTTPFile, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(BODY[::-1])
    assert download(file.url, target) is False
    assert target.read_bytes() == BODY[::-1]
    file.failures = [503]
    assert download(file.url, target) is False
    target.write_bytes(BODY[:-1])
    with pytest.raises(InputError, match=r"data\.tsv\.gz: has 327,802 bytes, the server's file has 327,803; delete it"):
        download(file.url, target)
    assert target.read_bytes() == BODY[:-1]


def test_a_compressed_file_stays_compressed(file: HTTPFile, target: Path) -> None:
    """Servers may say of a .gz file that it is text in the encoding gzip, which clients then like to undo."""
    file.body = gzip.compress(b"text")
    file.headers = {"Content-Encoding": "gzip", "Content-Type": "text/plain"}
    download(file.url, target)
    assert target.read_bytes() == file.body


def test_ctrl_c_keeps_what_is_there(file: HTTPFile, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(module.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if self.n > 2 * CHUNK:
                raise KeyboardInterrupt
            return super().update(n)

    with monkeypatch.context() as patch:
        patch.setattr(module, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            download(file.url, target, progress=True)
    [part] = names(target)
    kept = (target.parent / part).read_bytes()
    assert len(kept) >= 3 * CHUNK
    assert BODY.startswith(kept)
    assert download(file.url, target) is True
    assert file.asked[-1] == f"bytes={len(kept)}-"
    assert target.read_bytes() == BODY


def test_a_target_that_cannot_be_written(file: HTTPFile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data: cannot be written \(Not a directory|File exists\)"):
        download(file.url, tmp_path / "file" / "data")


def test_two_downloads_at_once(file: HTTPFile, target: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(download, file.url, target) for _ in range(4)]:
            done.result()
    assert target.read_bytes() == BODY


def test_another_download_that_is_done_before_the_bytes_come(
    file: HTTPFile, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = module._receive

    def receive_late(response: Any, part: Path, *rest: Any) -> None:
        target.write_bytes(BODY)
        part.unlink()
        receive(response, part, *rest)

    monkeypatch.setattr(module, "_receive", receive_late)
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY


def test_another_download_that_is_done_first(file: HTTPFile, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = module._receive

    def receive_twice(response: Any, part: Path, *rest: Any) -> None:
        receive(response, part, *rest)
        part.replace(target)

    monkeypatch.setattr(module, "_receive", receive_twice)
    assert download(file.url, target) is True
    assert target.read_bytes() == BODY


def test_the_progress_bar_counts_bytes_from_where_it_goes_on(
    file: HTTPFile, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_off(file, target)
    assert "data.tsv.gz" not in capsys.readouterr().err
    download(file.url, target, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("data.tsv.gz: 100%")
    assert "328k/328k" in last

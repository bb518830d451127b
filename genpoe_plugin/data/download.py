"""Download files over HTTP: resumable, checked by size, and written atomically."""

from __future__ import annotations

import glob
import re
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from genpoe_plugin.errors import InputError

CHUNK = 1 << 16  # bytes
TIMEOUT = 30  # seconds without received data
PAUSES = (1, 4, 15)  # seconds before each new attempt; they start again after received data


def download(url: str, target: str | Path, *, progress: bool = False) -> bool:
    """Download ``url`` to ``target``, unchanged.

    The data is collected in ``NAME.ID.part`` beside ``target``. This file is renamed once it has the size that the
    server reports. The id is a hash of size, ETag and modification date: an earlier partial download is resumed if the
    server's file is the same, and deleted if it has changed. A broken connection is retried a few times; a failed first
    connection is not.

    Args:
        url: the URL.
        target: the file to write.
        progress: whether to show a progress bar.

    Returns:
        True if the file was downloaded; False if ``target`` existed. Its size is then compared with the server's, if
        the server is reachable.

    Raises:
        InputError: the server is unreachable, has no such file, or does not report its size; the connection keeps
            breaking; ``target`` has another size, or cannot be written. Downloaded data is kept for a later call.
    """
    target = Path(target)
    pauses: list[float] = []
    with requests.Session() as session:
        if target.exists():
            _check(session, url, target)
            return False
        while True:
            try:
                _attempt(session, url, target, progress)
                return True
            except _BrokenError as broken:
                if broken.received:
                    pauses = list(PAUSES)
                if not pauses:
                    raise InputError(f"{url}: {broken}; rerun the same command to resume") from broken
                time.sleep(pauses.pop(0))
            except OSError as error:
                raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


class _BrokenError(Exception):
    """The connection failed, or broke after ``received`` bytes; another attempt may succeed."""

    def __init__(self, reason: str, received: int = 0) -> None:
        super().__init__(reason)
        self.received = received


@dataclass(frozen=True)
class _Version:
    """The version of a file on the server: its size, ETag and modification date."""

    size: int
    etag: str
    modified: str

    @classmethod
    def of(cls, response: requests.Response, first: int = 0) -> _Version | None:
        """The version in a response; None if the response does not begin at byte ``first``.

        The size is -1 if the response does not report it.
        """
        headers = response.headers
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            begin, size = (int(match[1]), int(match[2])) if match else (-1, -1)
        else:
            begin, size = 0, int(headers.get("Content-Length", -1))
        return cls(size, headers.get("ETag", ""), headers.get("Last-Modified", "")) if begin == first else None

    def part(self, target: Path) -> Path:
        """The partial file for this version of ``target``."""
        identifier = blake2b(repr(self).encode(), digest_size=4).hexdigest()
        return target.with_name(f"{target.name}.{identifier}.part")


def _attempt(session: requests.Session, url: str, target: Path, progress: bool) -> None:
    response = _get(session, url)
    version = _Version.of(response)
    if version is None or version.size < 0:
        raise InputError(f"{url}: the server does not report the file's size, so a download cannot be checked")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = version.part(target)
    try:
        _collect(session, url, response, version, part, target, progress)
        part.replace(target)
    except FileNotFoundError:
        if not target.exists():  # otherwise another process has finished the same download
            raise


def _collect(
    session: requests.Session,
    url: str,
    response: requests.Response,
    version: _Version,
    part: Path,
    target: Path,
    progress: bool,
) -> None:
    """Complete ``part``; existing bytes are reused if the server supports range requests."""
    for other in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        if other != part or other.stat().st_size > version.size:
            other.unlink()
    part.touch()
    begin = part.stat().st_size
    if 0 < begin < version.size:
        rest = _get(session, url, begin)
        if rest.status_code == 206 and _Version.of(rest, begin) == version:
            response.close()
            response = rest
        else:
            rest.close()
            begin = 0
    with response:
        if begin < version.size:
            _receive(response, part, begin, version.size, target.name if progress else None)


def _receive(response: requests.Response, part: Path, begin: int, size: int, title: str | None) -> None:
    """Write the body of a response into ``part`` from byte ``begin`` on.

    Nothing is appended or truncated, so two simultaneous downloads of one file write the same bytes to the same places.

    Args:
        response: the response.
        part: the partial file.
        begin: first byte of the response.
        size: size of the whole file.
        title: title of the progress bar; None shows none.
    """
    done = begin
    bar = tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=title, disable=title is None)
    with bar, part.open("r+b") as file:
        file.seek(begin)
        try:
            # Read raw data, so that a compressed file is not decompressed.
            while chunk := response.raw.read(CHUNK, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
        except HTTPError as error:
            raise _BrokenError(f"the connection broke after {done:,} of {size:,} bytes", done - begin) from error
    if done != size:
        raise _BrokenError(f"the server sent {done:,} of {size:,} bytes", done - begin)


def _check(session: requests.Session, url: str, target: Path) -> None:
    """Compare the size of an existing file with the server's, if the server reports it."""
    try:
        with _get(session, url) as response:
            version = _Version.of(response)
    except (_BrokenError, InputError):
        return  # the file was complete when it was renamed
    size = target.stat().st_size
    if version is not None and version.size not in (-1, size):
        raise InputError(
            f"{target}: has {size:,} bytes, the server's file has {version.size:,}; delete it to download it again"
        )


def _get(session: requests.Session, url: str, begin: int = 0) -> requests.Response:
    """Request the file from byte ``begin`` on; the body of the response is not read yet."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        raise _BrokenError(f"{urlsplit(url).netloc} cannot be reached ({cause})") from error
    if response.status_code >= 400:
        response.close()
        status = f"the server says {response.status_code} {response.reason}"
        if response.status_code == 429 or response.status_code >= 500:
            raise _BrokenError(status)
        raise InputError(f"{url}: {status}")
    return response

"""Downloading a file over HTTP: resumed where it broke off, checked by size, and either whole or not there."""

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
TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 4, 15)  # seconds before another attempt, until one brings a byte


def download(url: str, target: str | Path, *, progress: bool = False) -> bool:
    """Download ``url`` to ``target``, byte for byte as the server has it.

    The bytes are collected beside ``target``, in ``NAME.ID.part``, which is renamed once it has the size that the
    server says. The id stands for size, ETag and modification date, so what is left of an earlier download is gone on
    with if the file is still the same, and removed if it has changed. A connection that breaks is made again, a few
    times; one that cannot be made in the first place is not.

    Returns:
        False if ``target`` was there already; a size that the server can be asked for is checked then as well.

    Raises:
        InputError: the server cannot be reached, has no such file, or does not say its size; the connection keeps
            breaking; ``target`` has another size, or cannot be written. What has been downloaded is kept.
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
                    raise InputError(f"{url}: {broken}; the same command goes on where it broke off") from broken
                time.sleep(pauses.pop(0))
            except OSError as error:
                raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


class _BrokenError(Exception):
    """The connection failed or broke, ``received`` bytes after it was made; another attempt may succeed."""

    def __init__(self, reason: str, received: int = 0) -> None:
        super().__init__(reason)
        self.received = received


@dataclass(frozen=True)
class _Version:
    """What tells one version of a file from another."""

    size: int
    etag: str
    modified: str

    @classmethod
    def of(cls, response: requests.Response, first: int = 0) -> _Version | None:
        """None if the response does not begin at byte ``first``; the size is -1 where it does not say it."""
        headers = response.headers
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            begin, size = (int(match[1]), int(match[2])) if match else (-1, -1)
        else:
            begin, size = 0, int(headers.get("Content-Length", -1))
        return cls(size, headers.get("ETag", ""), headers.get("Last-Modified", "")) if begin == first else None

    def part(self, target: Path) -> Path:
        """Where the bytes of this version of ``target`` are collected."""
        identifier = blake2b(repr(self).encode(), digest_size=4).hexdigest()
        return target.with_name(f"{target.name}.{identifier}.part")


def _attempt(session: requests.Session, url: str, target: Path, progress: bool) -> None:
    response = _get(session, url)
    version = _Version.of(response)
    if version is None or version.size < 0:
        raise InputError(f"{url}: the server does not say how large the file is, so it could not be checked")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = version.part(target)
    try:
        _collect(session, url, response, version, part, target, progress)
        part.replace(target)
    except FileNotFoundError:
        if not target.exists():  # else another download of the same file was done first
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
    """Bring ``part`` to its whole size, from what is there already if the server can send the rest alone."""
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
    """Write the body into ``part``, from byte ``begin`` on, with a progress bar if it has a ``title``.

    Nothing is appended or cut off: two downloads of one file at once write the same bytes in the same places.
    """
    done = begin
    bar = tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=title, disable=title is None)
    with bar, part.open("r+b") as file:
        file.seek(begin)
        try:
            # Raw, for a file that is stored compressed must not arrive decompressed.
            while chunk := response.raw.read(CHUNK, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
        except HTTPError as error:
            raise _BrokenError(f"the connection broke after {done:,} of {size:,} bytes", done - begin) from error
    if done != size:
        raise _BrokenError(f"the server sent {done:,} of {size:,} bytes", done - begin)


def _check(session: requests.Session, url: str, target: Path) -> None:
    """Compare the size of a file that is there with the server's, if that can be had."""
    try:
        with _get(session, url) as response:
            version = _Version.of(response)
    except (_BrokenError, InputError):
        return  # it was whole when it got its name
    size = target.stat().st_size
    if version is not None and version.size not in (-1, size):
        raise InputError(f"{target}: has {size:,} bytes, the server's {version.size:,}; remove it to download it again")


def _get(session: requests.Session, url: str, begin: int = 0) -> requests.Response:
    """The response to a request for the file from byte ``begin`` on, its body not read yet."""
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

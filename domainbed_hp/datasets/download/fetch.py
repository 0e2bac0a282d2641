"""Download one file from one source, and go on where an earlier try stopped.

gdown downloads from Google Drive, `resume` over HTTP: pooch, which names the files, would always start over.
"""

import functools
import hashlib
import html
import re
import shutil
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Never

import pooch
import requests
import urllib3
from gdown import download as gdown_download
from gdown.exceptions import DownloadError, FileURLRetrievalError
from tqdm import tqdm

from domainbed_hp.datasets.download.unpack import find_kind
from domainbed_hp.datasets.spec import Archive
from domainbed_hp.files import sha256_of
from domainbed_hp.registry import UsageError

RETRIES = 6
"""Number of tries in a row that may bring no new bytes."""
BACKOFF_S = 1.0
"""Seconds to wait after the first failure; doubled after every other."""
MAX_WAIT_S = 120.0
"""Longest wait in seconds, also where a server asks for more."""
TIMEOUT_S = 30.0
"""Longest time in seconds for a connection, and between two reads."""
CHUNK = 2**18
DRIVE = "gdrive:"
BUSY = (408, 425, 429, 500, 502, 503, 504)
RETRIED = (requests.ConnectionError, requests.Timeout)
ERRORS = (OSError, ValueError, KeyError, DownloadError)
"""Errors of a source, those of requests and pooch among them."""


class Busy(requests.ConnectionError):
    """The server asked to try again, after `wait_s` seconds where it named a time."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def fetch(source: str, archive: Archive, folder: Path, digest: str) -> Path:
    """Download the file of `source` to `folder`, and return its path; raise one of `ERRORS` where that fails.

    The name of the file begins with a hash of the source: a part from one server is no beginning for another's file.
    """
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{archive.name}"
    path = folder / name
    partial = folder / f"{name}.part"
    download = download_from_drive if source.startswith(DRIVE) else resume

    def download_checked(url: str, to: str, _: object) -> None:
        download(url, partial)
        try:  # now, because pooch loses an unfinished file when its process is killed
            check_content(partial, archive)
            if digest and (got := sha256_of(partial)) != digest:
                raise UsageError(f"its SHA-256 {got} does not match the known hash {digest}")
        except UsageError:
            partial.unlink()
            raise
        partial.replace(to)

    pooch.get_logger().setLevel("WARNING")
    try:
        if path.exists() and digest and sha256_of(path) != digest:
            path.unlink()  # from a time when another digest was known, or none
        pooch.retrieve(source, None, fname=name, path=folder, downloader=download_checked)
    finally:
        if not partial.exists():
            get_stamp_path(partial).unlink(missing_ok=True)
    return path


def check_content(path: Path, archive: Archive) -> None:
    """Raise `UsageError` for a file that is not the archive but a web page, such as one on a quota or an error."""
    with open(path, "rb") as file:
        start = file.read(2**16)
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|!--|\?xml)", start, re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", start.decode(errors="replace"), re.DOTALL | re.IGNORECASE)
        words = " ".join(html.unescape(title[1]).split())[:200] if title else ""
        raise UsageError(f"got a web page instead of {archive.name}" + (f", titled {words!r}" if words else ""))
    if is_packed(archive) and not find_kind(path):
        raise UsageError(f"got a file that is neither a zip nor a tar instead of {archive.name}")


def is_packed(archive: Archive) -> bool:
    return archive.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))


def resume(url: str, partial: Path) -> None:
    """Download the file at `url` to `partial`; try again after lost connections and from busy servers."""
    failures, furthest = 0, read_size(partial)
    with requests.Session() as session:
        while True:
            try:
                return transfer(session, url, partial)
            except RETRIED as error:
                if (reached := read_size(partial)) > furthest:
                    failures, furthest = 0, reached
                failures += 1
                if failures > RETRIES:
                    raise
                asked = error.wait_s if isinstance(error, Busy) else 0.0
                wait_s = min(max(asked, BACKOFF_S * 2 ** (failures - 1)), MAX_WAIT_S)
                tqdm.write(f"{shorten(error)}; trying again in {wait_s:.0f} s", file=sys.stderr)
                time.sleep(wait_s)


def transfer(session: requests.Session, url: str, partial: Path) -> None:
    """Try once to download the rest of the file."""
    stamp = get_stamp_path(partial)
    start = read_size(partial) if stamp.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": stamp.read_text()}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code in BUSY:
            raise Busy(f"{response.status_code} {response.reason}", read_retry_after_s(response))
        content_range = response.headers.get("Content-Range", "")
        tag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        version = modified if tag.startswith("W/") or not tag else tag
        if start and response.status_code == 416 and content_range == f"bytes */{start}":
            return  # nothing is missing
        if response.status_code == 206:
            known = not start or version in (stamp.read_text(), "")
            fits = known and content_range.startswith(f"bytes {start}-")
        else:
            fits = not start or response.status_code != 416
        if not fits:
            partial.unlink(missing_ok=True)
            raise requests.ConnectionError("the downloaded part does not fit the file any more, starting over")
        response.raise_for_status()
        if response.status_code != 206:
            start = 0  # the server knows no ranges, or its file is another by now
        # A server may send less of the rest than was asked for; Content-Range has the size of the whole.
        ranged = response.status_code == 206
        whole = content_range.rpartition("/")[2] if ranged else response.headers.get("Content-Length", "")
        total = int(whole) if whole.isdigit() else None
        check_space(partial.parent, (total or 0) - start)
        with open(partial, "ab" if start else "wb") as file:
            if not start:
                # Only a strong name of this version says that a rest belongs to this start.
                stamp.unlink(missing_ok=True)
                if version:
                    stamp.write_text(version)
            with show_progress(partial, total, start) as bar:
                # Not iter_content: where a server labels a .tar.gz as gzip-encoded, that would unpack it.
                try:
                    for chunk in response.raw.stream(CHUNK, decode_content=False):
                        file.write(chunk)
                        file.flush()
                        bar.update(len(chunk))
                except urllib3.exceptions.HTTPError as error:
                    raise requests.ConnectionError(str(error)) from error
    if total is not None and read_size(partial) != total:
        raise requests.ConnectionError(f"got {read_size(partial):,} of {total:,} bytes")


def get_stamp_path(partial: Path) -> Path:
    """Return the path of the file that names the version of the remote file of which `partial` is a part."""
    return partial.with_suffix(".stamp")


def download_from_drive(source: str, partial: Path) -> None:
    if partial.exists():
        return  # whole: only then gdown gives it this name

    def list_parts() -> list[Path]:
        return [*partial.parent.glob(f"{partial.name}????????.part")]  # gdown's own names

    def report(received: int, total: int | None) -> None:
        if total and not bar.total:
            bar.total = total
            check_space(partial.parent, total - received)
        bar.update(received - bar.n)

    before = sum(map(read_size, list_parts()))
    download = functools.partial(
        gdown_download,
        id=source.removeprefix(DRIVE),
        output=str(partial),
        quiet=True,
        resume=True,
        use_cookies=False,
        retries=RETRIES,
        timeout=TIMEOUT_S,
        progress=report,
    )
    with show_progress(partial, None, before) as bar:
        try:
            download()
        except DownloadError as error:
            # gdown cannot go on with a part that is whole, or whose remote file was replaced. Its error is then neither
            # for a page of Drive's nor for a lost connection.
            stuck = before and not isinstance(error, FileURLRetrievalError) and error.__cause__ is None
            if not stuck or sum(map(read_size, list_parts())) > before:
                raise
            for part in list_parts():
                part.unlink()
            download()


def show_progress(partial: Path, total: int | None, start: int) -> "tqdm[Never]":
    name = partial.name.removesuffix(".part").partition("-")[2]
    return tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=None)


def read_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_space(folder: Path, need: int) -> None:
    """Raise `OSError` where `folder` has no room for `need` bytes."""
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(f"got {free:,} free bytes in {folder}, expected at least {need:,}")


def read_retry_after_s(response: requests.Response) -> float:
    """Return the wait that the server asks for, in seconds or as a date; 0 where it asks for none."""
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def shorten(error: BaseException) -> str:
    """Return the message of an error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__

import contextlib
import hashlib
import shutil
import subprocess
import sys
import time
from email.utils import formatdate

import pytest
import requests
from gdown.exceptions import DownloadError, FileURLRetrievalError
from loopback import QUOTA, Loopback, Reply, be_drive
from made_archives import write_tar, write_zip

from domainbed_hp.datasets.download import fetch as module
from domainbed_hp.datasets.download.fetch import fetch
from domainbed_hp.datasets.spec import Archive
from domainbed_hp.registry import UsageError

GDOWN = sys.modules["gdown.download"]  # gdown.download is a function of the same name
X = Archive("x.zip", ())
DATA = 300_000


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Failures show in fractions of a second."""
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(module, "RETRIES", 3)
    monkeypatch.setattr(GDOWN, "_wait_or_cancel", lambda **_: None)


@pytest.fixture
def server(tmp_path):
    with Loopback() as server:
        path = tmp_path / "x.zip"
        write_zip(path, {"a.jpg": bytes(i * i % 251 for i in range(256)) * (DATA // 256)})
        with open(path, "ab") as file:  # what follows a zip's end is a comment to it; noise does not shrink
            file.write(hashlib.shake_256(b"noise").digest(DATA))
        server.files["/x.zip"] = path.read_bytes()
        yield server


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


def get(server, folder, digest="", archive=X):
    path = fetch(f"{server.url}/x.zip", archive, folder, digest)
    assert path.read_bytes() == server.files["/x.zip"]
    return [asked for _, asked in server.requests]


def test_a_file_comes_as_it_is_and_once(server, folder):
    assert get(server, folder) == [""]
    assert get(server, folder) == [""]


@pytest.mark.parametrize("after", [0, 1, 70_000, 299_999])
def test_a_dropped_connection_is_taken_up_where_it_broke(server, folder, after):
    server.script["/x.zip"] = [Reply(stop_after=after)]
    assert get(server, folder) == ["", f"bytes={after}-" if after else ""]


def test_many_drops_are_no_failure_as_long_as_each_brings_something(server, folder):
    server.script["/x.zip"] = [Reply(stop_after=20_000) for _ in range(8)]
    assert len(get(server, folder)) == 9 > module.RETRIES


def test_drops_that_bring_nothing_end(server, folder):
    server.always["/x.zip"] = Reply(stop_after=0)
    with pytest.raises(requests.ConnectionError):
        get(server, folder)
    assert len(server.requests) == module.RETRIES + 1


def test_a_server_that_drops_and_knows_no_ranges_ends_too(server, folder):
    server.always["/x.zip"] = Reply(stop_after=1000, ranges=False)
    with pytest.raises(requests.ConnectionError):
        get(server, folder)
    assert len(server.requests) == module.RETRIES + 1


def test_where_ranges_are_ignored_it_starts_over(server, folder):
    server.script["/x.zip"] = [Reply(stop_after=70_000), Reply(ranges=False)]
    assert get(server, folder) == ["", "bytes=70000-"]


def test_a_rest_that_comes_in_slices(server, folder):
    server.script["/x.zip"] = [Reply(stop_after=70_000), Reply(at_most=100_000), Reply(at_most=100_000)]
    assert get(server, folder) == ["", "bytes=70000-", "bytes=170000-", "bytes=270000-"]


def test_the_rest_of_another_version_is_never_added_to_a_part(server, folder):
    old = server.files["/x.zip"]
    server.script["/x.zip"] = [Reply(stop_after=70_000), Reply(stop_after=80_000, tag='"2"'), Reply(tag='"2"')]
    server.files["/x.zip"] = old[:60_000] + bytes(len(old) - 60_000)
    assert get(server, folder) == ["", "bytes=70000-", "bytes=80000-"]


def test_a_server_that_does_not_compare_versions_is_found_out(server, folder):
    old = server.files["/x.zip"]
    server.script["/x.zip"] = [Reply(stop_after=70_000), Reply(tag='"2"', conditions=False)]
    server.files["/x.zip"] = old[:60_000] + bytes(len(old) - 60_000)
    assert get(server, folder) == ["", "bytes=70000-", ""]


def test_a_part_outlives_its_process(server, folder, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 0)
    server.script["/x.zip"] = [Reply(stop_after=70_000)]
    with pytest.raises(requests.ConnectionError):
        get(server, folder)
    assert get(server, folder) == ["", "bytes=70000-"]
    assert get(server, folder, hashlib.sha256(server.files["/x.zip"]).hexdigest())


def test_a_part_is_for_its_own_source(server, folder, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 0)
    server.script["/x.zip"] = [Reply(stop_after=70_000)]
    with pytest.raises(requests.ConnectionError):
        get(server, folder)
    server.files["/other/x.zip"] = server.files["/x.zip"]
    fetch(f"{server.url}/other/x.zip", X, folder, "")
    assert server.requests[-1] == ("/other/x.zip", "")


def test_a_part_of_no_known_version_is_not_gone_on_with(server, folder):
    server.script["/x.zip"] = [Reply(stop_after=70_000, tag="")]
    assert get(server, folder) == ["", ""]
    server.requests.clear()
    (next(folder.glob("*-x.zip"))).unlink()
    server.script["/x.zip"] = [Reply(stop_after=70_000, tag='W/"1"')]
    assert get(server, folder) == ["", ""]


def test_a_date_is_a_version_too(server, folder):
    date = formatdate(0, usegmt=True)
    server.script["/x.zip"] = [Reply(stop_after=70_000, tag="", headers={"Last-Modified": date}), Reply(tag=date)]
    assert get(server, folder) == ["", "bytes=70000-"]


def test_a_part_that_is_whole_is_not_fetched_again(server, folder):
    get(server, folder)
    path = next(folder.glob("*-x.zip"))
    whole = len(server.files["/x.zip"])
    for more, asked in ((b"", [f"bytes={whole}-"]), (b"too much", [f"bytes={whole + 8}-", ""])):
        server.requests.clear()
        (folder / f"{path.name}.part").write_bytes(path.read_bytes() + more)
        (folder / f"{path.name}.stamp").write_text('"1"')
        path.unlink()
        assert get(server, folder) == asked


@pytest.mark.parametrize("status", [429, 503, 500])
def test_a_busy_server_is_asked_again(server, folder, status):
    server.script["/x.zip"] = [Reply(status=status), Reply(status=status), Reply(stop_after=5), Reply(status=status)]
    assert len(get(server, folder)) == 5


@pytest.mark.parametrize(
    ("asked", "waits"),
    [("0.2", 0.01), ("7", 7), ("100000", 120), ("date", 60), ("soon", 0.01)],
)
def test_it_waits_as_long_as_the_server_says_within_reason(server, folder, monkeypatch, asked, waits):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    asked = formatdate(time.time() + waits, usegmt=True) if asked == "date" else asked
    server.script["/x.zip"] = [Reply(status=429, headers={"Retry-After": asked})]
    get(server, folder)
    assert slept == [pytest.approx(waits, abs=2 if waits == 60 else 0)]


def test_waits_double_and_end(server, folder, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.always["/x.zip"] = Reply(status=503)
    with pytest.raises(requests.ConnectionError, match="503 Service Unavailable"):
        get(server, folder)
    assert slept == [0.01, 0.02, 0.04]


@pytest.mark.parametrize("status", [403, 404, 410, 416])
def test_what_is_not_there_fails_at_once(server, folder, status):
    server.always["/x.zip"] = Reply(status=status)
    with pytest.raises(requests.HTTPError, match=str(status)):
        get(server, folder)
    assert len(server.requests) == 1


def test_nobody_listens(folder, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 1)
    with Loopback() as closed:
        pass
    with pytest.raises(requests.ConnectionError):
        fetch(f"{closed.url}/x.zip", X, folder, "")


def test_a_silent_server_is_left_and_asked_again(server, folder):
    server.script["/x.zip"] = [Reply(hang=True)]
    assert len(get(server, folder)) == 2
    server.always["/x.zip"] = Reply(hang=True)
    next(folder.glob("*-x.zip")).unlink()
    start = time.monotonic()
    with pytest.raises((requests.ConnectionError, requests.Timeout, *module.ERRORS)):
        get(server, folder)
    assert time.monotonic() - start < 5


def test_more_was_announced_than_comes(server, folder):
    whole = len(server.files["/x.zip"])
    server.script["/x.zip"] = [Reply(announce=whole + 5, tag="")]
    assert get(server, folder) == ["", ""]


def test_a_server_that_calls_a_tar_gz_an_encoding_does_not_have_it_unpacked(server, folder, tmp_path):
    write_tar(tmp_path / "x.tar.gz", {"a.jpg": b"x" * 1000})
    server.files["/x.zip"] = (tmp_path / "x.tar.gz").read_bytes()
    server.headers["/x.zip"] = {"Content-Encoding": "gzip"}
    get(server, folder, archive=Archive("x.tar.gz", ()))


def test_other_bytes_than_the_digest_says(server, folder):
    with pytest.raises(ValueError, match="does not match the known hash"):
        get(server, folder, "0" * 64)
    assert not [path for path in folder.iterdir() if path.suffix != ".stamp"]
    get(server, folder, hashlib.sha256(server.files["/x.zip"]).hexdigest())


@contextlib.contextmanager
def killed_while_hashing(monkeypatch):
    """Expect a kill, which arrives when a file is hashed."""

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hashlib, "file_digest", kill)
        patch.setattr("pooch.hashes.file_hash", kill)
        yield


def test_a_kill_while_a_download_is_hashed_costs_nothing(server, folder, monkeypatch):
    digest = hashlib.sha256(server.files["/x.zip"]).hexdigest()
    with killed_while_hashing(monkeypatch):
        get(server, folder, digest)
    assert get(server, folder, digest) == ["", f"bytes={len(server.files['/x.zip'])}-"]
    assert [path.name for path in folder.iterdir()] == [next(folder.glob("*-x.zip")).name]


def test_a_file_that_came_before_its_digest_was_known_is_checked(server, folder):
    good = server.files["/x.zip"]
    server.files["/x.zip"] += b"more"
    get(server, folder)
    server.files["/x.zip"] = good
    assert get(server, folder, hashlib.sha256(good).hexdigest()) == ["", ""]


def test_a_range_that_nobody_asked_for(server, folder):
    server.script["/x.zip"] = [Reply(status=206, body=server.files["/x.zip"], announce=DATA)]
    assert get(server, folder) == ["", f"bytes={DATA}-"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            b"<!DOCTYPE html><html><head><title>Google Drive -\n Quota &amp; more</title>",
            "titled 'Google Drive - Quota & m",
        ),
        (b"\n <HTML><body>404", "got a web page instead of x.zip$"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "got a web page instead of x.zip$"),
        (b"Sorry.", "neither a zip nor a tar instead of x.zip"),
        (b"", "neither a zip nor a tar instead of x.zip"),
    ],
)
def test_a_page_is_never_taken_for_an_archive(server, folder, page, said):
    server.script["/x.zip"] = [Reply(body=page, headers={"Content-Type": "text/html"})]
    with pytest.raises(UsageError, match=said):
        get(server, folder)
    assert get(server, folder) == ["", ""]


def test_a_page_is_no_list_either(server, folder):
    server.files["/x.zip"] = b"art/cat/1.jpg\n"
    get(server, folder, archive=Archive("list.txt", ()))
    server.files["/x.zip"] = b"<html>"
    next(folder.glob("*-list.txt")).unlink()
    with pytest.raises(UsageError, match="a web page instead of list.txt"):
        get(server, folder, archive=Archive("list.txt", ()))


def test_a_full_disk_is_seen_before_the_first_byte(server, folder, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"got 1,000 free bytes in .*, expected at least 30\d,\d{3}"):
        get(server, folder)


def test_nothing_is_printed_where_nobody_watches(server, folder, capfd, monkeypatch):
    said = []
    monkeypatch.setattr(module.pooch.get_logger(), "handle", said.append)
    get(server, folder)
    assert capfd.readouterr() == ("", "") and not said


@pytest.fixture
def drive(server, monkeypatch):
    server.files["/x.zip"] += hashlib.shake_256(b"more").digest(4 * GDOWN.CHUNK_SIZE)  # it keeps whole chunks alone
    be_drive(server, server.files["/x.zip"], monkeypatch)
    return server


def get_drive(drive, folder, digest=""):
    path = fetch("gdrive:ID", X, folder, digest)
    assert path.read_bytes() == drive.files["/x.zip"]
    return drive.requests


def test_drive_form_then_quota_page_then_file(drive, folder):
    drive.script["/uc"] = [QUOTA]
    with pytest.raises(FileURLRetrievalError, match="Too many users"):
        get_drive(drive, folder)
    drive.script["/download"] = [QUOTA]
    with pytest.raises((UsageError, DownloadError), match="Too many users|Quota exceeded"):
        get_drive(drive, folder)
    drive.requests.clear()
    assert [path for path, _ in get_drive(drive, folder)] == ["/uc?id=ID", "/download?id=ID&confirm=t"]
    assert [path.name for path in folder.iterdir()] == [next(folder.glob("*-x.zip")).name]


def test_drive_sends_a_quota_page_as_if_it_were_the_file(drive, folder):
    drive.script["/download"] = [Reply(body=QUOTA.body, headers=QUOTA.headers | drive.headers["/download"])]
    with pytest.raises(UsageError, match="instead of x.zip, titled 'Google Drive - Quota exceeded'"):
        get_drive(drive, folder)
    get_drive(drive, folder)


def test_drive_drops_and_is_taken_up(drive, folder):
    drive.script["/download"] = [Reply(stop_after=600_000)]
    assert get_drive(drive, folder)[-1] == ("/download?id=ID&confirm=t", "bytes=524288-")


def test_a_kill_while_a_file_from_drive_is_hashed_costs_nothing(drive, folder, monkeypatch):
    digest = hashlib.sha256(drive.files["/x.zip"]).hexdigest()
    with killed_while_hashing(monkeypatch):
        get_drive(drive, folder, digest)
    drive.requests.clear()
    assert get_drive(drive, folder, digest) == []


def part_of_drive(drive, folder, monkeypatch, after):
    with monkeypatch.context() as patch:
        patch.setattr(module, "RETRIES", 0)
        drive.script["/download"] = [Reply(stop_after=after)]
        with pytest.raises(DownloadError):
            get_drive(drive, folder)
    drive.requests.clear()


def test_a_part_from_drive_outlives_its_process_and_a_quota_page(drive, folder, monkeypatch):
    part_of_drive(drive, folder, monkeypatch, 600_000)
    drive.script["/uc"] = [QUOTA]
    with pytest.raises(FileURLRetrievalError):
        get_drive(drive, folder)
    drive.script["/download"] = [Reply(), Reply(hang=True), Reply(hang=True)]
    monkeypatch.setattr(module, "RETRIES", 1)
    with pytest.raises(DownloadError):
        get_drive(drive, folder)
    assert get_drive(drive, folder)[-1] == ("/download?id=ID&confirm=t", "bytes=524288-")


def test_a_part_from_drive_that_is_stuck_is_dropped(drive, folder, monkeypatch):
    part_of_drive(drive, folder, monkeypatch, 600_000)
    part = next(folder.glob("*.part"))
    part.write_bytes(drive.files["/x.zip"])  # whole: no range is left to ask for
    get_drive(drive, folder)
    next(folder.glob("*-x.zip")).unlink()
    part_of_drive(drive, folder, monkeypatch, 600_000)
    drive.always["/download"] = Reply(ranges=False)
    get_drive(drive, folder)


def test_drive_writes_no_cookies(drive, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(GDOWN, "DEFAULT_COOKIES_FILE", str(tmp_path / "home" / "cookies.txt"))
    get_drive(drive, folder)
    assert not (tmp_path / "home").exists()


def test_downloading_needs_no_torch():
    code = """if True:
        import sys
        from domainbed_hp.scripts import download, run
        assert run(download.main, ["--data_dir", "nowhere", "--datasets", "PACS", "--check"]) == 2
        sys.exit("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

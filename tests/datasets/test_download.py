import errno
import io
import shutil
import sys
import threading
import zipfile
from dataclasses import replace

import pytest
from filelock import FileLock
from loopback import Loopback, Reply
from made_archives import MAKERS, pets, picture, sha256, write_zip

from domainbed_hp.datasets.download import fetch
from domainbed_hp.datasets.download import unpack as unpacking
from domainbed_hp.datasets.download.check import check
from domainbed_hp.datasets.download.download import download, match_archives
from domainbed_hp.registry import DATASETS, UsageError, load
from domainbed_hp.scripts import download as script
from domainbed_hp.scripts import run


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.01)
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(fetch, "RETRIES", 2)


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


@pytest.fixture
def shelf(tmp_path):
    """A folder for archives."""
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


@pytest.fixture
def spec(server, shelf):
    """The pets, to be had from the server."""
    made = pets(shelf, server.url)
    server.files["/pets.zip"] = shelf / "pets.zip"
    return made


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def names(folder):
    """Everything in `folder` but what is in a data set."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_right(spec, data):
    """The pets are there as they were packed, and nothing else."""
    assert names(data) == ["digests.txt", "pets"]
    files = sorted(path for path in (data / "pets").rglob("*") if path.is_file())
    assert len(files) == sum(spec.image_counts)
    for path in files:
        assert path.read_bytes() == picture(f"Pets-1.0/{path.relative_to(data / 'pets').as_posix()}")
    assert (data / "digests.txt").read_text().count("\n") == 1


def test_a_data_set_arrives(spec, server, data, shelf, capsys):
    download(spec, data)
    assert_right(spec, data)
    assert (data / "digests.txt").read_text() == f"{sha256(shelf / 'pets.zip')}  pets.zip\n"
    out, err = capsys.readouterr()
    for text in ("CC0", "Nobody. Pets. 2020", "https://example.org/pets", f"16 images in {data / 'pets'}"):
        assert text in out
    assert err == ""
    with zipfile.ZipFile(shelf / "pets.zip") as archive:
        assert archive.testzip() is None  # the server's own copy is untouched


def test_licence_and_citation_are_shown_before_the_first_byte(spec, server, data, capsys, monkeypatch):
    shown = []
    real = fetch.resume
    monkeypatch.setattr(fetch, "resume", lambda *args: (shown.append(capsys.readouterr().out), real(*args)))
    download(spec, data)
    assert "licence: CC0" in shown[0] and "please cite: Nobody" in shown[0] and not server.requests[1:]


@pytest.mark.parametrize("name", MAKERS)
def test_the_benchmark_has_a_licence_a_citation_and_sources(name):
    real = load(DATASETS, "dataset", name)
    assert real.licence and real.citation and real.homepage.startswith("http") and real.archives
    for archive in real.archives:
        assert archive.sources and all(s.startswith(("gdrive:", "http://", "https://")) for s in archive.sources)
    everywhere = [archive.name for other in MAKERS for archive in load(DATASETS, "dataset", other).archives]
    assert len(everywhere) == len(set(everywhere))  # digests.txt and mirrors know them by name


@pytest.mark.parametrize("name", MAKERS)
def test_each_real_layout_from_download_to_check(name, server, shelf, data, capsys):
    spec = MAKERS[name](shelf, server.url)
    server.files |= {f"/{path.name}": path for path in shelf.iterdir()}
    download(spec, data)
    assert names(data) == sorted(["digests.txt", spec.folder])
    assert sorted(p.name for p in (data / spec.folder).iterdir() if p.is_dir()) == sorted(spec.domain_folders)
    report = check(spec, data, num_workers=0)
    assert report.ok and report.build == ""
    assert {domain: sum(per.values()) for domain, per in report.counts.items()} == dict(
        zip(spec.domain_folders, spec.image_counts, strict=True)
    )
    digests = (data / "digests.txt").read_text().split()
    assert digests[1::2] == [archive.name for archive in spec.archives if not archive.sha256]
    for archive in (shelf / a.name for a in spec.archives if not a.sha256):
        assert sha256(archive) in digests
    capsys.readouterr()
    download(spec, data)
    assert capsys.readouterr().out == f"{spec.name}: complete in {data / spec.folder}, not changed\n"


GOOD_FAULTS = {
    "dropped": [Reply(stop_after=1000)],
    "busy": [Reply(status=429, headers={"Retry-After": "0"}), Reply(status=503)],
    "truncated": [Reply(stop_after=5000), Reply(stop_after=100)],
    "ranges ignored": [Reply(stop_after=1000), Reply(ranges=False)],
    "changed between parts": [Reply(stop_after=1000), Reply(tag='"2"')],
    "silent": [Reply(hang=True)],
}
BAD_FAULTS = {
    "gone": (Reply(status=404), "404"),
    "always busy": (Reply(status=503), "503"),
    "a page": (Reply(body=b"<html><title>Quota</title>"), "titled 'Quota'"),
    "always silent": (Reply(hang=True), "timed out"),
    "always dropped": (Reply(stop_after=0), "drop|broken|incomplete|IncompleteRead"),
}


@pytest.mark.parametrize("fault", GOOD_FAULTS)
def test_faults_that_pass(spec, server, data, fault):
    server.script["/pets.zip"] = list(GOOD_FAULTS[fault])
    download(spec, data)
    assert_right(spec, data)
    assert len(server.requests) == len(GOOD_FAULTS[fault]) + ("parts" not in fault and "ignored" not in fault)


@pytest.mark.parametrize("fault", BAD_FAULTS)
def test_faults_that_stay_are_told_and_leave_nothing(spec, server, data, fault):
    server.always["/pets.zip"], said = BAD_FAULTS[fault]
    with pytest.raises(UsageError, match=said) as caught:
        download(spec, data)
    assert f"{server.url}/pets.zip: " in str(caught.value)
    assert str(data / ".downloads" / "pets" / "pets.zip") in str(caught.value) and "--archive" in str(caught.value)
    assert names(data) in ([], [".downloads"])
    server.always.clear()
    download(spec, data)
    assert_right(spec, data)


@pytest.mark.parametrize("fault", BAD_FAULTS)
def test_the_next_source_is_tried(spec, server, data, fault, capsys):
    server.always["/first.zip"], said = BAD_FAULTS[fault]
    server.files["/first.zip"] = server.files["/pets.zip"]
    archive = replace(spec.archives[0], sources=(f"{server.url}/first.zip", f"{server.url}/pets.zip"))
    download(replace(spec, archives=(archive,)), data)
    assert_right(spec, data)
    assert f"Pets: {server.url}/first.zip: " in capsys.readouterr().err


def test_all_sources_and_their_reasons_are_listed(spec, server, data):
    server.always["/b.zip"] = Reply(body=b"<html><title>Sorry</title>")
    sources = (f"{server.url}/a.zip", f"{server.url}/b.zip", "gdrive:ID")
    spec = replace(spec, archives=(replace(spec.archives[0], sources=sources[:2]),))
    with pytest.raises(UsageError) as caught:
        download(spec, data, mirror=f"{server.url}/lab/")
    lines = str(caught.value).splitlines()
    assert lines[1].startswith(f"  {server.url}/lab/pets.zip: 404")
    assert lines[2].startswith(f"  {server.url}/a.zip: 404")
    assert lines[3].startswith(f"  {server.url}/b.zip: got a web page instead of pets.zip, titled 'Sorry'")


def test_a_mirror_comes_first(spec, server, data):
    server.files["/lab/pets.zip"] = server.files["/pets.zip"]
    download(spec, data, mirror=f"{server.url}/lab")
    assert_right(spec, data)
    assert [path for path, _ in server.requests] == ["/lab/pets.zip"]


def test_an_archive_fetched_by_hand(spec, server, shelf, data):
    path = shelf / "as I called it.zip"
    shutil.copy(shelf / "pets.zip", path)
    download(spec, data, archives=match_archives([spec], [path]))
    assert_right(spec, data)
    assert path.exists() and not server.requests


def test_an_archive_fetched_by_hand_stays_wherever_it_lies(spec, server, shelf, data):
    path = data / ".downloads" / "pets" / "1234-pets.zip"  # as if it were a download
    path.parent.mkdir(parents=True)
    good = (shelf / "pets.zip").read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UsageError, match="damaged"):
        download(spec, data, archives=match_archives([spec], [path]))
    assert names(path.parent) == [path.name]
    path.write_bytes(good)
    (path.parent / "other.part").touch()
    download(spec, data, archives=match_archives([spec], [path]))
    assert names(path.parent) == [path.name] and names(data) == [".downloads", "digests.txt", "pets"]
    assert not server.requests


def test_an_archive_put_where_the_error_says(spec, server, shelf, data):
    (data / ".downloads" / "pets").mkdir(parents=True)
    shutil.copy(shelf / "pets.zip", data / ".downloads" / "pets" / "pets.zip")
    download(spec, data)
    assert_right(spec, data)
    assert not server.requests


def test_which_archive_a_path_is(spec, shelf):
    two = replace(spec, archives=(*spec.archives, replace(spec.archives[0], name="more.zip")))
    (shelf / "x.zip").touch()
    (shelf / "more.zip").touch()
    assert match_archives([two], [shelf / "more.zip"]) == {"more.zip": shelf / "more.zip"}
    with pytest.raises(UsageError, match="no archive has this name. Expected: pets.zip, more.zip"):
        match_archives([two], [shelf / "x.zip"])
    with pytest.raises(UsageError, match="no archive has this name"):
        match_archives([spec], [shelf / "x.zip", shelf / "more.zip"])
    with pytest.raises(UsageError, match="no such file"):
        match_archives([spec], [shelf / "none.zip"])


def test_by_hand_a_page_is_no_archive_either(spec, shelf, data):
    (shelf / "pets.zip").write_text("<html><title>Sign in</title>")
    with pytest.raises(UsageError, match=r"shelf/pets.zip: got a web page .* titled 'Sign in'. Fetch it again"):
        download(spec, data, archives=match_archives([spec], [shelf / "pets.zip"]))
    assert (shelf / "pets.zip").exists()


def test_the_first_good_download_sets_the_digest(spec, server, shelf, data):
    download(spec, data)
    shutil.rmtree(data / "pets")
    server.files["/pets.zip"] = (shelf / "pets.zip").read_bytes() + b"one more byte"
    with pytest.raises(UsageError) as caught:
        download(spec, data)
    for text in (sha256(shelf / "pets.zip"), f"delete its line in {data / 'digests.txt'}", "known hash"):
        assert text in str(caught.value)
    assert names(data) in (["digests.txt"], [".downloads", "digests.txt"])
    with pytest.raises(UsageError, match="its SHA-256 is .*delete its line"):
        (shelf / "pets.zip").write_bytes(server.files["/pets.zip"])
        download(spec, data, archives=match_archives([spec], [shelf / "pets.zip"]))
    (data / "digests.txt").unlink()
    download(spec, data)
    assert_right(spec, data)


def test_a_digest_is_recorded_once(spec, data):
    download(spec, data)
    shutil.rmtree(data / "pets")
    download(spec, data)
    assert_right(spec, data)


def test_a_digest_that_was_cut_short_spoils_no_other(spec, shelf, data):
    data.mkdir()
    (data / "digests.txt").write_text("0123abc")
    download(spec, data)
    assert (data / "digests.txt").read_text() == f"0123abc\n{sha256(shelf / 'pets.zip')}  pets.zip\n"


def test_the_specs_digest_is_the_law(spec, server, shelf, data):
    right = replace(spec, archives=(replace(spec.archives[0], sha256=sha256(shelf / "pets.zip")),))
    wrong = replace(spec, archives=(replace(spec.archives[0], sha256="0" * 64),))
    with pytest.raises(UsageError, match="does not match the known hash") as caught:
        download(wrong, data)
    assert "digests.txt" not in str(caught.value)
    download(right, data)
    assert names(data) == ["pets"]


def test_no_digest_is_recorded_of_what_was_not_good(spec, server, data):
    with pytest.raises(UsageError, match=r"got \(8, 8\) images in art, book, expected \(9, 8\)"):
        download(replace(spec, image_counts=(9, 8)), data)
    assert names(data) == [".downloads"]


def test_other_counts_keep_the_archives_and_can_be_accepted(spec, server, data, capsys):
    other = replace(spec, image_counts=(9, 8), other_builds={"of old": (7, 8)})
    with pytest.raises(UsageError, match=r"expected \(9, 8\) or \(7, 8\) \(the build of old\)") as caught:
        download(other, data)
    assert "--accept_counts" in str(caught.value) and str(data / ".downloads" / "pets") in str(caught.value)
    download(other, data, accept_counts=True)
    assert len(server.requests) == 1
    assert_right(spec, data)
    assert "warning: Pets: got (8, 8)" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Nothing was changed.*or accept it with --accept_counts"):
        download(other, data)
    download(other, data, accept_counts=True)


def test_present_but_wrong_data_is_never_touched(spec, server, data):
    download(spec, data)
    gone = data / "pets" / "art" / "cat" / "0.jpg"
    gone.unlink()
    shutil.rmtree(data / "pets" / "book" / "dog")
    before = sorted(data.rglob("*"))
    server.requests.clear()
    with pytest.raises(UsageError, match="missing class folder of .*book: dog\nNothing was changed. Move this folder"):
        download(spec, data)
    assert sorted(data.rglob("*")) == before and not server.requests


def test_an_empty_folder_is_none(spec, data):
    (data / "pets").mkdir(parents=True)
    download(spec, data)
    assert_right(spec, data)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_nothing_is_told_before_the_first_byte(spec, server, data, tmp_path, there):
    data.mkdir()
    if there:
        (tmp_path / "big disk").mkdir()
    (data / "pets").symlink_to(tmp_path / "big disk")
    with pytest.raises(
        UsageError, match="pets is a link to .*big disk, which does not exist; expected .*Remove the link"
    ):
        download(spec, data)
    assert not server.requests and names(data) == ["pets"]


def test_a_link_to_the_data_is_fine(spec, data, tmp_path, capsys):
    download(spec, data)
    (data / "pets").rename(tmp_path / "big disk")
    (data / "pets").symlink_to(tmp_path / "big disk")
    download(spec, data)
    assert "not changed" in capsys.readouterr().out


def test_a_damaged_archive_is_fetched_anew(spec, server, shelf, data):
    good = (shelf / "pets.zip").read_bytes()
    server.files["/pets.zip"] = good[: len(good) // 2]  # and says so: the length is right
    with pytest.raises(UsageError, match="pets.zip: damaged"):
        download(spec, data)
    assert names(data) == []
    server.files["/pets.zip"] = good
    download(spec, data)
    assert_right(spec, data)


@pytest.mark.parametrize("member", ["../../evil.jpg", "/tmp/evil.jpg", "a\\..\\evil.jpg"])
def test_a_hostile_archive_leaves_nothing(spec, server, shelf, tmp_path, data, member):
    with zipfile.ZipFile(shelf / "pets.zip", "a") as archive:
        archive.writestr(member, b"evil")
    with pytest.raises(UsageError, match="refused because of"):
        download(spec, data)
    assert names(data) == [] and names(tmp_path) == ["data", "shelf"]


def test_a_disk_that_fills_while_it_unpacks_costs_no_download(spec, server, data, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unpacking.zipfile, "open", lambda *_: Full(), raising=False)
        with pytest.raises(UsageError, match="Pets: .*No space left on device.*it goes on from here"):
            download(spec, data)
    download(spec, data)
    assert_right(spec, data)
    assert len(server.requests) == 1


def test_the_wrong_archive_says_what_it_holds(spec, server, shelf, data):
    write_zip(shelf / "pets.zip", {"animals/art/cat/1.jpg": b"x", "animals/readme.txt": b"x"})
    said = "no folder of the archives holds art, book. They hold:\n  animals/art\n  ani"
    with pytest.raises(UsageError, match=said) as caught:
        download(spec, data)
    advice = f"\nThe archives remain in {data / '.downloads' / 'pets'}; remove them to fetch them again."
    assert str(caught.value).endswith(advice)

    def arrange(_):
        raise UsageError("Pets: no annotations")

    with pytest.raises(UsageError) as caught:
        download(replace(spec, arrange=arrange), data)
    assert str(caught.value) == f"Pets: no annotations{advice}"


def test_what_does_not_belong_there_is_left_out(spec, server, shelf, data):
    with zipfile.ZipFile(shelf / "pets.zip", "a") as archive:
        archive.writestr("Pets-1.0/raw/x.jpg", b"x")
        archive.writestr("Pets-1.0/__MACOSX/art/._1.jpg", b"x")
        archive.writestr("elsewhere/art/x.jpg", b"x")
    download(spec, data)
    assert_right(spec, data)


def test_a_full_disk_is_told(spec, data, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UsageError, match="got 10 free bytes in"):
        download(spec, data)
    assert names(data) == []


def test_a_disk_too_small_to_unpack_is_told(spec, shelf, data, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UsageError, match="got 10 free bytes in"):
        download(spec, data, archives=match_archives([spec], [shelf / "pets.zip"]))
    assert names(data) == []


def test_what_a_killed_run_unpacked_takes_no_space_from_the_next(spec, data, monkeypatch):
    (data / ".pets.partial").mkdir(parents=True)
    disk = shutil.disk_usage("/")
    free = lambda _: disk._replace(free=10 if (data / ".pets.partial").exists() else 10**6)  # noqa: E731
    monkeypatch.setattr(fetch.shutil, "disk_usage", free)
    download(spec, data)
    assert_right(spec, data)


def test_no_place_to_write(spec, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Pets: .*File exists: .*/file.*Correct this"):
        download(spec, tmp_path / "file")


def test_two_at_once_download_once(spec, server, data, capsys):
    server.bytes_per_s = 50_000
    threads = [threading.Thread(target=download, args=(spec, data)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_right(spec, data)
    assert len(server.requests) == 1
    assert "another process is downloading it" in capsys.readouterr().err


def test_a_lock_left_over_is_no_lock(spec, data):
    data.mkdir()
    lock = FileLock(data / ".pets.lock")
    lock.acquire()
    lock.release()
    (data / ".pets.lock").touch()
    download(spec, data)
    assert_right(spec, data)


def test_what_is_made_or_nowhere_to_be_had_is_not_downloaded(spec, data):
    with pytest.raises(UsageError, match="Pets has no archives"):
        download(replace(spec, archives=()), data)
    with pytest.raises(UsageError, match="no archives to download: train makes it"):
        download(load(DATASETS, "dataset", "ShapesDG"), data)


def command(*args):
    return run(script.main, [str(arg) for arg in args])


@pytest.fixture
def registered(spec, monkeypatch):
    monkeypatch.setitem(DATASETS, "Pets", f"{__name__}:PETS")
    monkeypatch.setattr(sys.modules[__name__], "PETS", spec, raising=False)
    return spec


def test_the_command(registered, data, capsys):
    assert command("--data_dir", data, "--datasets", "Pets") == 0
    assert_right(registered, data)
    assert command("--data_dir", data, "--datasets", "Pets") == 0
    assert "not changed" in capsys.readouterr().out
    assert command("--data_dir", data, "--datasets", "Pets", "--check") == 0
    assert "Pets: right" in capsys.readouterr().out


def test_wrong_use_of_the_command(registered, server, data, capsys):
    assert command("--data_dir", data) == 2
    assert "Known: VLCS, PACS, OfficeHome, TerraIncognita, DomainNet, Pets" in capsys.readouterr().err
    assert command("--data_dir", data, "--datasets", "Pets", "PCAS") == 2
    assert "unknown dataset 'PCAS'. Did you mean 'PACS'?" in capsys.readouterr().err
    assert command("--data_dir", data, "--datasets", "Pets", "Debug28") == 2
    assert "Debug28 is made, not downloaded" in capsys.readouterr().err
    assert command("--data_dir", data, "--datasets", "Pets", "--json") == 2
    assert command("--data_dir", data, "--datasets", "Pets", "--archive", data / "none.zip") == 2
    assert command("--data_dir", data, "--datasets", "Pets", "--check") == 2
    assert "Download it first" in capsys.readouterr().err
    assert not server.requests and not data.exists()


def test_one_data_set_that_fails_does_not_stop_the_others(registered, monkeypatch, server, data, capsys):
    bad = replace(registered, name="Gone", folder="gone", archives=(replace(registered.archives[0], sources=()),))
    monkeypatch.setitem(DATASETS, "Gone", f"{__name__}:GONE")
    monkeypatch.setattr(sys.modules[__name__], "GONE", bad, raising=False)
    assert command("--data_dir", data, "--datasets", "Gone", "Pets") == 2
    assert "error: Gone: no source has pets.zip" in capsys.readouterr().err
    assert_right(registered, data)

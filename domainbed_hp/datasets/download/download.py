"""Download a data set: fetch its archives, unpack them next to the target, check the images, move them into place.

Archives lie in the hidden folder `.downloads`; a download that was stopped goes on from them. Unpacked files lie in
`.<folder>.partial`, which is removed at the end of every download, and unpacked anew by the next one.
"""

import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from domainbed_hp.datasets.download import fetch
from domainbed_hp.datasets.download.unpack import read_unpacked_size, unpack
from domainbed_hp.datasets.folder import (
    describe_counts,
    find_build,
    find_root,
    format_lines,
    list_subfolders,
    scan_folder,
)
from domainbed_hp.datasets.spec import Archive, DatasetSpec
from domainbed_hp.files import hold_lock, sha256_of
from domainbed_hp.registry import UsageError


class Places:
    """The paths of one data set's files during its download."""

    def __init__(self, data_dir: Path, folder: str) -> None:
        self.data_dir, self.target = data_dir, data_dir / folder
        self.downloads = data_dir / ".downloads" / folder
        """Folder of archives, whole and in part."""
        self.partial = data_dir / f".{folder}.partial"
        """Folder of unpacked files, next to the target so that a rename can move it there."""
        self.lock = data_dir / f".{folder}.lock"
        self.digests = data_dir / "digests.txt"
        """File of the SHA-256 of every archive's first good download, in the format of sha256sum."""


def download(
    spec: DatasetSpec,
    data_dir: Path,
    mirror: str = "",
    archives: Mapping[str, Path] | None = None,
    accept_counts: bool = False,
) -> None:
    """Download the images of `spec` to `data_dir/spec.folder`, unless they are complete there.

    Args:
        mirror: URL of a folder that has the archives under their names; tried first.
        archives: name -> path of archives fetched by hand, which are neither moved nor removed.
        accept_counts: whether images are installed whose numbers are of no known build.
    """
    if not spec.archives:
        made, advice = "train makes it, and needs no --data_dir", f"copy its images to {data_dir / spec.folder}"
        raise UsageError(f"{spec.name} has no archives to download: {made if spec.build else advice}")
    places = Places(data_dir.resolve(), spec.folder)
    try:
        with hold_lock(places.lock, f"{spec.name}: another process is downloading it, waiting"):
            try:
                if not is_complete(spec, places.target, accept_counts):
                    install(spec, places, mirror, archives or {}, accept_counts)
                remove_downloads(places.downloads, (archives or {}).values())
            finally:
                shutil.rmtree(places.partial, ignore_errors=True)
                for folder in (places.downloads, places.downloads.parent):
                    with suppress(OSError):  # in use, by this data set or by another
                        folder.rmdir()
    except OSError as error:
        raise UsageError(f"{spec.name}: {error}. Correct this and run again; it goes on from here.") from error


def remove_downloads(downloads: Path, by_hand: Collection[Path]) -> None:
    """Remove the downloaded archives, except those that the user passed by hand."""
    protected = [path.resolve() for path in by_hand]
    for path in downloads.rglob("*"):
        if not path.is_dir() and path.resolve() not in protected:
            with suppress(OSError):
                path.unlink()


def match_archives(specs: Sequence[DatasetSpec], paths: Sequence[Path]) -> dict[str, Path]:
    """Return archive name -> path by the names of the files; the only file for the only archive may have any name."""
    names = [archive.name for spec in specs for archive in spec.archives]
    archives = {}
    for path in paths:
        if not path.is_file():
            raise UsageError(f"--archive {path}: no such file. Pass the path of an archive")
        if path.name not in names and not len(names) == len(paths) == 1:
            raise UsageError(f"--archive {path}: no archive has this name. Expected: {', '.join(names)}")
        archives[path.name if path.name in names else names[0]] = path
    return archives


def is_complete(spec: DatasetSpec, target: Path, accept_counts: bool) -> bool:
    """Return whether `target` holds the data set; `UsageError` lists all problems of one that is not empty."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        if target.is_symlink():
            raise UsageError(
                f"{spec.name}: {target} is a link to {target.readlink()}, which does not exist; expected a folder with "
                "the data, or nothing. Remove the link. To store the data in another place, move them there afterwards "
                "and link to them."
            )
        return False
    contents = scan_folder(spec, target)
    problems = contents.problems or check_counts(spec, contents.counts, accept_counts)
    if problems:
        raise UsageError(
            f"{spec.name}: {target} is there, but not as expected:{format_lines(problems)}\n"
            "Nothing was changed. Move this folder away to download it anew"
            + (", or accept it with --accept_counts." if not contents.problems else ".")
        )
    build = find_build(spec, contents.counts)
    print(f"{spec.name}: complete in {target}" + (f" (the build {build})" if build else "") + ", not changed")
    return True


def check_counts(spec: DatasetSpec, counts: tuple[int, ...], accept_counts: bool) -> list[str]:
    """Return the problem with the numbers of images, if any; with `accept_counts` only print it."""
    if find_build(spec, counts) is not None:
        return []
    text = f"got {counts} images in {', '.join(spec.domain_folders)}, {describe_counts(spec)}"
    if accept_counts:
        print(f"warning: {spec.name}: {text}", file=sys.stderr)
        return []
    return [text]


def install(spec: DatasetSpec, places: Places, mirror: str, archives: Mapping[str, Path], accept_counts: bool) -> None:
    """Fetch, unpack and check the images, and only then move them to the target."""
    print(f"{spec.name}\n  licence: {spec.licence or 'none stated'}\n  please cite: {spec.citation}")
    print(f"  homepage: {spec.homepage or 'none'}", flush=True)
    shutil.rmtree(places.partial, ignore_errors=True)  # of a killed process
    digests = read_digests(places.digests)
    places.downloads.mkdir(parents=True, exist_ok=True)
    files = {archive.name: fetch_archive(spec, archive, places, mirror, archives, digests) for archive in spec.archives}
    unpack_all(spec, places, files, archives.values())
    advice = f"The archives remain in {places.downloads}; remove them to fetch them again"
    try:
        root = arrange(spec, places.partial)
    except UsageError as error:
        raise UsageError(f"{error}\n{advice}.") from error
    contents = scan_folder(spec, root)
    if problems := contents.problems or check_counts(spec, contents.counts, accept_counts):
        raise UsageError(
            f"{spec.name}: the archives do not hold what was expected:{format_lines(problems)}\n{advice}"
            + (", or install what they hold with --accept_counts." if not contents.problems else ".")
        )
    for archive in spec.archives:
        if not archive.sha256 and archive.name not in digests:
            append_digest(places.digests, sha256_of(files[archive.name]), archive.name)
    if places.target.exists():
        places.target.rmdir()  # empty; Windows does not rename over it
    root.rename(places.target)
    build, count = find_build(spec, contents.counts), sum(contents.counts)
    print(f"{spec.name}: {count:,} images in {places.target}" + (f" (the build {build})" if build else ""))


def fetch_archive(
    spec: DatasetSpec,
    archive: Archive,
    places: Places,
    mirror: str,
    archives: Mapping[str, Path],
    digests: Mapping[str, str],
) -> Path:
    """Return the path of `archive`: fetched by hand, or downloaded from the first source that has it."""
    digest, hint = archive.sha256, ""
    if not digest:
        digest = digests.get(archive.name, "")
        hint = f" If its source is known to have changed, delete its line in {places.digests}."
    by_hand = archives.get(archive.name, places.downloads / archive.name)
    if by_hand.exists():
        try:
            fetch.check_content(by_hand, archive)
        except UsageError as error:
            raise UsageError(f"{by_hand}: {error}. Fetch it again.") from error
        if digest and (got := sha256_of(by_hand)) != digest:
            advice = f"{hint} Otherwise fetch it again." if hint else " Fetch it again."
            raise UsageError(f"{by_hand}: its SHA-256 is {got}, expected {digest}.{advice}")
        return by_hand
    sources = ([f"{mirror.rstrip('/')}/{archive.name}"] if mirror else []) + [*archive.sources]
    failures = []
    for source in sources:
        try:
            return fetch.fetch(source, archive, places.downloads, digest)
        except fetch.ERRORS as error:
            failures.append(f"{source}: {fetch.shorten(error)}")
            print(f"{spec.name}: {failures[-1]}", file=sys.stderr)
    raise UsageError(
        f"{spec.name}: no source has {archive.name}:{format_lines(failures)}\n"
        + (f"Its SHA-256 must be {digest}.{hint}\n" if digest else "")
        + f"Run again later: it goes on where it stopped. Or fetch it by hand and pass --archive PATH/{archive.name}, "
        f"or put it to {places.downloads / archive.name} (removed from there once it is unpacked)."
    )


def unpack_all(spec: DatasetSpec, places: Places, files: Mapping[str, Path], by_hand: Collection[Path]) -> None:
    """Unpack all archives into `places.partial`; a damaged one is removed, unless it was fetched by hand."""
    fetch.check_space(places.data_dir, sum(map(read_unpacked_size, files.values())))
    places.partial.mkdir()
    for archive in spec.archives:
        path = files[archive.name]
        if not fetch.is_packed(archive):
            shutil.copyfile(path, places.partial / archive.name)
            continue
        try:
            unpack(path, places.partial)
        except UsageError:
            if path not in (*by_hand, places.downloads / archive.name):
                path.unlink()
            raise


def arrange(spec: DatasetSpec, folder: Path) -> Path:
    """Arrange the unpacked files, and return the folder that holds the environments' folders and no others."""
    if spec.arrange is not None:
        spec.arrange(folder)
    root = find_root(folder, spec.domain_folders)
    if root is None:
        held = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
        raise UsageError(
            f"{spec.name}: no folder of the archives holds {', '.join(spec.domain_folders)}. "
            f"They hold:{format_lines(held or list_subfolders(folder))}"
        )
    for name in list_subfolders(root):
        if name not in spec.domain_folders:
            shutil.rmtree(root / name)
    return root


def read_digests(path: Path) -> dict[str, str]:
    """Return archive name -> SHA-256."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.split(maxsplit=1) for line in lines]
    # A line that a full disk cut short does no harm: its archive is taken for new.
    return {pair[1].lstrip("*"): pair[0].lower() for pair in pairs if len(pair) == 2 and len(pair[0]) == 64}


def append_digest(path: Path, digest: str, name: str) -> None:
    """Append a digest to the file, on a line of its own even after a line that was cut short."""
    cut = path.exists() and not path.read_text().endswith("\n")
    with open(path, "a") as file:
        file.write("\n" * cut + f"{digest}  {name}\n")

"""Read `domain/class/image` folders in the order of torchvision's ImageFolder."""

import hashlib
import io
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import UsageError

# torchvision.datasets.folder.IMG_EXTENSIONS; the same files in the same order give DomainBed's splits.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_LINES = 10
"""Number of problems that an error message lists."""


class FolderImages:
    """Images on disk, decoded at each access; an image that cannot be decoded is a `UsageError` with its path."""

    def __init__(self, paths: list[str], labels: np.ndarray) -> None:
        self.paths = paths
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image:
        # DEVIATION: DomainBed sets LOAD_TRUNCATED_IMAGES, which fills the missing part of a damaged file with grey.
        try:
            with Image.open(self.paths[i]) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{self.paths[i]}: cannot decode this image ({error}). Copy it again.") from error

    def fingerprint(self) -> str:
        """Return a digest of names, labels, sizes, and times of change; a copy of a folder has another digest."""
        # Modification times alone are not enough: files that are unpacked from different archives may have the same.
        digest = hashlib.sha256()
        root = os.path.commonpath(self.paths)
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            status = os.stat(path)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            line = f"{name}\n{label} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class FolderContents:
    """The contents of a data set's folder; `environments` has those of `spec.domain_folders` that can be read."""

    class_names: tuple[str, ...]
    environments: dict[str, FolderImages]
    problems: list[str]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.environments.values()))


def read_folder(spec: DatasetSpec, data_dir: Path) -> tuple[tuple[str, ...], list[FolderImages]]:
    """Return the class names, and the images of every environment with headers checked; errors as `find_images`."""
    root = data_dir / spec.folder
    contents = find_images(spec, root, headers=True)
    print_build(spec, root, contents.counts)
    return contents.class_names, list(contents.environments.values())


def find_images(spec: DatasetSpec, root: Path, *, headers: bool = False) -> FolderContents:
    """Find the image files in `root`, with `headers` also open them; `UsageError` lists everything that is wrong."""
    try:
        contents = scan_folder(spec, root)
    except OSError as error:
        raise UsageError(
            f"{spec.name}: cannot read {root}: {error.strerror}. "
            f"--data_dir is the folder that holds {spec.folder}/, which holds {', '.join(spec.domain_folders)}"
        ) from error
    paths = (path for images in contents.environments.values() for path in images.paths if headers)
    problems = contents.problems + [problem for path in paths if (problem := check_header(path))]
    if problems:
        raise UsageError(
            f"{spec.name} in {root} is not as expected:{format_lines(problems)}\n"
            "Move away what does not belong there and copy or download again what is missing."
        )
    return contents


def print_build(spec: DatasetSpec, folder: Path, counts: tuple[int, ...]) -> None:
    """Print to stderr the data set's build, if several are known, or a warning for counts of no known build."""
    build = find_build(spec, counts)
    if build is None:  # not warnings.warn, which may be an error: an unknown count is no reason to stop
        print(
            f"warning: {spec.name} in {folder} has {counts} images per environment, {describe_counts(spec)}",
            file=sys.stderr,
        )
    elif build:
        print(f"{spec.name} in {folder} is the build {build}", file=sys.stderr)


def scan_folder(spec: DatasetSpec, root: Path) -> FolderContents:
    """Return the contents of `root`, by names alone; `OSError` where it cannot be read."""
    domains = list_subfolders(root)
    problems = compare_names(f"environment folder of {root}", spec.domain_folders, domains)
    classes = {}
    for domain in [name for name in spec.domain_folders if name in domains]:
        try:
            classes[domain] = list_subfolders(root / domain)
        except OSError as error:
            problems.append(f"cannot read {root / domain}: {error.strerror}")
    # DEVIATION: DomainBed numbers the classes of each environment apart, so that a missing folder shifts its labels.
    names = spec.class_names or tuple(sorted(set().union(*classes.values())))
    if classes and len(names) != spec.num_classes:
        problems.append(f"got {len(names)} classes in all, expected {spec.num_classes}")

    environments = {}
    for domain, folders in classes.items():
        problems += compare_names(f"class folder of {root / domain}", names, folders)
        files = [(path, label) for label, name in enumerate(names) for path in list_images(root / domain / name)]
        labels = {label for _, label in files}
        empty = [name for label, name in enumerate(names) if name in folders and label not in labels]
        problems += [f"no images in {root / domain / name}" for name in empty]
        environments[domain] = FolderImages([path for path, _ in files], np.array([label for _, label in files], int))
    return FolderContents(names, environments, problems)


def find_build(spec: DatasetSpec, counts: tuple[int, ...]) -> str | None:
    """Return the name of the build with these counts; "" for the only known build, None for no known build."""
    return next((name for name, known in spec.builds.items() if counts == known), None if spec.builds else "")


def describe_counts(spec: DatasetSpec) -> str:
    """Return the expected numbers of images in words, for a message."""
    known = [f"{counts}" + (f" (the build {name})" if name else "") for name, counts in spec.builds.items()]
    return f"expected {' or '.join(known)}; published results are of {'one of these' if len(known) > 1 else 'these'}"


def format_lines(problems: list[str]) -> str:
    """Return one indented line for each of the first `MAX_LINES` problems, and the number of the others."""
    more = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
    return "".join(f"\n  {line}" for line in [*problems[:MAX_LINES], *more])


def compare_names(kind: str, expected: Collection[str], actual: Collection[str]) -> list[str]:
    """Return one line for every missing and every unexpected name."""
    return [f"missing {kind}: {name}" for name in expected if name not in actual] + [
        f"unexpected {kind}: {name}" for name in actual if name not in expected
    ]


def is_ignored(name: str) -> bool:
    """Return whether a name is hidden, or litter of archive programs."""
    return name.startswith(".") or name == "__MACOSX"


def list_subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_ignored(entry.name))


def list_images(folder: Path) -> Iterator[str]:
    """Yield the paths of the images under `folder` in ImageFolder's order; all other files are ignored."""
    for parent, _, files in sorted(os.walk(folder, followlinks=True)):
        if any(map(is_ignored, Path(parent).relative_to(folder).parts)):
            continue
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not is_ignored(name):
                yield os.path.join(parent, name)


def check_header(path: str) -> str | None:
    """Return the problem with the header of an image file, None where there is none."""
    try:
        with Image.open(path):
            return None
    except UnidentifiedImageError:
        return f"not an image: {path}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot read {path}: {error}"


def decode_image(data: bytes) -> tuple[Image.Image | None, str]:
    """Return (RGB image, "") from the bytes of a file, or (None, the reason why they cannot be decoded)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB"), ""
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message holds an address in memory
        return None, "not an image"
    except Exception as error:  # damaged files make decoders raise almost anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def find_root(folder: Path, names: Collection[str]) -> Path | None:
    """Return the shallowest folder, `folder` itself included, that holds a folder of every name."""
    level = [folder]
    while level:
        for candidate in level:
            if set(names) <= set(list_subfolders(candidate)):
                return candidate
        level = [candidate / name for candidate in level for name in list_subfolders(candidate)]
    return None

"""Reads `domain/class/image` folders, in the order in which torchvision's ImageFolder does."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import UsageError

# torchvision.datasets.folder.IMG_EXTENSIONS; the same files in the same order give DomainBed's splits.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_LISTED = 10


class FolderImages:
    """Images on disk, decoded at each access; an image that cannot be is a `UsageError` that names its path."""

    def __init__(self, paths: list[str], labels: np.ndarray) -> None:
        self.paths = paths
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image:
        # DEVIATION: DomainBed sets LOAD_TRUNCATED_IMAGES, which fills what is missing of a damaged file with grey.
        try:
            with Image.open(self.paths[i]) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{self.paths[i]}: cannot decode this image ({error}). Copy it again.") from error

    def fingerprint(self) -> str:
        """Of names, sizes, and when contents and inodes changed, so that a copy is another folder.

        Times of modification alone are what archives say: two folders unpacked from different ones may share them.
        """
        found = hashlib.sha256()
        root = os.path.commonpath(self.paths)
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            status = os.stat(path)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            found.update(
                f"{name}\n{label} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode(
                    errors="surrogateescape"
                )
            )
        return found.hexdigest()


@dataclass(frozen=True)
class Found:
    """What lies in a data set's folder; `environments` are those of `spec.domain_folders` that can be read."""

    class_names: tuple[str, ...]
    environments: dict[str, FolderImages]
    problems: list[str]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.environments.values()))


def read_folder(spec: DatasetSpec, data_dir: Path) -> tuple[tuple[str, ...], list[FolderImages]]:
    """Class names and one `FolderImages` per environment; `UsageError` lists everything that is wrong.

    Reads names and image headers, decodes nothing.
    """
    root = data_dir / spec.folder
    found = find_images(spec, root, headers=True)
    say_build(spec, root, found.counts)
    return found.class_names, list(found.environments.values())


def find_images(spec: DatasetSpec, root: Path, *, headers: bool = False) -> Found:
    """The image files in `root`, by their names and, with `headers`, what they begin with.

    `UsageError` lists everything that is wrong.
    """
    try:
        found = look(spec, root)
    except OSError as error:
        raise UsageError(
            f"{spec.name}: cannot read {root}: {error.strerror}. "
            f"--data_dir is the folder that holds {spec.folder}/, which holds {', '.join(spec.domain_folders)}"
        ) from error
    paths = (path for images in found.environments.values() for path in images.paths if headers)
    problems = found.problems + [problem for path in paths if (problem := header_problem(path))]
    if problems:
        raise UsageError(
            f"{spec.name} in {root} is not as expected:{listed(problems)}\n"
            "Move away what does not belong there and copy or download again what is missing."
        )
    return found


def say_build(spec: DatasetSpec, where: Path, counts: tuple[int, ...]) -> None:
    """A line on stderr where several builds are known, or the images per environment are of none."""
    build = build_of(spec, counts)
    if build is None:
        # Not warnings.warn: a count that differs is no reason to stop where warnings are errors.
        print(
            f"warning: {spec.name} in {where} has {counts} images per environment, {expected_counts(spec)}",
            file=sys.stderr,
        )
    elif build:
        print(f"{spec.name} in {where} is the build {build}", file=sys.stderr)


def look(spec: DatasetSpec, root: Path) -> Found:
    """What lies in `root`, by names alone; `OSError` where it cannot be read."""
    found = subfolders(root)
    problems = differences(f"environment folder of {root}", spec.domain_folders, found)
    classes = {}
    for domain in [name for name in spec.domain_folders if name in found]:
        try:
            classes[domain] = subfolders(root / domain)
        except OSError as error:
            problems.append(f"cannot read {root / domain}: {error.strerror}")
    # DEVIATION: DomainBed numbers the classes of each environment by itself; a missing folder shifts its labels.
    names = spec.class_names or tuple(sorted(set().union(*classes.values())))
    if classes and len(names) != spec.num_classes:
        problems.append(f"found {len(names)} classes in all, expected {spec.num_classes}")

    environments = {}
    for domain, folders in classes.items():
        problems += differences(f"class folder of {root / domain}", names, folders)
        files = [(path, label) for label, name in enumerate(names) for path in images(root / domain / name)]
        filled = {label for _, label in files}
        problems += [
            f"no images in {root / domain / name}"
            for label, name in enumerate(names)
            if name in folders and label not in filled
        ]
        environments[domain] = FolderImages([path for path, _ in files], np.array([label for _, label in files], int))
    return Found(names, environments, problems)


def build_of(spec: DatasetSpec, counts: tuple[int, ...]) -> str | None:
    """The name of the build with so many images per environment; empty: the only one; None: no known one."""
    return next((name for name, known in spec.builds.items() if counts == known), None if spec.builds else "")


def expected_counts(spec: DatasetSpec) -> str:
    """What to say where the images per environment are of no known build."""
    known = [f"{counts}" + (f" (the build {name})" if name else "") for name, counts in spec.builds.items()]
    return f"expected {' or '.join(known)}; published results are of {'one of these' if len(known) > 1 else 'these'}"


def listed(problems: list[str]) -> str:
    """One line per problem, the first `MAX_LISTED` of them."""
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "".join(f"\n  {line}" for line in [*problems[:MAX_LISTED], *more])


def differences(what: str, expected: tuple[str, ...], found: list[str]) -> list[str]:
    """One line per missing and per unexpected folder."""
    return [f"missing {what}: {name}" for name in expected if name not in found] + [
        f"unexpected {what}: {name}" for name in found if name not in expected
    ]


def ignored(name: str) -> bool:
    """Whether `name` is hidden or litter of an archive program."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not ignored(entry.name))


def images(folder: Path) -> Iterator[str]:
    """Paths of the images under `folder` in ImageFolder's order; anything else is ignored."""
    for parent, _, files in sorted(os.walk(folder, followlinks=True)):
        if any(map(ignored, Path(parent).relative_to(folder).parts)):
            continue
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not ignored(name):
                yield os.path.join(parent, name)


def header_problem(path: str) -> str | None:
    """What is wrong with the header of an image file, if anything."""
    try:
        with Image.open(path):
            return None
    except UnidentifiedImageError:
        return f"not an image: {path}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot read {path}: {error}"


def find_root(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The shallowest folder, `folder` itself included, that holds a folder of each name."""
    level = [folder]
    while level:
        for candidate in level:
            if set(names) <= set(subfolders(candidate)):
                return candidate
        level = [candidate / name for candidate in level for name in subfolders(candidate)]
    return None

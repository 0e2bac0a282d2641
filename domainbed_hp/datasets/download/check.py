"""Check a data set on disk to the last byte: its folders, how many images, which cannot be decoded, which are twice."""

import hashlib
import io
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tabulate import tabulate
from tqdm import tqdm

from domainbed_hp.datasets.folder import find_build, scan_folder
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.files import cpu_count
from domainbed_hp.registry import UsageError


@dataclass(frozen=True)
class Report:
    """What `check` found; paths are relative to `folder`."""

    dataset: str
    folder: str
    build: str | None
    """Empty: the only one; None: the counts are of no known build."""
    problems: list[str]
    counts: dict[str, dict[str, int]]
    """Environment folder -> class -> images."""
    expected: dict[str, int]
    """Environment folder -> images of this build; where it is no known one, of the spec's own."""
    undecodable: dict[str, str]
    """Path -> reason."""
    duplicates: list[list[str]]
    """Paths of equal files, where they are in more than one environment."""

    @property
    def ok(self) -> bool:
        """Duplicates do not count: where all else is right they are part of the benchmark as published, and without
        them neither its splits nor its results would be the published ones."""
        return self.build is not None and not self.problems and not self.undecodable

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}

    def text(self) -> str:
        """For a person: a table of images per class and environment, then one line per finding."""
        classes = sorted(set().union(*self.counts.values()))
        rows: list[list[Any]] = [[name, *(per.get(name, 0) for per in self.counts.values())] for name in classes]
        rows.append(["all", *(sum(per.values()) for per in self.counts.values())])
        if self.expected:
            rows.append(["expected", *(self.expected.get(name) for name in self.counts)])
        lines = [f"{self.dataset} in {self.folder}", tabulate(rows, headers=["class", *self.counts]), ""]
        lines += self.problems
        if self.build is None:
            lines.append("the numbers of images are of no known build")
        elif self.build:
            lines.append(f"the numbers of images are of the build {self.build}")
        lines += [f"cannot be decoded: {path}: {reason}" for path, reason in self.undecodable.items()]
        if self.duplicates:
            lines.append(f"{len(self.duplicates)} images are in more than one environment:")
            lines += [f"  {' = '.join(paths)}" for paths in self.duplicates]
        return "\n".join([*lines, f"{self.dataset}: {'right' if self.ok else 'WRONG'}"])


def check(spec: DatasetSpec, data_dir: Path, num_workers: int | None = None) -> Report:
    """Read, decode and compare every image of `spec` in `data_dir`; on all cores, where `num_workers` is not given."""
    root = data_dir / spec.folder
    try:
        found = scan_folder(spec, root)
    except OSError as error:
        raise UsageError(f"{spec.name}: cannot read {root}: {error.strerror}. Download it first.") from error
    undecodable: dict[str, str] = {}
    same: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    files = [(domain, path) for domain, images in found.environments.items() for path in images.paths]
    with ThreadPool(cpu_count() if num_workers is None else num_workers) as workers:
        results = workers.map(read, (path for _, path in files))
        for (domain, path), (digest, reason) in zip(
            files, tqdm(results, f"check {spec.name}", len(files), unit="image", disable=None), strict=True
        ):
            name = Path(path).relative_to(root).as_posix()
            same[digest].append((domain, name))
            if reason:
                undecodable[name] = reason
    build = find_build(spec, found.counts)
    expected = spec.builds.get(build or "", spec.image_counts)
    return Report(
        spec.name,
        str(root),
        build,
        found.problems,
        {
            domain: {found.class_names[label]: n for label, n in sorted(Counter(images.labels.tolist()).items())}
            for domain, images in found.environments.items()
        },
        dict(zip(spec.domain_folders, expected, strict=True)) if expected else {},
        undecodable,
        [[name for _, name in group] for group in same.values() if len({domain for domain, _ in group}) > 1],
    )


def read(path: str) -> tuple[bytes, str]:
    """SHA-256 of a file, and why it cannot be decoded, if it cannot."""
    try:
        data = Path(path).read_bytes()
        digest = hashlib.sha256(data).digest()
    except OSError as error:
        return path.encode(), str(error)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
        return digest, ""
    except UnidentifiedImageError:
        return digest, "not an image"
    except Exception as error:  # damaged files make Pillow raise almost anything
        return digest, " ".join(str(error).split()) or type(error).__name__

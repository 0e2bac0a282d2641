"""Check a data set on disk to the last byte: folders, numbers of images, damaged images, and duplicates."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from domainbed_hp.datasets.folder import decode_image, find_build, scan_folder
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.files import cpu_count
from domainbed_hp.registry import UsageError


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`; paths are relative to `folder`."""

    dataset: str
    folder: str
    build: str | None
    """Name of the build; "" for the only build, None where the counts are of no known build."""
    problems: list[str]
    counts: dict[str, dict[str, int]]
    """Environment folder -> class -> images."""
    expected: dict[str, int]
    """Environment folder -> images of this build, or of the spec's own if it is no known build."""
    undecodable: dict[str, str]
    """Path -> reason."""
    duplicates: list[list[str]]
    """Paths of equal files that are in more than one environment."""

    @property
    def ok(self) -> bool:
        # Duplicates do not count: they are part of the published benchmark, its splits and its results.
        return self.build is not None and not self.problems and not self.undecodable

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}

    def to_text(self) -> str:
        """Return a table of images per class and environment, and a line for everything that is wrong."""
        classes = sorted(set().union(*self.counts.values()))
        rows: list[list[Any]] = [[name, *(per.get(name, 0) for per in self.counts.values())] for name in classes]
        rows.append(["all", *(sum(per.values()) for per in self.counts.values())])
        if self.expected:
            rows.append(["expected", *(self.expected.get(name) for name in self.counts)])
        lines = [f"{self.dataset} in {self.folder}", tabulate(rows, headers=["class", *self.counts]), ""]
        lines += self.problems
        if self.build is None:
            lines.append("the numbers of images match no known build")
        elif self.build:
            lines.append(f"the numbers of images are of the build {self.build}")
        lines += [f"cannot be decoded: {path}: {reason}" for path, reason in self.undecodable.items()]
        if self.duplicates:
            lines.append(f"{len(self.duplicates)} images are in more than one environment:")
            lines += [f"  {' = '.join(paths)}" for paths in self.duplicates]
        return "\n".join([*lines, f"{self.dataset}: {'right' if self.ok else 'WRONG'}"])


def check(spec: DatasetSpec, data_dir: Path, num_workers: int | None = None) -> CheckResult:
    """Read, decode and compare every image of `spec` in `data_dir`, by default with one thread for every core."""
    root = data_dir / spec.folder
    try:
        contents = scan_folder(spec, root)
    except OSError as error:
        raise UsageError(f"{spec.name}: cannot read {root}: {error.strerror}. Download it first.") from error
    undecodable: dict[str, str] = {}
    files_of: dict[bytes, list[tuple[str, str]]] = defaultdict(list)  # digest -> environment folder and path
    files = [(domain, path) for domain, images in contents.environments.items() for path in images.paths]
    with ThreadPool(cpu_count() if num_workers is None else num_workers) as threads:
        results = threads.map(check_image, (path for _, path in files))
        for (domain, path), (digest, reason) in zip(
            files, tqdm(results, f"check {spec.name}", len(files), unit="image", disable=None), strict=True
        ):
            name = Path(path).relative_to(root).as_posix()
            files_of[digest].append((domain, name))
            if reason:
                undecodable[name] = reason
    build = find_build(spec, contents.counts)
    expected = spec.builds.get(build or "", spec.image_counts)
    return CheckResult(
        spec.name,
        str(root),
        build,
        contents.problems,
        {
            domain: {contents.class_names[label]: n for label, n in sorted(Counter(images.labels.tolist()).items())}
            for domain, images in contents.environments.items()
        },
        dict(zip(spec.domain_folders, expected, strict=True)) if expected else {},
        undecodable,
        [[name for _, name in group] for group in files_of.values() if len({domain for domain, _ in group}) > 1],
    )


def check_image(path: str) -> tuple[bytes, str]:
    """Return the SHA-256 of a file, and the reason why it cannot be decoded, "" where it can."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return path.encode(errors="surrogateescape"), str(error)
    return hashlib.sha256(data).digest(), decode_image(data)[1]

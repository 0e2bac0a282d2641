"""Opening a data set: what its spec promises, prepared, found on disk, or made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_hp.datasets.folder import read_folder, subfolders
from domainbed_hp.datasets.loading.transforms import Decoded, Views
from domainbed_hp.datasets.prepared.reader import open_prepared
from domainbed_hp.datasets.spec import DatasetSpec
from domainbed_hp.registry import DATASETS, UsageError, load

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

FOLDER = "folder:"


@dataclass(frozen=True)
class Dataset:
    """An opened data set: `environments[i]` are the images of environment i, `source` says where they come from."""

    spec: DatasetSpec
    class_names: tuple[str, ...]
    environments: list[Views]
    source: str


def find_spec(name: str, data_dir: str | Path | None = None) -> DatasetSpec:
    """The spec registered as `name`; `folder:PATH` is a folder of the user's own, absolute or under `data_dir`.

    Its sub-folders are the environments, theirs the classes. Whether all have the same ones shows when it is opened.
    """
    if not name.startswith(FOLDER):
        spec: DatasetSpec = load(DATASETS, "dataset", name)
        return spec
    root = Path(data_dir or ".") / name.removeprefix(FOLDER)
    try:
        environments = tuple(subfolders(root))
        classes = {environment: subfolders(root / environment) for environment in environments}
    except OSError as error:
        raise UsageError(f"{name}: cannot read {root}: {error.strerror}") from error
    names = tuple(sorted(set().union(*classes.values())))
    if len(environments) < 2 or len(names) < 2:
        raise UsageError(
            f"{name}: {root} has {len(environments)} environment folders and {len(names)} classes; expected at least "
            "2 of each, as <environment>/<class>/<image>"
        )
    return DatasetSpec(name, environments, len(names), names, folder=str(root.absolute()), domain_folders=environments)


def open_dataset(spec: DatasetSpec, data_dir: Path | None, preprocess: Preprocess) -> Dataset:
    """The images of every environment as `pixels` wants them; `UsageError` lists everything that is wrong.

    Prepared data is used where there is any.
    """
    if spec.build is not None:
        names = spec.class_names or tuple(str(i) for i in range(spec.num_classes))
        return Dataset(spec, names, [Decoded(images, preprocess) for images in spec.build()], "made")
    if data_dir is None and not Path(spec.folder).is_absolute():
        raise UsageError(f"{spec.name} is read from disk: pass --data_dir, the folder that holds {spec.folder}/")
    data_dir = data_dir or Path()
    prepared = open_prepared(spec, data_dir, preprocess)
    if prepared is not None:
        return Dataset(spec, prepared.class_names, [*prepared.environments], f"prepared, {prepared.encoding}")
    names, folders = read_folder(spec, data_dir)
    return Dataset(spec, names, [Decoded(images, preprocess) for images in folders], "image files")

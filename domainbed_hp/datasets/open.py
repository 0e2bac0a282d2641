"""Open a data set: prepared images, image files, or images that are made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_hp.datasets.folder import list_subfolders, read_folder
from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.prepared.reader import open_prepared
from domainbed_hp.datasets.spec import Dataset, DatasetSpec
from domainbed_hp.registry import DATASETS, UsageError, load

if TYPE_CHECKING:
    from domainbed_hp.networks.preprocess import Preprocess

FOLDER = "folder:"


def find_spec(name: str, data_dir: str | Path | None = None) -> DatasetSpec:
    """Return the spec registered as `name`, or that of the user's `folder:PATH`, absolute or under `data_dir`.

    Its sub-folders are the environments, and theirs are the classes. `open_dataset` compares the classes.
    """
    if not name.startswith(FOLDER):
        spec: DatasetSpec = load(DATASETS, "dataset", name)
        return spec
    root = Path(data_dir or ".") / name.removeprefix(FOLDER)
    try:
        environments = tuple(list_subfolders(root))
        classes = {environment: list_subfolders(root / environment) for environment in environments}
    except OSError as error:
        raise UsageError(f"{name}: cannot read {root}: {error.strerror}. Check the PATH of folder:PATH") from error
    names = tuple(sorted(set().union(*classes.values())))
    if len(environments) < 2 or len(names) < 2:
        raise UsageError(
            f"{name}: {root} has {len(environments)} environment folders and {len(names)} classes; expected at least "
            "2 of each, as <environment>/<class>/<image>"
        )
    return DatasetSpec(name, environments, len(names), names, folder=str(root.absolute()), domain_folders=environments)


def open_dataset(spec: DatasetSpec, data_dir: Path | None, preprocess: Preprocess) -> Dataset:
    """Open a data set with images for `preprocess`, prepared ones if there are; `UsageError` lists all problems."""
    if spec.build is not None:
        names = spec.class_names or tuple(str(i) for i in range(spec.num_classes))
        return Dataset(spec, names, [DecodedViews(images, preprocess) for images in spec.build()], "made")
    if data_dir is None and not Path(spec.folder).is_absolute():
        raise UsageError(f"{spec.name} is read from disk: pass --data_dir, the folder that holds {spec.folder}/")
    data_dir = data_dir or Path()
    if prepared := open_prepared(spec, data_dir, preprocess):
        return prepared
    names, folders = read_folder(spec, data_dir)
    return Dataset(spec, names, [DecodedViews(images, preprocess) for images in folders], "image files")

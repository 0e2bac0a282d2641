"""Opening a data set: what its spec promises, found on disk or made."""

from dataclasses import dataclass
from pathlib import Path

from domainbed_hp.datasets.folder import read_folder
from domainbed_hp.datasets.spec import DatasetSpec, Images
from domainbed_hp.registry import UsageError


@dataclass(frozen=True)
class Dataset:
    """An opened data set: `environments[i]` are the raw images of environment i."""

    spec: DatasetSpec
    class_names: tuple[str, ...]
    environments: list[Images]


def open_dataset(spec: DatasetSpec, data_dir: Path | None) -> Dataset:
    """The images of every environment; `UsageError` lists everything that is wrong with the folder."""
    if spec.build is not None:
        names = spec.class_names or tuple(str(i) for i in range(spec.num_classes))
        return Dataset(spec, names, spec.build())
    if data_dir is None:
        raise UsageError(f"{spec.name} is read from disk: pass --data_dir, the folder that holds {spec.folder}/")
    names, environments = read_folder(spec, data_dir)
    return Dataset(spec, names, [*environments])

"""Archives of a few drawn images in the layout of the real ones, and specs that expect them.

Each maker writes the archives of one data set to `folder` and returns its spec with their URLs under `url`.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from pets import SPEC as PETS
from PIL import Image

from domainbed_hp.datasets.domain_net import DOMAIN_NET, DUPLICATES
from domainbed_hp.datasets.office_home import OFFICE_HOME
from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.datasets.spec import Archive, DatasetSpec
from domainbed_hp.datasets.terra_incognita import ANNOTATIONS, CLASSES, TERRA_INCOGNITA
from domainbed_hp.datasets.vlcs import VLCS

LITTER = {"__MACOSX/._x.jpg": b"litter", ".DS_Store": b"litter"}


def picture(name: str, size: tuple[int, int] = (48, 40)) -> bytes:
    """An encoded image whose pixels follow from `name`, whose ending says how it is encoded."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "PNG" if name.endswith(".png") else "JPEG")
    return file.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def per_class(
    domains: tuple[str, ...], classes: tuple[str, ...], top: str = "", ending: str = "jpg"
) -> dict[str, bytes]:
    """3 images of each class in the first domain, 2 in the others."""
    names = [
        f"{top}{domain}/{label}/{i:05}.{ending}"
        for d, domain in enumerate(domains)
        for label in classes
        for i in range(3 if d == 0 else 2)
    ]
    return {name: picture(name) for name in names}


def small(spec: DatasetSpec, folder: Path, url: str, counts: tuple[int, ...]) -> DatasetSpec:
    """`spec` of the archives in `folder`, which must have their real names."""
    archives = tuple(
        replace(a, sources=(f"{url}/{a.name}",), sha256=sha256(folder / a.name) if a.sha256 else "")
        for a in spec.archives
    )
    return replace(spec, archives=archives, image_counts=counts, build_name="", other_builds={})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pacs(folder: Path, url: str) -> DatasetSpec:
    assert PACS.class_names
    write_zip(folder / "PACS.zip", per_class(PACS.domain_folders, PACS.class_names, "kfold/") | LITTER)
    return small(PACS, folder, url, (21, 14, 14, 14))


def vlcs(folder: Path, url: str) -> DatasetSpec:
    assert VLCS.class_names
    write_tar(folder / "VLCS.tar.gz", per_class(VLCS.domain_folders, VLCS.class_names, "VLCS/") | LITTER)
    return small(VLCS, folder, url, (15, 10, 10, 10))


def office_home(folder: Path, url: str) -> DatasetSpec:
    top = "OfficeHomeDataset_10072016/"
    classes = tuple(f"Thing_{i:02}" for i in range(65))
    files = per_class(OFFICE_HOME.domain_folders, classes, top) | {f"{top}ImageInfo.csv": b"a,b\n", **LITTER}
    write_zip(folder / "OfficeHomeDataset_10072016.zip", files)
    return small(OFFICE_HOME, folder, url, (195, 130, 130, 130))


def terra_incognita(folder: Path, url: str) -> DatasetSpec:
    """Two images per location and class; one is also a second thing, one is elsewhere, one is a thing unknown here."""
    labels = [*CLASSES, "deer"]
    images, annotations, files = [], [], {}
    places = [(where, label) for where in (100, 38, 43, 46) for label in CLASSES for _ in range(2)]
    for i, (where, label) in enumerate([*places, (7, "bird"), (38, "deer")]):
        images.append({"id": f"i{i}", "file_name": f"i{i}.jpg", "location": where})
        annotations += [{"id": f"a{i}", "image_id": f"i{i}", "category_id": labels.index(label)}]
        files[f"eccv_18_all_images_sm/i{i}.jpg"] = picture(f"i{i}.jpg")
    annotations += [{"id": "again", "image_id": "i0", "category_id": 0}]  # two boxes of one bird
    annotations += [{"id": "too", "image_id": "i0", "category_id": 2}]
    categories = [{"id": i, "name": label} for i, label in enumerate(labels)]
    part = -(-len(annotations) // len(ANNOTATIONS))
    notes = {}
    for k, name in enumerate(ANNOTATIONS):
        chosen = annotations[k * part : (k + 1) * part]
        ids = {annotation["image_id"] for annotation in chosen}
        content = {
            "images": [image for image in images if image["id"] in ids],
            "annotations": chosen,
            "categories": categories,
            "info": {},
        }
        notes[f"eccv_18_annotation_files/{name}"] = json.dumps(content).encode()
    write_tar(folder / "eccv_18_all_images_sm.tar.gz", files)
    write_tar(folder / "eccv_18_annotations.tar.gz", notes)
    return small(TERRA_INCOGNITA, folder, url, (21, 20, 20, 20))


def domain_net(folder: Path, url: str) -> DatasetSpec:
    """Three classes of the 345, and one duplicate in each style but quickdraw."""
    classes = ("aircraft_carrier", "zebra", "zigzag")
    duplicates = []
    for domain in DOMAIN_NET.domain_folders:
        files = per_class((domain,), classes, ending="png" if domain == "quickdraw" else "jpg")
        if domain != "quickdraw":
            duplicates.append(f"{domain}/zebra/{domain}_002.jpg")
            files[duplicates[-1]] = files[f"{domain}/zebra/00000.jpg"]
        write_zip(folder / f"{domain}.zip", files)
    (folder / DUPLICATES).write_text("".join(f"{line}\n" for line in duplicates))
    return replace(small(DOMAIN_NET, folder, url, (9,) * 6), num_classes=3)


MAKERS = {
    "PACS": pacs,
    "VLCS": vlcs,
    "OfficeHome": office_home,
    "TerraIncognita": terra_incognita,
    "DomainNet": domain_net,
}


def pets(folder: Path, url: str, images: int = 4, size: tuple[int, int] = (48, 40)) -> DatasetSpec:
    """A set of two environments and two classes, of no fame: `images` per class."""
    names = [f"Pets-1.0/{d}/{c}/{i}.jpg" for d in ("art", "book") for c in ("cat", "dog") for i in range(images)]
    with zipfile.ZipFile(folder / "pets.zip", "w") as archive:
        for name in names:
            archive.writestr(name, picture(name, size))
    counts = Counter(name.split("/")[1] for name in names)
    return replace(
        PETS,
        domain_folders=("art", "book"),
        image_counts=(counts["art"], counts["book"]),
        licence="CC0",
        citation="Nobody. Pets. 2020",
        homepage="https://example.org/pets",
        archives=(Archive("pets.zip", (f"{url}/pets.zip",)),),
    )

"""TerraIncognita: camera traps at four places, ten classes, 24,330 images."""

import json
import os
import shutil
from pathlib import Path

from domainbed_hp.datasets.spec import Archive, DatasetSpec
from domainbed_hp.registry import UsageError

SERVER = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"
IMAGES = "eccv_18_all_images_sm"
ANNOTATIONS = tuple(f"{part}_annotations.json" for part in ("cis_test", "cis_val", "train", "trans_test", "trans_val"))
DOMAINS = ("location_100", "location_38", "location_43", "location_46")
CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")


def sort_images(folder: Path) -> None:
    """Move the images of the four locations and ten classes to `location_<L>/<class>/`, and remove the rest.

    An image with two of the classes goes to both, as in DomainBed.
    """
    annotations = {path.name: path for path in sorted(folder.rglob("*.json")) if path.name in ANNOTATIONS}
    sources = [path for path in [folder / IMAGES, *sorted(folder.glob(f"*/{IMAGES}"))] if path.is_dir()]
    missing = [name for name in ANNOTATIONS if name not in annotations] + ([] if sources else [IMAGES])
    if missing:
        names = sorted(str(path.relative_to(folder)) for path in [*folder.glob("*"), *folder.rglob("*.json")])
        raise UsageError(f"TerraIncognita: the archives lack {', '.join(missing)}. They hold {', '.join(names)}")

    places: dict[str, set[str]] = {}  # file name -> location/class
    for name in ANNOTATIONS:
        try:
            data = json.loads(annotations[name].read_text(encoding="utf-8"))
            classes = {category["id"]: category["name"] for category in data["categories"]}
            images = {image["id"]: image for image in data["images"]}
            for annotation in data["annotations"]:
                image, label = images[annotation["image_id"]], classes[annotation["category_id"]]
                domain = f"location_{image['location']}"
                if label in CLASSES and domain in DOMAINS:
                    places.setdefault(image["file_name"], set()).add(f"{domain}/{label}")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"TerraIncognita: {name} is not in COCO's annotation format: {error!r}") from error

    absent = 0
    for file_name, folders in places.items():
        source = sources[0] / Path(file_name).name  # the name alone: an annotation must not lead out of the folder
        if not source.exists():
            absent += 1
            continue
        *others, last = [folder / place / source.name for place in sorted(folders)]
        for target in [*others, last]:
            target.parent.mkdir(parents=True, exist_ok=True)
        for target in others:
            shutil.copyfile(source, target)
        os.replace(source, last)
    if absent:
        print(f"TerraIncognita: {absent:,} annotated images were not in the archive")
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("location_"):
            shutil.rmtree(path)


TERRA_INCOGNITA = DatasetSpec(
    name="TerraIncognita",
    environments=("L100", "L38", "L43", "L46"),
    num_classes=10,
    class_names=CLASSES,
    folder="terra_incognita",
    domain_folders=DOMAINS,
    image_counts=(4741, 9736, 3970, 5883),
    build_name="of 2021",
    # The archive before 2021: most published tables are of these 24,788 images.
    other_builds={"of 2020": (4879, 9767, 4020, 6122)},
    licence="Community Data License Agreement, permissive variant (CDLA-Permissive-1.0)",
    citation="Beery, Van Horn, Perona. Recognition in Terra Incognita. ECCV 2018",
    homepage="https://lila.science/datasets/caltech-camera-traps",
    archives=(
        Archive("eccv_18_all_images_sm.tar.gz", (f"{SERVER}/eccv_18_all_images_sm.tar.gz",)),
        Archive("eccv_18_annotations.tar.gz", (f"{SERVER}/eccv_18_annotations.tar.gz",)),
    ),
    arrange=sort_images,
)

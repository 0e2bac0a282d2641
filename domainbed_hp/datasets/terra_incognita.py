"""TerraIncognita: camera traps at four places, ten classes, 24,330 images."""

from domainbed_hp.datasets.spec import DatasetSpec

TERRA_INCOGNITA = DatasetSpec(
    name="TerraIncognita",
    environments=("L100", "L38", "L43", "L46"),
    num_classes=10,
    class_names=("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
    folder="terra_incognita",
    domain_folders=("location_100", "location_38", "location_43", "location_46"),
    # Of the archive as served since 2021. Tables published before count 4,879 + 9,767 + 4,020 + 6,122 = 24,788.
    image_counts=(4741, 9736, 3970, 5883),
    licence="Community Data License Agreement, permissive variant (CDLA-Permissive-1.0)",
    citation="Beery, Van Horn, Perona. Recognition in Terra Incognita. ECCV 2018",
    homepage="https://lila.science/datasets/caltech-camera-traps",
)

"""PACS: four styles of seven kinds of things, 9,991 images."""

from domainbed_hp.datasets.spec import DatasetSpec

PACS = DatasetSpec(
    name="PACS",
    environments=("A", "C", "P", "S"),
    num_classes=7,
    class_names=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    folder="PACS",
    domain_folders=("art_painting", "cartoon", "photo", "sketch"),
    image_counts=(2048, 2344, 1670, 3929),
    citation="Li, Yang, Song, Hospedales. Deeper, Broader and Artier Domain Generalization. ICCV 2017",
    homepage="https://domaingeneralization.github.io/",
)

"""PACS: four styles of seven kinds of things, 9,991 images."""

from domainbed_hp.datasets.spec import Archive, DatasetSpec

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
    licence="none stated; for research",
    archives=(
        Archive(
            "PACS.zip",
            ("gdrive:1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "gdrive:1WWi9tuUNFmUiw7Eirq_JT_hxYZv3J-Vv"),
        ),
    ),
)

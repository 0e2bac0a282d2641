"""VLCS: five classes that four photo collections share, 10,729 images."""

from domainbed_hp.datasets.spec import Archive, DatasetSpec

VLCS = DatasetSpec(
    name="VLCS",
    environments=("C", "L", "S", "V"),
    num_classes=5,
    class_names=("bird", "car", "chair", "dog", "person"),
    folder="VLCS",
    domain_folders=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
    image_counts=(1415, 2656, 3282, 3376),
    citation="Fang, Xu, Rockmore. Unbiased Metric Learning: On the Utilization of Multiple Datasets and Web Images "
    "for Softening Bias. ICCV 2013",
    homepage="https://github.com/facebookresearch/DomainBed",  # whose authors made this build; it has none of its own
    licence="none stated; each of the four collections has its own terms; for research",
    archives=(
        Archive(
            "VLCS.tar.gz",
            ("gdrive:1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "gdrive:1yDuLrJdPSvMbTmpq-7XmwG0HnJengD-T"),
        ),
    ),
)

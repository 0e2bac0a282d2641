"""VLCS: five classes that four photo collections share, 10,729 images."""

from domainbed_hp.datasets.spec import DatasetSpec

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
)

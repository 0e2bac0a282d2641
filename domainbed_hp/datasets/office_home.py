"""OfficeHome: 65 everyday objects in four styles, 15,588 images."""

from domainbed_hp.datasets.spec import Archive, DatasetSpec

OFFICE_HOME = DatasetSpec(
    name="OfficeHome",
    environments=("A", "C", "P", "R"),
    num_classes=65,
    folder="office_home",
    domain_folders=("Art", "Clipart", "Product", "Real World"),
    image_counts=(2427, 4365, 4439, 4357),
    citation="Venkateswara, Eusebio, Chakraborty, Panchanathan. Deep Hashing Network for Unsupervised Domain "
    "Adaptation. CVPR 2017",
    homepage="https://www.hemanthdv.org/officeHomeDataset.html",
    licence="none; images of others, under fair use, for non-commercial research and education (see homepage)",
    archives=(
        Archive(
            "OfficeHomeDataset_10072016.zip",
            ("gdrive:1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "gdrive:1USXqK4nCvOAR5Ty4iwKcuCOrRJoRuDyU"),
        ),
    ),
)

"""DomainNet: 345 classes in six styles, 586,575 images once its duplicates are removed."""

from domainbed_hp.datasets.spec import DatasetSpec

DOMAIN_NET = DatasetSpec(
    name="DomainNet",
    environments=("clip", "info", "paint", "quick", "real", "sketch"),
    num_classes=345,
    folder="domain_net",
    domain_folders=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    image_counts=(48129, 51605, 72266, 172500, 172947, 69128),
    checkpoint_freq=1000,
    citation="Peng, Bai, Xia, Huang, Saenko, Wang. Moment Matching for Multi-Source Domain Adaptation. ICCV 2019",
    homepage="http://ai.bu.edu/M3SDA/",
)

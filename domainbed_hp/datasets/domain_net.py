"""DomainNet: 345 classes in six styles, 586,575 images once its duplicates are removed."""

from pathlib import Path

from domainbed_hp.datasets.spec import Archive, DatasetSpec
from domainbed_hp.registry import UsageError

SERVER = "http://csr.bu.edu/ftp/visda/2019/multi-source"
DUPLICATES = "domain_net_duplicates.txt"


def remove_duplicates(folder: Path) -> None:
    """Delete the 9,431 images that DomainBed's list names as duplicates."""
    duplicates = folder / DUPLICATES
    missing = 0
    for line in duplicates.read_text().splitlines():
        path = folder / line
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{DUPLICATES}: {line!r} leaves the folder of the data set. Download it again")
        missing += not path.exists()  # a mirror may have removed it; the counts show if the result is right
        path.unlink(missing_ok=True)
    if missing:
        print(f"DomainNet: {missing:,} of the listed duplicates were not in the archives")
    duplicates.unlink()


DOMAIN_NET = DatasetSpec(
    name="DomainNet",
    environments=("clip", "info", "paint", "quick", "real", "sketch"),
    num_classes=345,
    folder="domain_net",
    domain_folders=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    image_counts=(48129, 51605, 72266, 172500, 172947, 69128),
    checkpoint_freq=1000,
    licence="none; images of others, under fair use, for non-commercial research (see homepage)",
    citation="Peng, Bai, Xia, Huang, Saenko, Wang. Moment Matching for Multi-Source Domain Adaptation. ICCV 2019",
    homepage="http://ai.bu.edu/M3SDA/",
    archives=(
        Archive("clipart.zip", (f"{SERVER}/groundtruth/clipart.zip",)),
        Archive("infograph.zip", (f"{SERVER}/infograph.zip",)),
        Archive("painting.zip", (f"{SERVER}/groundtruth/painting.zip",)),
        Archive("quickdraw.zip", (f"{SERVER}/quickdraw.zip",)),
        Archive("real.zip", (f"{SERVER}/real.zip",)),
        Archive("sketch.zip", (f"{SERVER}/sketch.zip",)),
        Archive(
            DUPLICATES,
            (f"https://raw.githubusercontent.com/facebookresearch/DomainBed/main/domainbed/misc/{DUPLICATES}",),
            sha256="a52b4ab70203f4f3df381077694dba3e33ff44c26407e1c5faca76919c702770",
        ),
    ),
    arrange=remove_duplicates,
)

"""Decode and resize every image of a data set once, so that training reads small arrays instead of image files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.files import cpu_count
from domainbed_hp.registry import DATASETS, UsageError
from domainbed_hp.scripts import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.prepare", description=__doc__)
    p.add_argument("--data_dir", help="folder that holds PACS/, VLCS/, ...")
    p.add_argument("--dataset", required=True, help=f"folder:PATH, {', '.join(DATASETS)}")
    p.add_argument("--image_size", type=int, default=224, help="side of what the model takes")
    p.add_argument(
        "--resize", default="crop", choices=["crop", "squash"],
        help="of images to score: short side and centre crop (CLIP), or both sides (DomainBed's ResNet)",
    )  # fmt: skip
    p.add_argument("--interpolation", default="bicubic", choices=["bicubic", "bilinear"])
    p.add_argument(
        "--encoding", default="auto", choices=["auto", "raw", "compressed"],
        help="raw: fastest; compressed: several times smaller, training images as JPEG, those to score without loss; "
        "auto: what is there already, else raw where it is not too large",
    )  # fmt: skip
    p.add_argument("--on_error", default="stop", choices=["stop", "skip"], help="at an image that cannot be decoded")
    p.add_argument("--num_workers", type=int, help="threads; default: one per core")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from domainbed_hp.datasets.open import find_spec  # after parsing: --help is quick
    from domainbed_hp.datasets.prepared.prepare import prepare

    spec = find_spec(args.dataset, args.data_dir)
    if args.data_dir is None and spec.build is None and not Path(spec.folder).is_absolute():
        raise UsageError(f"{spec.name} is read from disk: pass --data_dir, the folder that holds {spec.folder}/")
    prepare(
        spec,
        Path(args.data_dir or "."),
        args.image_size,
        args.resize,
        args.interpolation,
        encoding=args.encoding,
        on_error=args.on_error,
        num_workers=cpu_count() if args.num_workers is None else args.num_workers,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

"""Decode and resize every image of a data set once, so that training reads small arrays instead of image files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.files import cpu_count
from domainbed_hp.registry import DATASETS, UsageError
from domainbed_hp.scripts import run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.prepare", description=__doc__)
    add = parser.add_argument
    add("--data_dir", help="folder that holds the data sets' folders: PACS, VLCS, office_home, ...")
    add("--dataset", required=True, help=f"data set: {', '.join(DATASETS)}; or folder:PATH")
    add("--image_size", type=int, default=224, help="height and width of the model's input, in pixels (default: 224)")
    add(
        "--resize", default="crop", choices=["crop", "squash"],
        help="resizing for evaluation; crop: shorter side to image_size, then a centre crop (CLIP); squash: both sides "
        "to image_size (DomainBed's ResNet) (default: crop)",
    )  # fmt: skip
    text = "filter of the resizing (default: bicubic)"
    add("--interpolation", default="bicubic", choices=["bicubic", "bilinear"], help=text)
    add(
        "--encoding", default="auto", choices=["auto", "raw", "compressed"],
        help="raw: fastest to read; compressed: several times smaller, JPEG for training, lossless for evaluation; "
        "auto: as the existing folder; in a new one, raw up to 32 GB, else compressed (default: auto)",
    )  # fmt: skip
    on_error = "what to do if an image cannot be decoded; skip: leave it out and record it (default: stop)"
    add("--on_error", default="stop", choices=["stop", "skip"], help=on_error)
    add("--num_workers", type=int, help="number of threads (default: one per core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
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

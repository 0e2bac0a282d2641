"""How fast images load: prepared data and batched augmentation against a pipeline in Pillow written as DomainBed's.

    python benchmarks/loading.py DATA_DIR

DATA_DIR holds PACS/. One pinned core, one thread; variants take turns round by round, and each round gives a ratio.
All end in the same normalised float batch; `copy`: normalised as a tower does, which leaves x as it is, at the price of
another 19 MB of fresh memory. `host alone`: what is left to the host where the augmentation is on a GPU.
Prepares PACS at 224 pixels (raw, 3 GB) in a temporary folder first.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torchvision import transforms

from domainbed_hp.datasets.folder import FolderImages, read_folder
from domainbed_hp.datasets.loading.loader import EvalLoader, TrainLoader
from domainbed_hp.datasets.loading.transforms import DecodedViews, ImageViews
from domainbed_hp.datasets.open import find_spec, open_dataset
from domainbed_hp.networks.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalise, Preprocess
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.seeds import rng

BATCH = 32
CPU = torch.device("cpu")


def domainbeds(augmentation: str) -> transforms.Compose:
    """Transforms as in DomainBed's datasets.py; `crop_flip` leaves out its colours."""
    if augmentation == "none":
        steps = [transforms.Resize((224, 224))]
    else:
        steps = [transforms.RandomResizedCrop(224, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip()]
    if augmentation == "domainbed":
        steps += [transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale()]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def pillow(images: FolderImages, transform: transforms.Compose, indices: list[int]) -> torch.Tensor:
    """Open, decode and transform one by one, as torchvision's ImageFolder and default collation."""
    batch = []
    for i in indices:
        with open(images.paths[i], "rb") as file:
            batch.append(transform(Image.open(file).convert("RGB")))
    return torch.stack(batch)


def measure(variants: dict[str, Callable[[int], object]], images: int, rounds: int) -> dict[str, np.ndarray]:
    """Name -> ms per image of each round; in every round each variant has one turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for r in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            for batch in range(images // BATCH):
                variant(r * images // BATCH + batch)
            times[name].append((time.perf_counter() - start) / images * 1e3)
    return {name: np.array(values[1:]) for name, values in times.items()}  # the first round warms up


def compare(folder: Path, augmentation: str, images: int, rounds: int) -> dict[str, np.ndarray]:
    """`measure` of the four ways to a batch; all show the same number of images of each environment in turn."""
    spec, preprocess, normalise = find_spec("PACS"), Preprocess(224, augmentation=augmentation), Normalise()
    prepared, (_, files) = open_dataset(spec, folder, preprocess), read_folder(spec, folder)
    assert prepared.source == "prepared, raw"
    split = [{"in": range(len(env))} for env in files]
    order = [rng("order", i).permutation(len(env)) for i, env in enumerate(files)]
    transform = domainbeds(augmentation)

    def theirs(t: int) -> object:
        return pillow(files[t % 4], transform, np.roll(order[t % 4], -t * BATCH)[:BATCH].tolist())

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.sub_(normalise.mean).div_(normalise.std)

    def ours(
        environments: Sequence[ImageViews], last: Callable[[torch.Tensor], object] | None
    ) -> Callable[[int], object]:
        steps = TrainLoader(environments, split, range(4), BATCH, preprocess, 0)
        scored = [EvalLoader(env, order[i], BATCH) for i, env in enumerate(environments)]

        def turn(t: int) -> object:
            batch = (
                scored[t % 4][t % (len(order[t % 4]) // BATCH)]
                if augmentation == "none"
                else steps.make_minibatch(t % 4, t)
            )
            return last(batch.to(CPU, preprocess)[0]) if last else batch

        return turn

    variants = {
        "pillow": theirs,
        "prepared": ours(prepared.environments, in_place),
        "prepared, copy": ours(prepared.environments, normalise),
        "files": ours([DecodedViews(env, preprocess) for env in files], in_place),
        "prepared, host alone": ours(prepared.environments, None),
    }
    return measure(variants, images, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, default=256, help="per variant and round")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "PACS").symlink_to((args.data_dir / "PACS").resolve_hparams())
        shape = ["--image_size", "224", "--resize", "squash", "--interpolation", "bilinear", "--encoding", "raw"]
        prepare(["--data_dir", folder, "--dataset", "PACS", *shape])
        for name, augmentation in (("crop + flip", "crop_flip"), ("DomainBed's", "domainbed"), ("evaluation", "none")):
            times = compare(Path(folder), augmentation, args.images, args.rounds)
            for variant, ms in times.items():
                low, median, high = np.quantile(times["pillow"] / ms, (0.05, 0.5, 0.95))
                ratio = "" if variant == "pillow" else f"{median:.2f} ({low:.2f} to {high:.2f})"
                rows.append([name, variant, f"{np.median(ms):.3f}", f"{1e3 / np.median(ms):,.0f}", ratio])
    headers = ["", "", "ms/image", "images/s", "times pillow (5 to 95 % of rounds)"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()

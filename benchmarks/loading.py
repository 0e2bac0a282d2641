"""Time to load and augment an image: prepared data and batched augmentation against DomainBed's pipeline in Pillow.

    python benchmarks/loading.py DATA_DIR

How: DATA_DIR holds PACS/, which is prepared at 224 pixels in a temporary folder first (raw, 3 GB). One pinned core, one
thread, warm file cache. The variants take turns round by round, and each round gives a ratio. All of them end in the
same normalised float batch, but for `host alone`: what is left to the host where the augmentation is on a GPU. `copy`
normalises as a tower does, which leaves x as it is and costs another 19 MB of fresh memory.

Runtime on one core: 10 minutes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from common import format_spread, interleave, silence, use_one_thread
from PIL import Image
from tabulate import tabulate
from torchvision import transforms

from domainbed_hp.datasets.folder import FolderImages, read_folder
from domainbed_hp.datasets.loading.loader import EvalLoader, TrainLoader
from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.open import find_spec, open_dataset
from domainbed_hp.datasets.spec import ImageViews
from domainbed_hp.networks.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalise, Preprocess
from domainbed_hp.scripts.prepare import main as prepare
from domainbed_hp.seeds import rng

BATCH = 32
CPU = torch.device("cpu")


def make_domainbed_transform(augmentation: str) -> transforms.Compose:
    """Return the transforms of DomainBed's datasets.py; `crop_flip` leaves out its colours."""
    if augmentation == "none":
        steps = [transforms.Resize((224, 224))]
    else:
        steps = [transforms.RandomResizedCrop(224, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip()]
    if augmentation == "domainbed":
        steps += [transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale()]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def load_by_pillow(images: FolderImages, transform: transforms.Compose, indices: list[int]) -> torch.Tensor:
    """Open, decode and transform one by one, as torchvision's ImageFolder and default collation do."""
    batch = []
    for i in indices:
        with open(images.paths[i], "rb") as file:
            batch.append(transform(Image.open(file).convert("RGB")))
    return torch.stack(batch)


def time_image(load: Callable[[int], object], images: int, round_i: int) -> float:
    """Return the ms per image of the batches of a round."""
    start = time.perf_counter()
    for batch in range(images // BATCH):
        load(round_i * images // BATCH + batch)
    return (time.perf_counter() - start) / images * 1e3


def compare(folder: Path, augmentation: str, images: int, rounds: int) -> dict[str, np.ndarray]:
    """Return the ms per image of every variant and round; all load the same number of images of each environment."""
    spec, preprocess, normalise = find_spec("PACS"), Preprocess(224, augmentation=augmentation), Normalise()
    prepared, (_, files) = open_dataset(spec, folder, preprocess), read_folder(spec, folder)
    assert prepared.source == "prepared, raw"
    split = [{"in": range(len(env))} for env in files]
    order = [rng("order", i).permutation(len(env)) for i, env in enumerate(files)]
    transform = make_domainbed_transform(augmentation)

    def theirs(t: int) -> object:
        return load_by_pillow(files[t % 4], transform, np.roll(order[t % 4], -t * BATCH)[:BATCH].tolist())

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
    turns = {name: lambda r, load=load: time_image(load, images, r) for name, load in variants.items()}
    times = interleave(turns, rounds + 1)
    return {name: np.array(values[1:]) for name, values in times.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that holds PACS/")
    parser.add_argument("--images", type=int, default=256, help="images of each variant in a round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds to measure")
    args = parser.parse_args()
    use_one_thread(CPU)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "PACS").symlink_to((args.data_dir / "PACS").resolve())
        shape = ["--image_size", "224", "--resize", "squash", "--interpolation", "bilinear", "--encoding", "raw"]
        with silence():
            prepare(["--data_dir", folder, "--dataset", "PACS", *shape])
        for name, augmentation in (("crop + flip", "crop_flip"), ("DomainBed's", "domainbed"), ("evaluation", "none")):
            times = compare(Path(folder), augmentation, args.images, args.rounds)
            for variant, ms in times.items():
                ratio = "" if variant == "pillow" else format_spread(times["pillow"] / ms)
                rows.append([name, variant, f"{np.median(ms):.3f}", f"{1e3 / np.median(ms):,.0f}", ratio])
    headers = ["", "", "ms/image", "images/s", "times pillow (5 to 95 % of rounds)"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()

"""Small algorithms and batches for the tests."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.hparams_registry import resolve_hparams

CLASSES = ["dog", "electric_guitar", "house"]


def make(algorithm: str, seed: int = 0, num_classes: int = 3, **overrides: Any) -> Algorithm:
    """An algorithm on the embedded CLIP, with classes of its own."""
    fixed = {"clip_model": "mini", "clip_pretrained": "shapes"} | ({"backbone": "clip"} if algorithm == "ERM" else {})
    steps = overrides.pop("steps", None)
    hparams = resolve_hparams(algorithm, "PACS", 0, 0, fixed | overrides)
    hparams |= {"class_names": CLASSES[:num_classes]} | ({"steps": steps} if steps else {})
    torch.manual_seed(seed)
    return get_algorithm_class(algorithm)((3, 64, 64), num_classes, 3, hparams)


def batches(sizes: tuple[int, ...] = (4, 4, 4), seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Any]:
    """One minibatch a domain; domains differ in brightness and contrast."""
    g = torch.Generator().manual_seed(seed)
    return [
        ((torch.rand(n, 3, 64, 64, generator=g, dtype=dtype) * 0.5 + 0.15 * i), torch.randint(3, (n,), generator=g))
        for i, n in enumerate(sizes)
    ]


def randomize(algorithm: Any, seed: int = 0, scale: float = 0.3) -> None:
    """Give adapters and gates values that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in algorithm.named_parameters():
            if "lora_B" in name or "gate_logits" in name:
                p.copy_(torch.randn(p.shape, generator=g) * (scale if "gate" in name else scale * 0.1))


def images(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours and noise, so that interpolation matters."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    noise = rng.integers(-30, 30, (height, width, 3))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), int)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))

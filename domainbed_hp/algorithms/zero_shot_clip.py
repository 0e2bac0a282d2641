"""Zero-shot CLIP (Radford et al., 2021): the text classifier on frozen image features."""

from dataclasses import replace
from typing import Any

from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.prompts.base import load_text_side_class
from domainbed_hp.registry import UsageError


class ZeroShotCLIP(ClipAlgorithm):
    """argmax over classes of cos(image feature, text feature). Nothing trains on images.

    With prompt=promptstyler or prompt=duprg, which train on text alone, it is that source-free method.
    """

    HPARAMS = CLIP_HPARAMS | {"augmentation": replace(CLIP_HPARAMS["augmentation"], default="none")}
    STEPS = 1
    IMAGE_SIDE_TRAINS = False

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if load_text_side_class(hparams["prompt"]).trains(hparams):
            raise UsageError(f"ZeroShotCLIP: prompt={hparams['prompt']} trains at every step: use FrozenCLIP")

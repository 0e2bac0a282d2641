"""A frozen image tower under a text side that trains: prompt learning, or a linear probe."""

from dataclasses import replace
from typing import Any

from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.prompts.base import load_text_side_class
from domainbed_hp.registry import UsageError


class FrozenCLIP(ClipAlgorithm):
    """Only the text side trains, by cross-entropy. Without augmentation, images are encoded once for all runs."""

    # DEVIATION: CoOp and its successors crop and flip, as augmentation=crop_flip does; every batch is then encoded.
    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | {
        "prompt": replace(CLIP_HPARAMS["prompt"], default="coop"),
        "augmentation": replace(CLIP_HPARAMS["augmentation"], default="none"),
    }
    IMAGE_SIDE_TRAINS = False

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not load_text_side_class(hparams["prompt"]).trains(hparams):
            raise UsageError(f"FrozenCLIP: prompt={hparams['prompt']} trains at no step: use ZeroShotCLIP")

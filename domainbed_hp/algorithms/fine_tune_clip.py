"""Full fine-tuning of CLIP's image tower under a text classifier."""

from typing import Any

from domainbed_hp.algorithms.clip_algorithm import CLIP_HPARAMS, ClipAlgorithm, unfreeze
from domainbed_hp.hparams_registry import HParam, log_uniform


class FineTuneCLIP(ClipAlgorithm):
    """Every parameter of the image tower trains, by cross-entropy over the text features; AdamW, cosine.

    The defaults are those of CLIPood (Shu et al., 2023), without margin and averaging.
    With prompt=from_text and average=wise it is WiSE-FT (Wortsman et al., CVPR 2022): the classifier trains from the
    text features, and the weights are averaged with the zero-shot ones. WiSE-FT has lr 3e-5 for all. Its classifier
    contains the factor T = 100 and ours does not, so that the same lr is a prompt_lr of 3e-7.
    Trainable parameters: the image tower; ViT-B/16 86,192,640.
    """

    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | {
        "lr": HParam(5e-6, log_uniform(10, -6, -4), "learning rate of AdamW, cosine to 0", at_least=0),
        "weight_decay": HParam(0.1, log_uniform(10, -3, -0.5), "weight decay of AdamW", at_least=0),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parameters = unfreeze(self.tower.parameters())
        self.train_with({"params": parameters, "lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]})

"""LP-FT: linear probing, then fine-tuning.

Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from domainbed_hp.algorithms.clip_algorithm import ADAMW_HPARAMS, CLIP_HPARAMS, ClipAlgorithm, unfreeze
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.vit import Trace, VisionTower
from domainbed_hp.prompts.base import load_text_side_class
from domainbed_hp.registry import UsageError


class LPFT(ClipAlgorithm):
    """First the classifier trains alone (linear probing), then the classifier and the image tower (fine-tuning).

    The probe has the text side's optimizer; fine-tuning has one learning rate. Each stage has its own cosine schedule.
    Trainable parameters: the tower and the text side; ViT-B/16 86,192,640 + 513 C.
    """

    # DEVIATION: the release probes to convergence, on stored features; here both stages share the steps of a run.
    HPARAMS = {
        **CLIP_HPARAMS,
        **ADAMW_HPARAMS,
        "prompt": replace(CLIP_HPARAMS["prompt"], default="random"),
        "lr": HParam(1e-5, log_uniform(10, -6.5, -4), "learning rate of fine-tuning: AdamW, cosine", at_least=0),
        "probe_share": HParam(0.5, help="share of the steps that train the classifier alone", at_least=0, below=1),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h = self.hparams
        if "steps" not in h:
            raise UsageError('LPFT: pass the number of training steps as hparams["steps"]')
        self.probe_steps = int(h["probe_share"] * h["steps"])
        classifier = [p for p in self.text.parameters() if p.requires_grad]
        self.body = unfreeze(self.tower.parameters())
        self.train_with({"params": self.body + classifier, "lr": h["lr"], "weight_decay": h["weight_decay"]})
        self.schedule = self.make_cosine_schedule(self.optimizer, h["steps"] - self.probe_steps)
        self.text_schedule = self.make_cosine_schedule(self.text_optimizer, self.probe_steps)

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        if not load_text_side_class(hparams["prompt"]).trains(hparams):
            raise UsageError(f"LPFT: prompt={hparams['prompt']} has no classifier to train: use random, from_text, ...")

    @property
    def probing(self) -> bool:
        return self.steps_done < self.probe_steps

    def encode(self, x: Tensor, trace: list[Trace] | None = None, tower: VisionTower | None = None) -> Tensor:
        for parameter in self.body:  # a probe's gradient stops at the image features
            parameter.requires_grad_(not self.probing)
        features = super().encode(x, trace, tower)
        unfreeze(self.body)
        return features

    def step(self) -> None:
        probe, fine_tuning = (self.text_optimizer, self.text_schedule), (self.optimizer, self.schedule)
        for part in probe if self.probing else fine_tuning:
            assert part is not None
            part.step()

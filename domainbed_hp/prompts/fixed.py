"""The fixed prompts of zero-shot CLIP (Radford et al., 2021): one template, or the mean over many."""

from collections.abc import Sequence
from typing import Any

from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.clip import Clip
from domainbed_hp.prompts.base import TEMPLATE_HPARAMS, TextSide, make_prompts, unit


class Template(TextSide):
    """One prompt per class: `template` with the class name."""

    CAPTURABLE = True
    HPARAMS = TEMPLATE_HPARAMS
    TRAINS = False

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.register_buffer("features", self.compute_features(clip), persistent=clip.source.random)  # (C, E)

    def compute_features(self, clip: Clip) -> Tensor:
        """Return unit-norm text features (C, E)."""
        return clip.encode_prompts(make_prompts(self.class_names, self.hparams["template"]))

    def merge(self) -> dict[str, Tensor]:
        return {}


class Ensemble(Template):
    """The mean of the text features of many templates, normalised again."""

    CAPTURABLE = True
    HPARAMS = {
        "ensemble": HParam("imagenet80", choices=("imagenet80", "imagenet7"), help="OpenAI's 80 templates or 7 of them")
    }

    def compute_features(self, clip: Clip) -> Tensor:
        templates = {"imagenet80": OPENAI_IMAGENET_TEMPLATES, "imagenet7": SIMPLE_IMAGENET_TEMPLATES}
        names = [name.replace("_", " ") for name in self.class_names]
        prompts = [template(name) for name in names for template in templates[self.hparams["ensemble"]]]
        return unit(clip.encode_prompts(prompts).unflatten(0, (len(names), -1)).mean(1))

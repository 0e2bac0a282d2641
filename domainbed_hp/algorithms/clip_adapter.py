"""CLIP-Adapter (Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from domainbed_hp.algorithms.clip_algorithm import ADAMW_HPARAMS, CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.prompts.base import load_text_side_class
from domainbed_hp.registry import UsageError


class CLIPAdapter(ClipAlgorithm):
    """A small MLP on the image feature f of a frozen tower, with a residual: ratio MLP(f) + (1 - ratio) f.

    MLP = Linear(E, E / reduction), ReLU, Linear(E / reduction, E), ReLU, without biases. The length of f does not
    change a cosine. Trainable parameters: 2 E^2 / reduction; ViT-B/16 131,072.
    """

    # DEVIATION: AdamW with a learning rate of ours, where the release uses SGD.
    CAPTURABLE = True
    HPARAMS = {
        **CLIP_HPARAMS,
        **ADAMW_HPARAMS,
        "adapter_ratio": HParam(0.2, lambda r: r.uniform(0.1, 0.9), "share of the MLP's output", at_least=0),
        "adapter_reduction": HParam(4, help="feature size E divided by the width of the hidden layer", at_least=1),
        "lr": HParam(1e-3, log_uniform(10, -4, -2), "learning rate of AdamW, cosine to 0", at_least=0),
        "augmentation": replace(CLIP_HPARAMS["augmentation"], default="none"),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h, size = self.hparams, self.tower.embed_dim
        hidden = max(1, size // h["adapter_reduction"])
        down, up = nn.Linear(size, hidden, bias=False), nn.Linear(hidden, size, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())
        self.train_with({"params": self.adapter.parameters(), "lr": h["lr"], "weight_decay": h["weight_decay"]})

    @classmethod
    def has_frozen_features(cls, hparams: dict[str, Any]) -> bool:
        return not load_text_side_class(hparams["prompt"]).CHANGES_TOWER  # the MLP is behind the features

    def classify(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        ratio = self.hparams["adapter_ratio"]
        return super().classify(ratio * self.adapter(features) + (1 - ratio) * features, sizes)

    def merge(self) -> dict[str, Tensor]:
        raise UsageError("CLIPAdapter cannot be exported: no plain CLIP has its MLP behind the image feature")

"""Low-rank adaptation (Hu et al., 2022) of CLIP's image tower: the control of head purification."""

from typing import Any

from domainbed_hp.algorithms.clip_algorithm import ADAMW_HPARAMS, CLIP_HPARAMS, ClipAlgorithm
from domainbed_hp.hparams_registry import HParam
from domainbed_hp.networks.heads import check_targets
from domainbed_hp.registry import UsageError

LORA_HPARAMS = {
    "lora_rank": HParam(2, help="rank r in all layers but the last two; 0: no adapters", at_least=0),
    "lora_rank_last": HParam(8, help="rank r in the last two layers", at_least=0),
    "lora_targets": HParam("qv", help="projections with adapters: any of the letters q, k, v, o"),
}


class LoRA(ClipAlgorithm):
    """dW = A B on W_q and W_v of every layer, with A shared by the heads. Scaling 1, no dropout.

    Trainable parameters: 2 D r a projection; ViT-B/16 with the default ranks 110,592.
    """

    CAPTURABLE = True
    HPARAMS = CLIP_HPARAMS | ADAMW_HPARAMS | LORA_HPARAMS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adapters = self.tower.add_adapters(*read_adapter_shape(self.hparams), shared=True)
        self.train_with({"params": adapters, "lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]})

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        targets, rank, rank_last = read_adapter_shape(hparams)
        if not (targets and rank + rank_last):
            raise UsageError("got no adapters, so nothing to train: set lora_targets, and lora_rank or lora_rank_last")


def read_adapter_shape(hparams: dict[str, Any]) -> tuple[str, int, int]:
    """Return (targets, rank, rank in the last two layers). `UsageError` for a target that is none of q, k, v, o."""
    targets = hparams["lora_targets"]
    check_targets("lora_targets", targets)
    return targets, hparams["lora_rank"], hparams["lora_rank_last"]

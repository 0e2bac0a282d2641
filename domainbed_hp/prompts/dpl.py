"""Domain prompt learning (Zhang et al., "Amortized Prompt: Lightweight Fine-Tuning for CLIP in Domain Generalization",
arXiv 2111.12853, 2021; later "Domain Prompt Learning for Efficiently Adapting CLIP to Unseen Domains")."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_hp.hparams_registry import HParam, choice, log_uniform
from domainbed_hp.networks.clip import Clip
from domainbed_hp.networks.text import Sentences
from domainbed_hp.prompts.base import TextSide, make_prompts
from domainbed_hp.prompts.per_image import encode_prompts


class DPL(TextSide):
    """The prompt of a class is [p_1] ... [p_M] name., p the mean of MLP(image feature) over the images of a domain.

    In training every source domain has its own p. In evaluation every image has its own.
    Trainable parameters, with a hidden width h: (E h + h) + (h^2 + h) + (h M W + M W); ViT-B/16 4,727,808.
    """

    # DEVIATION: the paper evaluates with the mean over the test batch, so that a prediction depends on the other images
    # (dpl_transductive=true). The release trains with all K C text features and labels 0 to C - 1, so that only the
    # first domain's features are ever right (dpl_released_labels=true), and at a constant learning rate. Its MLP reads
    # image features of their own length, ours reads features of the one length dpl_scale.
    HPARAMS = {
        "prompt_tokens": HParam(16, choice(2, 4, 8, 16), "M: number of vectors before the class name", at_least=1),
        "prompt_lr": HParam(1e-3, log_uniform(10, -4.5, -2.5), "learning rate of SGD, cosine to 0", at_least=0),
        "prompt_weight_decay": HParam(0.0, help="weight decay of the MLP", at_least=0),
        "dpl_momentum": HParam(0.1, choice(0.0, 0.1, 0.2), "momentum of SGD", at_least=0),
        "dpl_width": HParam(512, choice(256, 512), "hidden width of the MLP", at_least=1),
        "dpl_dropout": HParam(0.1, choice(0.0, 0.1), "dropout probability in the MLP", at_least=0, below=1),
        "dpl_scale": HParam(10.0, help="norm of the MLP's input; CLIP's image features have about 10", at_least=0),
        "dpl_transductive": HParam(False, help="evaluate with a prompt per batch, its images' mean, as the release"),
        "dpl_released_labels": HParam(False, help="train on all domains' prompts, labels 0 to C - 1, as the release"),
    }
    PER_IMAGE = True

    def __init__(self, clip: Clip, class_names: Sequence[str], hparams: dict[str, Any]) -> None:
        super().__init__(clip, class_names, hparams)
        self.tower = clip.make_text_tower()
        tokens, width, dropout = hparams["prompt_tokens"], hparams["dpl_width"], hparams["dpl_dropout"]
        self.sentences = Sentences(self.tower, "", tokens, make_prompts(class_names, "{}."))
        self.mlp = nn.Sequential(
            nn.Linear(clip.embed_dim, width),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(width, tokens * self.tower.width),
            nn.Unflatten(-1, (tokens, self.tower.width)),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.constant_(layer.bias, 0.01)

    @classmethod
    def is_transductive(cls, hparams: dict[str, Any]) -> bool:
        return bool(hparams["dpl_transductive"])

    def encode(self, images: Tensor, sizes: Sequence[int] | None) -> Tensor:
        prompts = self.mlp(self.hparams["dpl_scale"] * images)  # (B, M, W)
        if sizes is None and not self.hparams["dpl_transductive"]:
            return encode_prompts(self.tower, self.sentences, prompts)
        domains = torch.stack([domain.mean(0) for domain in prompts.split(list(sizes or [len(images)]))])  # (K, M, W)
        text = encode_prompts(self.tower, self.sentences, domains)  # (K, C, E)
        if sizes is None or self.hparams["dpl_released_labels"]:
            return text.flatten(0, 1)
        repeats = torch.tensor(sizes).to(text.device, non_blocking=True)
        return text.repeat_interleave(repeats, dim=0, output_size=len(images))

    def make_optimizer(self) -> torch.optim.Optimizer:
        lr, momentum, decay = (self.hparams[name] for name in ("prompt_lr", "dpl_momentum", "prompt_weight_decay"))
        return torch.optim.SGD(self.mlp.parameters(), lr, momentum=momentum, weight_decay=decay)

"""Attention head purification.

Wang & Kang, "Attention Head Purification: A New Perspective to Harness CLIP for Domain Generalization",
arXiv 2412.07226; Image and Vision Computing 157 (2025) 105511.

1. Task level: head-aware LoRA (HA-LoRA) adapts each head on its own, dW_i = A_i B_i.
2. Domain level: domain-invariant gating (DIG) weights the heads of a layer, gate = H softmax(logits).
3. Cross-entropy trains adapters and gates. The MMD between source domains trains the gates alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Minibatch, join
from domainbed_hp.algorithms.clip_algorithm import ADAMW_HPARAMS, CLIP_HPARAMS, ClipAlgorithm, add_gradients, sizes
from domainbed_hp.algorithms.lora import LORA_HPARAMS, adapter_shape
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.compiled import compile_in_training
from domainbed_hp.networks.mmd import KERNELS, mmd
from domainbed_hp.networks.vit import Trace
from domainbed_hp.prompts.base import unit
from domainbed_hp.registry import UsageError


class HeadPurification(ClipAlgorithm):
    """HA-LoRA on W_q and W_v, a gate for every head, MMD routed to the gates.

    Trainable parameters: H r (D + Dh) a projection and H gates a layer; ViT-B/16 with the defaults 718,848 + 144.
    """

    CAPTURABLE = True
    HPARAMS = (
        CLIP_HPARAMS
        | ADAMW_HPARAMS
        | LORA_HPARAMS
        | {
            "gates": HParam("softmax", choices=("softmax", "sigmoid", "hard", "none"), help="how heads are gated"),
            "gate_keep": HParam(0.75, help="gates=hard: share of the heads of a layer that stay", at_least=0),
            "gate_lr_factor": HParam(10.0, log_uniform(10, 0, 2), "learning rate of the gates over lr", at_least=0),
            "gate_shuffle": HParam(False, help="control: shuffle the learned gates of each layer in evaluation"),
            "mmd_weight": HParam(1.0, log_uniform(10, -2, 1), at_least=0),
            "mmd_level": HParam("layers", choices=("output", "layers"), help="where the MMD is taken"),
            "mmd_reach": HParam(
                "local", choices=("global", "local"), help="mmd_level=layers: how far its gradient goes"
            ),
            "mmd_route": HParam("gates", choices=("gates", "adapters", "both"), help="what the MMD trains"),
            "mmd_kernel": HParam("multi_gaussian", choices=KERNELS),
            "strategy": HParam("joint", choices=("joint", "alternate", "two_stage")),
        }
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h = self.hparams
        if h["strategy"] == "two_stage" and "steps" not in h:
            raise UsageError('strategy=two_stage: pass the number of training steps as hparams["steps"]')
        num_heads = self.tower.blocks[0].attn.num_heads
        keep = min(num_heads, max(1, round(h["gate_keep"] * num_heads)))
        self.adapters: list[nn.Parameter] = self.tower.add_adapters(*adapter_shape(h))
        self.gates: list[nn.Parameter] = self.tower.add_gates(h["gates"], keep)
        if h["gate_shuffle"]:
            self.tower.shuffle_gates()
        routes = {"gates": self.gates, "adapters": self.adapters, "both": self.adapters + self.gates}
        self.routed = routes[h["mmd_route"]]
        self.diagnosis_scales: Tensor | None = None
        self.train_with(
            {"params": self.adapters, "lr": h["lr"], "weight_decay": h["weight_decay"]},
            {"params": self.gates, "lr": h["lr"] * h["gate_lr_factor"], "weight_decay": 0.0},
        )

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        targets, rank, rank_last = adapter_shape(hparams)
        if hparams["gates"] == "none" and not (targets and rank + rank_last):
            raise UsageError("gates=none without adapters has nothing to train")
        if hparams["gates"] == "none" and hparams["gate_shuffle"]:
            raise UsageError("gate_shuffle needs gates")

    def losses(self, minibatches: list[Minibatch]) -> dict[str, Tensor]:
        """The two losses of the method, as scalars with their graphs: `ce` and `mmd` (unweighted)."""
        x, y = join(minibatches)
        trace: list[Trace] = []
        features = self.encode(x, trace)
        ce = F.cross_entropy(self.classify(features, sizes(minibatches)), y)
        return {"ce": ce, "mmd": self.discrepancy(features, trace, sizes(minibatches))[0]}

    def discrepancy(
        self, features: Tensor, trace: list[Trace], sizes: list[int], scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """MMD between the domains, whose `sizes` split the batch, and its bandwidths; `scales` holds these fixed.

        At `output` of the unit-norm image feature; at `layers` of every layer's class token, mean over layers.
        """
        features = self.layer_features(trace) if self.hparams["mmd_level"] == "layers" else unit(features)
        with torch.autocast(features.device.type, enabled=False):
            return mmd(features, sizes, self.hparams["mmd_kernel"], scales)

    def layer_features(self, trace: list[Trace]) -> Tensor:
        """Each layer's class token after the attention output is added, layer-normalised, (layers, B, D).

        Without the normalisation, fixed bandwidths saturate: CLIP's residual stream grows with depth.
        Local reach cuts each layer off from those below, so that its MMD sees this layer's own parameters only.
        """
        tokens = []
        for block, layer in zip(self.tower.blocks, trace, strict=True):
            if self.hparams["mmd_reach"] == "global":
                tokens.append(layer.attended[:, 0])
                continue
            before = layer.before.detach()
            # The adapters sit between that input and the gates: for the gates alone, cut the heads' outputs off too.
            heads = layer.heads if self.hparams["mmd_route"] == "gates" else block.heads(before, 1)
            # DEVIATION: gates=hard draws its noise anew here, so that this MMD sees another sample than cross-entropy.
            tokens.append(block.attend(before[:, :1], heads)[:, 0])
        z = torch.stack(tokens)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return F.layer_norm(z, z.shape[-1:])

    def backward(self, minibatches: list[Minibatch], share: float) -> dict[str, Tensor]:
        """Cross-entropy to adapters and gates, MMD to where it is routed (the gates)."""
        _, use_mmd = self.stage()
        losses = self.losses(minibatches)
        mmd = losses["mmd"]

        # The MMD's gradient goes to the routed parameters alone; one backward() of the sum could not do that.
        if use_mmd and mmd.requires_grad:
            (share * self.hparams["mmd_weight"] * mmd).backward(inputs=self.routed, retain_graph=not self.local)
        add_gradients({name: loss for name, loss in losses.items() if name != "mmd"}, share)
        return losses

    def step(self) -> None:
        frozen, _ = self.stage()
        for parameter in frozen:
            parameter.grad = None
        super().step()

    def capturable(self) -> bool:
        return super().capturable() and bool(self.hparams["strategy"] == "joint")

    @property
    def local(self) -> bool:
        """Whether the MMD has a graph of its own, apart from cross-entropy's."""
        return (self.hparams["mmd_level"], self.hparams["mmd_reach"]) == ("layers", "local")

    def stage(self) -> tuple[list[nn.Parameter], bool]:
        """What this step leaves alone, and whether it uses the MMD.

        joint: nothing. two_stage: in the first half cross-entropy trains the adapters, with the gates at their start;
        in the second, the adapters stay and both losses train the gates. alternate: these two by turns.
        """
        step, strategy = self.steps_done, self.hparams["strategy"]
        use_mmd = self.hparams["mmd_weight"] > 0 and bool(self.routed)
        if strategy == "joint":
            return [], use_mmd
        first = step % 2 == 0 if strategy == "alternate" else 2 * step < self.hparams["steps"]
        return (self.gates, False) if first else (self.adapters, use_mmd)

    def compile_parts(self) -> None:
        super().compile_parts()
        compile_in_training(self, "discrepancy")  # hundreds of small kernels

    @torch.no_grad()
    def diagnose(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """MMD of the training environments' validation images, at the first call's bandwidths; how far gates moved."""
        x, _ = join(minibatches)
        trace: list[Trace] = []
        features = self.encode(x, trace)
        value, self.diagnosis_scales = self.discrepancy(features, trace, sizes(minibatches), self.diagnosis_scales)
        return {"val_mmd": value.item(), "gate_shift": (self.tower.gates() - 1).abs().max().item()}

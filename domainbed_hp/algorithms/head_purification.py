"""Attention head purification.

Wang & Kang, "Attention Head Purification: A New Perspective to Harness CLIP for Domain Generalization",
arXiv 2412.07226; Image and Vision Computing 157 (2025) 105511.

1. Task level: head-aware LoRA (HA-LoRA) adapts each head by itself, dW_i = A_i B_i (`networks.heads.HeadLoRA`).
2. Domain level: domain-invariant gating (DIG) weights the heads of a layer, gate = H softmax(logits)
   (`networks.heads.HeadGate`).
3. Cross-entropy trains adapters and gates. The MMD between source domains trains the gates alone (`backward`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.algorithms.clip_algorithm import ADAMW_HPARAMS, CLIP_HPARAMS, ClipAlgorithm, count_images
from domainbed_hp.algorithms.lora import LORA_HPARAMS, read_adapter_shape
from domainbed_hp.hparams_registry import HParam, log_uniform
from domainbed_hp.networks.compiled import compile_in_training
from domainbed_hp.networks.mmd import KERNELS, MMD
from domainbed_hp.networks.vit import Trace
from domainbed_hp.prompts.base import unit
from domainbed_hp.registry import UsageError


class HeadPurification(ClipAlgorithm):
    """HA-LoRA on W_q and W_v, a gate for every head, the gradient of the MMD routed to the gates.

    Trainable parameters: H r (D + Dh) a projection and H gates a layer; ViT-B/16 with the defaults 718,848 + 144.
    """

    CAPTURABLE = True
    HPARAMS = {
        **CLIP_HPARAMS,
        **ADAMW_HPARAMS,
        **LORA_HPARAMS,
        "gates": HParam("softmax", choices=("softmax", "sigmoid", "hard", "none"), help="formula of the gates"),
        "gate_keep": HParam(0.75, help="gates=hard: share of a layer's heads whose gate is 1", at_least=0),
        "gate_lr_factor": HParam(10.0, log_uniform(10, 0, 2), "gates' learning rate, a multiple of lr", at_least=0),
        "gate_shuffle": HParam(False, help="control: evaluate with each layer's gates permuted over its heads"),
        "mmd_weight": HParam(1.0, log_uniform(10, -2, 1), "factor of the MMD in the loss", at_least=0),
        "mmd_level": HParam("layers", choices=("output", "layers"), help="features that the MMD compares"),
        "mmd_reach": HParam(
            "local",
            choices=("global", "local"),
            help="mmd_level=layers: a layer's MMD trains that layer only (local) or also earlier ones (global)",
        ),
        "mmd_route": HParam("gates", choices=("gates", "adapters", "both"), help="parameters that the MMD trains"),
        "mmd_kernel": HParam("multi_gaussian", choices=KERNELS, help="kernel of the MMD"),
        "strategy": HParam("joint", choices=("joint", "alternate", "two_stage"), help="what trains at which step"),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h = self.hparams
        if h["strategy"] == "two_stage" and "steps" not in h:
            raise UsageError('strategy=two_stage: pass the number of training steps as hparams["steps"]')
        self.adapters: list[nn.Parameter] = self.tower.add_adapters(*read_adapter_shape(h))
        num_heads = self.tower.blocks[0].attn.num_heads
        open_heads = min(num_heads, max(1, round(h["gate_keep"] * num_heads)))
        self.gates: list[nn.Parameter] = self.tower.add_gates(h["gates"], open_heads)
        if h["gate_shuffle"]:
            self.tower.shuffle_gates()
        routes = {"gates": self.gates, "adapters": self.adapters, "both": self.adapters + self.gates}
        self.routed = routes[h["mmd_route"]]
        self.local = (h["mmd_level"], h["mmd_reach"]) == ("layers", "local")  # the MMD then has a graph of its own
        self.mmd = MMD(h["mmd_kernel"])
        self.diagnosis_scales: Tensor | None = None
        self.train_with(
            {"params": self.adapters, "lr": h["lr"], "weight_decay": h["weight_decay"]},
            {"params": self.gates, "lr": h["lr"] * h["gate_lr_factor"], "weight_decay": 0.0},
        )

    @classmethod
    def validate(cls, hparams: dict[str, Any]) -> None:
        super().validate(hparams)
        targets, rank, rank_last = read_adapter_shape(hparams)
        if hparams["gates"] == "none" and not (targets and rank + rank_last):
            raise UsageError("no gates and no adapters, so nothing to train: set gates, or lora_targets and lora_rank")
        if hparams["gates"] == "none" and hparams["gate_shuffle"]:
            raise UsageError("gate_shuffle needs gates, got gates=none: set gates, or gate_shuffle=false")

    def backward(self, minibatches: list[Minibatch], weight: float) -> dict[str, Tensor]:
        """Add the gradients of cross-entropy to adapters and gates, and those of the MMD to the gates (`mmd_route`)."""
        frozen, use_mmd = self.choose_stage()
        x, y = map(torch.cat, zip(*minibatches, strict=True))  # (B, 3, S, S), (B,)
        sizes = [len(y) for _, y in minibatches]  # images of each domain; their sum is B

        trace: list[Trace] = []
        features = self.encode(x, trace)  # (B, E)
        ce = F.cross_entropy(self.classify(features, sizes), y)
        mmd, _ = self.mmd(self.compute_domain_features(features, trace), sizes)

        # One backward() of the sum would send the MMD's gradient to every parameter. It goes to the routed ones alone.
        if use_mmd and mmd.requires_grad:
            (weight * self.hparams["mmd_weight"] * mmd).backward(inputs=self.routed, retain_graph=not self.local)
        (weight * ce).backward()
        for parameter in frozen:
            parameter.grad = None
        return {"ce": ce, "mmd": mmd}

    def compute_domain_features(self, features: Tensor, trace: list[Trace]) -> Tensor:
        """Return the features that the MMD compares: of the images, unit-norm (B, E), or of every layer (L, B, D).

        A layer's feature is the layer-normalised class token of the residual stream after attention: CLIP's residual
        stream grows with depth, and fixed bandwidths would saturate. With local reach the layer's input is detached, so
        that a layer's MMD sees the parameters of this layer only.
        """
        if self.hparams["mmd_level"] == "output":
            return unit(features)
        tokens = []
        for block, layer in zip(self.tower.blocks, trace, strict=True):
            if not self.local:
                tokens.append(layer.attended[:, 0])
                continue
            before = layer.before.detach()
            # Adapters sit between the layer's input and its gates: for the gates alone, detach the heads' outputs too.
            heads = layer.heads if self.hparams["mmd_route"] == "gates" else block.compute_heads(before, 1)
            # DEVIATION: gates=hard draws new noise here, so that this MMD sees another sample than cross-entropy.
            tokens.append(block.add_attention(before[:, :1], heads)[:, 0])
        z = torch.stack(tokens)
        return F.layer_norm(z.to(torch.promote_types(z.dtype, torch.float32)), z.shape[-1:])

    def choose_stage(self) -> tuple[list[nn.Parameter], bool]:
        """Return the parameters that do not train in this step, and whether the MMD trains.

        joint: cross-entropy trains adapters and gates, the MMD those of `mmd_route`. two_stage: in the first half
        cross-entropy trains the adapters; in the second half the gates train, by cross-entropy and, unless
        mmd_route=adapters, by the MMD. alternate: the two stages take turns.
        """
        use_mmd = self.hparams["mmd_weight"] > 0 and bool(self.routed)
        if self.hparams["strategy"] == "joint":
            return [], use_mmd
        step = self.steps_done
        first = step % 2 == 0 if self.hparams["strategy"] == "alternate" else 2 * step < self.hparams["steps"]
        return (self.gates, False) if first else (self.adapters, use_mmd)

    def can_capture(self) -> bool:
        return super().can_capture() and bool(self.hparams["strategy"] == "joint")

    def compile_parts(self) -> None:
        super().compile_parts()
        compile_in_training(self, "compute_domain_features")

    @torch.no_grad()
    def diagnose(self, minibatches: list[Minibatch]) -> dict[str, Any]:
        """Return the gates, their largest distance from 1, and the MMD of validation images.

        The bandwidths of this MMD are those of the first call.
        """
        gates = self.tower.compute_gates()  # (L, H)
        values: dict[str, Any] = {"gate_shift": (gates - 1).abs().max().item()}
        if self.gates:
            values["gates"] = [[round(gate, 6) for gate in layer] for layer in gates.tolist()]
        if minibatches:
            trace: list[Trace] = []
            features = self.encode(torch.cat([x for x, _ in minibatches]), trace)
            z = self.compute_domain_features(features, trace)
            mmd, self.diagnosis_scales = self.mmd(z, count_images(minibatches), self.diagnosis_scales)
            values["val_mmd"] = mmd.item()
        return values

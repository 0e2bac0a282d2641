"""AdamW with one kernel for all parameters."""

from typing import Any

import torch
from torch.autograd.graph import increment_version


def make_fused_adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    """Return torch's fused AdamW with a hook that raises the version of the weights after every step.

    The fused kernel does not, and `TextSide.compute_class_features` caches by version.
    """
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    optimizer.register_step_post_hook(raise_versions)
    return optimizer


def raise_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    increment_version([parameter for group in optimizer.param_groups for parameter in group["params"]])

"""AdamW in one kernel for all parameters."""

from typing import Any

import torch
from torch.autograd.graph import increment_version


def fused_adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    """torch's fused AdamW, which writes behind autograd's back: what is kept as long as no weight changes
    (`TextSide.class_features`) would stay for ever. So each step says that it wrote."""
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    optimizer.register_step_post_hook(wrote)
    return optimizer


def wrote(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    increment_version([parameter for group in optimizer.param_groups for parameter in group["params"]])

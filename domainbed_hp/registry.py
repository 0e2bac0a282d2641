"""Public name -> "module:attribute": what the package offers, in the order of every table, imported on first use.

A lazy table keeps torch out of `--help`, `sweep status` and `collect_results`.
"""

import difflib
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any


class UsageError(ValueError):
    """Bad input by the user. Scripts print it without a traceback and exit with code 2."""


ALGORITHMS: dict[str, str] = {
    "ZeroShotCLIP": "domainbed_hp.algorithms.zero_shot_clip:ZeroShotCLIP",
    "ERM": "domainbed_hp.algorithms.erm:ERM",
    "FineTuneCLIP": "domainbed_hp.algorithms.fine_tune_clip:FineTuneCLIP",
    "FrozenCLIP": "domainbed_hp.algorithms.frozen_clip:FrozenCLIP",
    "CLIPAdapter": "domainbed_hp.algorithms.clip_adapter:CLIPAdapter",
    "VPT": "domainbed_hp.algorithms.vpt:VPT",
    "LPFT": "domainbed_hp.algorithms.lpft:LPFT",
    "FLYP": "domainbed_hp.algorithms.flyp:FLYP",
    "CLIPood": "domainbed_hp.algorithms.clipood:CLIPood",
    "MIRO": "domainbed_hp.algorithms.miro:MIRO",
    "CLIPLoRA": "domainbed_hp.algorithms.clip_lora:CLIPLoRA",
    "LoRA": "domainbed_hp.algorithms.lora:LoRA",
    "HeadPurification": "domainbed_hp.algorithms.head_purification:HeadPurification",
}

PROMPTS: dict[str, str] = {
    "template": "domainbed_hp.prompts.fixed:Template",
    "ensemble": "domainbed_hp.prompts.fixed:Ensemble",
    "coop": "domainbed_hp.prompts.coop:CoOp",
    "cocoop": "domainbed_hp.prompts.cocoop:CoCoOp",
    "dpl": "domainbed_hp.prompts.dpl:DPL",
    "duprg": "domainbed_hp.prompts.duprg:DUPRG",
    "promptstyler": "domainbed_hp.prompts.prompt_styler:PromptStyler",
    "maple": "domainbed_hp.prompts.maple:MaPLe",
    "text_tower": "domainbed_hp.prompts.text_tower:TunedTextTower",
    "text_lora": "domainbed_hp.prompts.text_tower:TextLoRA",
    "from_text": "domainbed_hp.prompts.linear:FromText",
    "random": "domainbed_hp.prompts.linear:RandomLinear",
}
"""The text side of a CLIP algorithm, hparam `prompt`."""

WEIGHT_AVERAGES: dict[str, str] = {
    "sma": "domainbed_hp.training.weight_averaging:SimpleMovingAverage",
    "beta": "domainbed_hp.training.weight_averaging:BetaMovingAverage",
    "swad": "domainbed_hp.training.weight_averaging:SWAD",
    "wise": "domainbed_hp.training.weight_averaging:WiSE",
}
"""Weights over time, hparam `average` of every algorithm."""

SHARPNESS: dict[str, str] = {
    "sam": "domainbed_hp.training.sharpness:SAM",
    "disam": "domainbed_hp.training.sharpness:DISAM",
}
"""What climbs before each step, hparam `sharpness` of every algorithm."""

DATASETS: dict[str, str] = {
    "Debug28": "domainbed_hp.datasets.debug:DEBUG28",
    "Debug224": "domainbed_hp.datasets.debug:DEBUG224",
    "ShapesDG": "domainbed_hp.datasets.shapes.shapes_dg:SHAPES_DG",
    "VLCS": "domainbed_hp.datasets.vlcs:VLCS",
    "PACS": "domainbed_hp.datasets.pacs:PACS",
    "OfficeHome": "domainbed_hp.datasets.office_home:OFFICE_HOME",
    "TerraIncognita": "domainbed_hp.datasets.terra_incognita:TERRA_INCOGNITA",
    "DomainNet": "domainbed_hp.datasets.domain_net:DOMAIN_NET",
}

LAUNCHERS: dict[str, str] = {
    "local": "domainbed_hp.launchers.local:launch",
    "multi_gpu": "domainbed_hp.launchers.multi_gpu:launch",
    "slurm": "domainbed_hp.launchers.slurm:launch",
    "dummy": "domainbed_hp.launchers.dummy:launch",
}

SELECTION_RULES: dict[str, str] = {
    "iid": "domainbed_hp.model_selection:IIDAccuracy",
    "leave_one_out": "domainbed_hp.model_selection:LeaveOneOut",
    "oracle": "domainbed_hp.model_selection:Oracle",
}
"""Rules of model selection, one table of results for each."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that nobody knows: what was got, the nearest match, what is known."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.6)
    hint = f" Did you mean {folded[near[0]]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def load(table: dict[str, str], kind: str, name: str) -> Any:
    """The object that `name` stands for, from `table` or from the installed entry points of group domainbed_hp.<kind>s.

    `UsageError` lists the known names.
    """
    if name not in table:
        for point in entry_points(group=f"domainbed_hp.{kind.removesuffix('s')}s"):
            table.setdefault(point.name, point.value)
    if name not in table:
        raise unknown_name(kind, name, table)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)

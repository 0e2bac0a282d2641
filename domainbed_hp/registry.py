"""Tables of names: algorithms, text sides, weight averages, sharpness, data sets, launchers, selection rules.

An entry is "module:attribute" until its name is first loaded, and the object afterwards, so that `--help`,
`sweep status` and `collect_results` need no torch. Rows of results have the order of these tables.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any


class UsageError(ValueError):
    """Bad input by the user. Scripts print it without a traceback and exit with code 2."""


ALGORITHMS: dict[str, Any] = {
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

PROMPTS: dict[str, Any] = {
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
"""Text sides of CLIP algorithms, the values of hparam `prompt`."""

WEIGHT_AVERAGES: dict[str, Any] = {
    "sma": "domainbed_hp.training.weight_averaging:SimpleMovingAverage",
    "beta": "domainbed_hp.training.weight_averaging:BetaMovingAverage",
    "swad": "domainbed_hp.training.weight_averaging:SWAD",
    "wise": "domainbed_hp.training.weight_averaging:WiSE",
}
"""Averages of the weights over time, the values of hparam `average`."""

SHARPNESS: dict[str, Any] = {
    "sam": "domainbed_hp.training.sharpness:SAM",
    "disam": "domainbed_hp.training.sharpness:DISAM",
}
"""Sharpness-aware updates, the values of hparam `sharpness`."""

DATASETS: dict[str, Any] = {
    "Debug28": "domainbed_hp.datasets.debug:DEBUG28",
    "Debug224": "domainbed_hp.datasets.debug:DEBUG224",
    "ShapesDG": "domainbed_hp.datasets.shapes.shapes_dg:SHAPES_DG",
    "VLCS": "domainbed_hp.datasets.vlcs:VLCS",
    "PACS": "domainbed_hp.datasets.pacs:PACS",
    "OfficeHome": "domainbed_hp.datasets.office_home:OFFICE_HOME",
    "TerraIncognita": "domainbed_hp.datasets.terra_incognita:TERRA_INCOGNITA",
    "DomainNet": "domainbed_hp.datasets.domain_net:DOMAIN_NET",
}

LAUNCHERS: dict[str, Any] = {
    "local": "domainbed_hp.launchers.local:launch",
    "multi_gpu": "domainbed_hp.launchers.multi_gpu:launch",
    "slurm": "domainbed_hp.launchers.slurm:launch",
    "dummy": "domainbed_hp.launchers.dummy:launch",
}

SELECTION_RULES: dict[str, Any] = {
    "iid": "domainbed_hp.model_selection:IIDAccuracy",
    "leave_one_out": "domainbed_hp.model_selection:LeaveOneOut",
    "oracle": "domainbed_hp.model_selection:Oracle",
}
"""Rules of model selection; there is one table of results for each."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown name, with the nearest known one and all known ones."""
    import difflib

    known = list(known)
    folded = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.6)
    hint = f" Did you mean {folded[near[0]]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def refuse_renamed_methods(cls: type, renamed: Mapping[str, str]) -> None:
    """Raise `UsageError` if a class defines a method that the package no longer calls."""
    for name, replacement in renamed.items():
        if name in vars(cls):
            raise UsageError(f"{cls.__name__} defines {name}, which is no longer called. Define {replacement} instead")


def add_entry_points(table: dict[str, Any], kind: str) -> None:
    """Add the entry points of group domainbed_hp.<kind>s, those of installed packages, to `table`."""
    from importlib.metadata import entry_points  # slow to import

    for point in entry_points(group=f"domainbed_hp.{kind.removesuffix('s')}s"):
        table.setdefault(point.name, point.value)


def load(table: dict[str, Any], kind: str, name: str) -> Any:
    """Return the object called `name` from `table`, or else from the entry points of group domainbed_hp.<kind>s.

    `UsageError` for an unknown name; its message lists the known ones.
    """
    if name not in table:
        add_entry_points(table, kind)
    if name not in table:
        raise unknown_name(kind, name, table)
    if isinstance(table[name], str):
        module, attribute = table[name].split(":")
        table[name] = getattr(importlib.import_module(module), attribute)
    return table[name]

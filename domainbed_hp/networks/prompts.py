"""The text side: class names -> prompts."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_hp.registry import UsageError

TEMPLATE = "a photo of a {}."


def class_prompts(class_names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """One prompt a class; underscores in class names become spaces."""
    if template.count("{}") != 1:
        raise UsageError(f"template {template!r}: expected one {{}} where the class name goes, e.g. {TEMPLATE!r}")
    return [template.format(name.replace("_", " ")) for name in class_names]

"""Text sides: class names to a classifier of image features. One is one file and one line of `registry.PROMPTS`."""

from domainbed_hp.prompts.base import TextSide, text_side

__all__ = ["TextSide", "text_side"]

"""Text sides: class names -> a classifier of image features. A text side is a file and a line of `registry.PROMPTS`."""

from domainbed_hp.prompts.base import TextSide, make_text_side

__all__ = ["TextSide", "make_text_side"]

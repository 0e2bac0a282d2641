"""Zero-shot CLIP (Radford et al., 2021): the text classifier on frozen image features. Nothing trains."""

from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm


class ZeroShotCLIP(ClipAlgorithm):
    """argmax over classes of cos(image feature, text feature)."""

    STEPS = 1

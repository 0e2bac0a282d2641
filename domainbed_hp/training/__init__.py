"""One run: the loop, its state on disk, and what stands around an algorithm's update."""

from domainbed_hp.training.loop import train

__all__ = ["train"]

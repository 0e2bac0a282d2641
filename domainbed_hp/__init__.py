"""Domain generalization with CLIP: attention head purification in a DomainBed-compatible harness."""

__version__ = "0.1.0"

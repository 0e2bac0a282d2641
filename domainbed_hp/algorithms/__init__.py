"""Methods. One method is one file and one line of `registry.ALGORITHMS`."""

from domainbed_hp.algorithms.base import Algorithm, get_algorithm_class

__all__ = ["Algorithm", "get_algorithm_class"]

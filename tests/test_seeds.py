import numpy as np

from domainbed_hp.seeds import rng, seed_hash


def test_seed_hash_is_domainbeds():
    assert [seed_hash(0, i) for i in range(6)] == [
        894182419,
        1514274641,
        1325548499,
        1796103049,
        1773288162,
        1833038383,
    ]
    assert [seed_hash(1, 0), seed_hash(1, 1), seed_hash(2, 0)] == [785910682, 1442673865, 472130416]
    assert seed_hash(1, "lr") == 103267603
    assert seed_hash("PACS", "ERM", [0], 0, 0) == 94828300


def test_rng_is_a_function_of_its_whole_key():
    first = rng(0, "batch", 1, 2).random(4)
    assert np.array_equal(first, rng(0, "batch", 1, 2).random(4))
    for other in ((1, "batch", 1, 2), (0, "augment", 1, 2), (0, "batch", 2, 1), (0, "batch", 1, 3)):
        assert not np.array_equal(first, rng(*other).random(4))

import hashlib
import json

import pytest

from domainbed_hp.datasets.splits import split_dataset, split_environments
from domainbed_hp.registry import UsageError
from domainbed_hp.seeds import seed_hash


def digest(keys):
    return hashlib.md5(json.dumps(keys).encode()).hexdigest()


def test_permutation_is_domainbeds():
    assert split_dataset(10, 2, seed_hash(0, 0)) == ([2, 3], [8, 1, 4, 5, 0, 9, 6, 7])
    first, rest = split_dataset(1415, 283, seed_hash(0, 0))
    assert first[:5] == [222, 1032, 864, 859, 1037]
    assert rest[:5] == [508, 1125, 317, 633, 1149]
    assert digest(first) == "606134cf1687ceaf86e6b872f20e76aa"
    first, _ = split_dataset(2048, 409, seed_hash(0, 0))
    assert first[:5] == [548, 677, 1997, 977, 1553]
    assert digest(first) == "4be200b7a3ac5c15481b2b5909c2c47a"


def test_splits_of_vlcs_have_domainbeds_sizes():
    result = split_environments((1415, 2656, 3282, 3376), [0], 0)
    assert [(len(s["in"]), len(s["out"])) for s in result] == [(1132, 283), (2125, 531), (2626, 656), (2701, 675)]
    assert all(set(s) == {"in", "out"} for s in result)


def test_test_environments_alone_give_to_uda_under_their_own_index():
    result = split_environments((100, 50, 40), [2], 3, 0.2, 0.25)
    assert [set(s) for s in result] == [{"in", "out"}, {"in", "out"}, {"in", "out", "uda"}]
    assert {name: len(indices) for name, indices in result[2].items()} == {"out": 8, "uda": 8, "in": 24}
    assert sorted(i for indices in result[2].values() for i in indices) == list(range(40))
    # DomainBed splits the in-split once more with the same seed.
    _, train = split_dataset(40, 8, seed_hash(3, 2))
    assert result[2]["uda"] == [train[i] for i in split_dataset(32, 8, seed_hash(3, 2))[0]]


def test_splits_depend_on_trial_seed_and_environment_only():
    assert split_environments((30, 30), [0], 1) == split_environments((30, 30), [1], 1)
    assert split_environments((30, 30), [0], 1) != split_environments((30, 30), [0], 2)
    assert split_environments((30, 30), [0], 1)[0] != split_environments((30, 30), [0], 1)[1]


def test_an_empty_uda_split_is_left_out():
    assert "uda" not in split_environments((3, 3), [0], 0, 0.2, 0.1)[0]


@pytest.mark.parametrize("arguments", [((9, 9), [2], 0), ((9, 9), [0], 0, 1.0), ((9, 9), [0], 0, 0.2, -0.1)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UsageError, match="got"):
        split_environments(*arguments)

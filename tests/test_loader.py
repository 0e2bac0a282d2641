import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from domainbed_hp.datasets.loader import TrainSteps, eval_loader, eval_loaders, train_loader
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.datasets.splits import splits
from domainbed_hp.registry import UsageError


class Pixels(NamedTuple):
    size: int = 8
    resize: str = "squash"
    interpolation: str = "bilinear"
    augmentation: str = "domainbed"


PLAIN = Pixels(augmentation="none")


def environment(n, first=0):
    """Image i is one grey level, first + i, and its label is i % 3."""
    levels = np.arange(first, first + n, dtype=np.uint8)
    return ArrayImages(np.broadcast_to(levels[:, None, None, None], (n, 8, 8, 3)), np.arange(n) % 3)


ENVIRONMENTS = [environment(20), environment(30, 50), environment(6, 100)]
SPLITS = splits([20, 30, 6], [0], 0, 0.2, 0.5)


def steps(pixels=PLAIN, seed=0, **options):
    return TrainSteps(ENVIRONMENTS, SPLITS, [1, 2], 8, pixels, seed, **options)


def same(a, b):
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def test_a_step_has_one_minibatch_per_training_environment_of_its_in_split():
    for env, (x, y) in zip((1, 2), steps()[0], strict=True):
        assert x.dtype == torch.uint8 and x.shape == (8, 3, 8, 8) and y.dtype == torch.int64
        indices = (x[:, 0, 0, 0].long() - (0, 50, 100)[env]).tolist()
        assert set(indices) <= set(SPLITS[env]["in"])
        assert y.tolist() == [i % 3 for i in indices]


def test_steps_are_a_function_of_seed_environment_and_step():
    first = steps(Pixels())[3]
    assert same(first, steps(Pixels())[3])
    assert not same(first, steps(Pixels())[4])
    assert not same(first, steps(Pixels(), seed=1)[3])
    # An environment's minibatch does not depend on which others train.
    alone = TrainSteps(ENVIRONMENTS, SPLITS, [2], 8, Pixels(), 0)[3]
    assert same(alone, first[1:])


def test_environments_steps_and_seeds_draw_apart():
    twins = [ENVIRONMENTS[0], ENVIRONMENTS[0]]
    (a, _), (b, _) = TrainSteps(twins, [SPLITS[0]] * 2, [0, 1], 8, PLAIN, 0)[0]
    assert not torch.equal(a, b)
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    single = [ArrayImages(noise, np.zeros(1))] * 2

    def augmented(seed, t):
        return TrainSteps(single, [{"in": [0]}] * 2, [0, 1], 1, Pixels(), seed)[t]

    versions = [x.numpy().tobytes() for seed, t in ((0, 0), (0, 1), (1, 0)) for x, _ in augmented(seed, t)]
    assert len(set(versions)) == 6


def test_every_image_is_drawn_with_replacement():
    seen = torch.cat([step[1][0][:, 0, 0, 0] for step in (steps()[t] for t in range(20))])
    assert sorted(set(seen.tolist())) == sorted(100 + i for i in SPLITS[2]["in"])
    assert len(SPLITS[2]["in"]) == 5 < 8  # fewer than a batch, and it does not hang


def test_resuming_gives_the_same_steps():
    whole = list(train_loader(steps(Pixels()), 0, 6))
    rest = list(train_loader(steps(Pixels()), 4, 6))
    assert len(whole) == 6 and len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_workers_change_nothing():
    here = list(train_loader(steps(Pixels()), 0, 4))
    there = list(train_loader(steps(Pixels()), 0, 4, num_workers=2))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_no_global_generator_is_drawn_from():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for workers in (0, 1):
        list(train_loader(steps(Pixels()), 0, 2, num_workers=workers))
        list(eval_loader(ENVIRONMENTS[0], range(20), 8, Pixels(), num_workers=workers))
    assert states() == before


def test_class_balanced():
    images = ArrayImages(np.zeros((100, 8, 8, 3), np.uint8), np.array([0] * 95 + [1] * 5))
    indices = [{"in": list(range(10, 100)), "out": list(range(10))}]
    for balanced, low, high in ((True, 420, 580), (False, 20, 100)):
        batch = TrainSteps([images], indices, [0], 1000, PLAIN, 0, class_balanced=balanced)[0]
        assert low < int(batch[0][1].sum()) < high


def test_unlabeled_images_are_the_uda_split_not_augmented():
    (x,) = TrainSteps(ENVIRONMENTS, SPLITS, [0], 8, Pixels(), 0, unlabeled=True)[0]
    assert x.shape == (8, 3, 8, 8) and set(x[:, 0, 0, 0].tolist()) <= set(SPLITS[0]["uda"])
    assert (x == x[:, :1, :1, :1]).all()


def test_an_empty_split_is_refused():
    with pytest.raises(UsageError, match="environment 1: none of its 30 images is in split 'uda'; pass --uda_holdout"):
        TrainSteps(ENVIRONMENTS, SPLITS, [1], 8, PLAIN, 0, unlabeled=True)
    with pytest.raises(UsageError, match="environment 0: none of its 0 images"):
        TrainSteps([environment(0)], splits([0], [], 0), [0], 8, PLAIN, 0)


def test_scoring_is_in_order_and_never_augmented():
    loader = eval_loader(ENVIRONMENTS[1], [5, 3, 9, 0, 7], 2, Pixels())
    batches = list(loader)
    assert [len(y) for _, y in batches] == [2, 2, 1] and len(loader) == 3
    assert torch.cat([y for _, y in batches]).tolist() == [2, 0, 0, 0, 1]
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.uint8 and x[:, 0, 0, 0].tolist() == [55, 53, 59, 50, 57] and (x == x[:, :1, :1, :1]).all()


class Counted(ArrayImages):
    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


@pytest.mark.parametrize(("keep", "reads"), [(True, 6), (False, 12)])
def test_kept_images_are_read_once(keep, reads):
    images = Counted(ENVIRONMENTS[2].array, ENVIRONMENTS[2].labels)
    loader = eval_loader(images, range(6), 4, PLAIN, keep=keep)
    assert same(list(loader), list(loader))
    assert images.reads == reads


def test_a_pass_that_stops_early_keeps_nothing():
    loader = eval_loader(ENVIRONMENTS[0], range(20), 8, PLAIN, keep=True)
    next(iter(loader))
    assert sum(len(y) for _, y in loader) == 20


def test_every_split_has_a_loader_and_the_small_ones_are_kept():
    loaders = eval_loaders(ENVIRONMENTS, SPLITS, 4, PLAIN, keep_bytes=20 * 3 * 8 * 8)
    assert {name: sum(len(y) for _, y in loader) for name, loader in loaders.items()} == {
        "env0_in": 8,
        "env0_out": 4,
        "env0_uda": 8,
        "env1_in": 24,
        "env1_out": 6,
        "env2_in": 5,
        "env2_out": 1,
    }
    assert [name for name, loader in loaders.items() if loader.keep] == ["env0_out", "env1_out", "env2_in", "env2_out"]


def test_max_images_scores_the_first_of_each_split():
    loaders = eval_loaders(ENVIRONMENTS, SPLITS, 4, PLAIN, max_images=3)
    ((x, _),) = loaders["env0_in"]
    assert x[:, 0, 0, 0].tolist() == SPLITS[0]["in"][:3]
    assert sum(len(y) for _, y in loaders["env2_out"]) == 1

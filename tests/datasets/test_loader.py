import random
from typing import NamedTuple

import numpy as np
import pillow_augment
import pytest
import torch
from PIL import Image

from domainbed_hp.datasets.loading.loader import Batch, EvalLoader, TrainLoader, make_eval_loaders
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.datasets.splits import split_environments
from domainbed_hp.registry import UsageError


class Preprocess(NamedTuple):
    size: int = 8
    resize: str = "squash"
    interpolation: str = "bilinear"
    augmentation: str = "domainbed"


PLAIN = Preprocess(augmentation="none")
CPU = torch.device("cpu")


def environment(n, first=0):
    """Image i is one grey level, first + i, and its label is i % 3."""
    levels = np.arange(first, first + n, dtype=np.uint8)
    return DecodedViews(
        ArrayImages(np.broadcast_to(levels[:, None, None, None], (n, 8, 8, 3)), np.arange(n) % 3), PLAIN
    )


ENVIRONMENTS = [environment(20), environment(30, 50), environment(6, 100)]
SPLITS = split_environments([20, 30, 6], [0], 0, 0.2, 0.5)


def steps(preprocess=PLAIN, seed=0, **options):
    return TrainLoader(ENVIRONMENTS, SPLITS, [1, 2], 8, preprocess, seed, **options)


def decoded(array, labels):
    return DecodedViews(ArrayImages(array, labels), PLAIN)


def finished(batches):
    """(x, y) of each batch."""
    return [batch.to(CPU, Preprocess()) for batch in batches]


def same(a, b):
    pairs = zip(finished(a), finished(b), strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def test_a_step_has_one_minibatch_per_training_environment_of_its_in_split():
    for env, (x, y, draws) in zip((1, 2), steps()[0], strict=True):
        assert draws is None
        assert x.dtype == torch.uint8 and x.shape == (8, 3, 8, 8) and y.dtype == torch.int64
        indices = (x[:, 0, 0, 0].long() - (0, 50, 100)[env]).tolist()
        assert set(indices) <= set(SPLITS[env]["in"])
        assert y.tolist() == [i % 3 for i in indices]


def test_steps_are_a_function_of_seed_environment_and_step():
    first = steps(Preprocess())[3]
    assert same(first, steps(Preprocess())[3])
    assert not same(first, steps(Preprocess())[4])
    assert not same(first, steps(Preprocess(), seed=1)[3])
    # An environment's minibatch does not depend on which others train.
    alone = TrainLoader(ENVIRONMENTS, SPLITS, [2], 8, Preprocess(), 0)[3]
    assert same(alone, first[1:])


def test_environments_steps_and_seeds_draw_apart():
    twins = [ENVIRONMENTS[0], ENVIRONMENTS[0]]
    a, b = TrainLoader(twins, [SPLITS[0]] * 2, [0, 1], 8, PLAIN, 0)[0]
    assert not torch.equal(a.images, b.images)
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    single = [decoded(noise, np.zeros(1))] * 2

    def augmented(seed, t):
        return TrainLoader(single, [{"in": [0]}] * 2, [0, 1], 1, Preprocess(), seed)[t]

    versions = [x.numpy().tobytes() for seed, t in ((0, 0), (0, 1), (1, 0)) for x, _ in finished(augmented(seed, t))]
    assert len(set(versions)) == 6


def test_every_image_is_drawn_with_replacement():
    seen = torch.cat([step[1].images[:, 0, 0, 0] for step in (steps()[t] for t in range(20))])
    assert sorted(set(seen.tolist())) == sorted(100 + i for i in SPLITS[2]["in"])
    assert len(SPLITS[2]["in"]) == 5 < 8  # fewer than a batch, and it does not hang


def test_resuming_gives_the_same_steps():
    whole, rest = [steps(Preprocess())[t] for t in range(6)], [steps(Preprocess())[t] for t in range(4, 6)]
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_workers_change_nothing():
    dataset = TrainLoader(ENVIRONMENTS, SPLITS, [1, 2], 8, Preprocess(), 0)
    with ThreadPool(2) as workers:
        there = list(workers.map(dataset.__getitem__, range(6)))
    assert all(same(dataset[t], there[t]) for t in range(6))


def test_images_of_different_sizes_share_a_batch():
    """Each is augmented as it would be alone with those draws; what pads it never shows."""
    rng = np.random.default_rng(0)

    class Sizes:
        labels = np.arange(6)

        def __len__(self):
            return 6

        def load_training_view(self, i):
            return self.views[i]

        views = [rng.integers(100, 256, (8 + i, 14 - i, 3), np.uint8) for i in range(6)]

    (batch,) = TrainLoader([Sizes()], [{"in": range(6)}], [0], 12, Preprocess(), 3)[0]
    assert batch.images.shape == (12, 13, 14, 3) and len(set(batch.labels.tolist())) > 2
    for b, i in enumerate(batch.labels.tolist()):
        top, left, height, width = batch.draws.box[b]
        assert top + height <= 8 + i and left + width <= 14 - i
        assert np.array_equal(batch.images[b, : 8 + i, : 14 - i], Sizes.views[i])
    batch.images[:, 13:] = 0
    x, _ = batch._replace(draws=batch.draws._replace(colour=None)).to(CPU, Preprocess())
    assert x.shape == (12, 3, 8, 8) and x.min() > 0.35


def test_the_augmented_crops_are_pillows_of_the_same_draws():
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    smooth = noise // 64 + 100
    preprocess = Preprocess(augmentation="crop_flip")
    (batch,) = TrainLoader([decoded(smooth, np.arange(20))], [{"in": range(20)}], [0], 16, preprocess, 5)[0]
    images = [Image.fromarray(smooth[i]) for i in batch.labels.tolist()]
    theirs = pillow_augment.augment(images, batch.draws, 8, "bilinear")
    assert theirs.shape == (16, 3, 8, 8)
    x, _ = batch.to(CPU, preprocess)
    assert (x - torch.from_numpy(theirs).float() / 255).abs().max() < 1.1 / 255


def test_no_global_generator_is_drawn_from():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for number in (0, 1):
        with ThreadPool(number) as workers:
            list(workers.map(steps(Preprocess()).__getitem__, range(2)))
            list(EvalLoader(ENVIRONMENTS[0], range(20), 8, workers))
    assert states() == before


def test_class_balanced():
    images = decoded(np.zeros((100, 8, 8, 3), np.uint8), np.array([0] * 95 + [1] * 5))
    indices = [{"in": list(range(10, 100)), "out": list(range(10))}]
    for balanced, low, high in ((True, 420, 580), (False, 20, 100)):
        batch = TrainLoader([images], indices, [0], 1000, PLAIN, 0, class_balanced=balanced)[0]
        assert low < int(batch[0].labels.sum()) < high


def test_unlabeled_images_are_the_uda_split_not_augmented():
    ((x, _, draws),) = TrainLoader(ENVIRONMENTS, SPLITS, [0], 8, Preprocess(), 0, unlabeled=True)[0]
    assert draws is None and x.shape == (8, 3, 8, 8) and set(x[:, 0, 0, 0].tolist()) <= set(SPLITS[0]["uda"])
    assert (x == x[:, :1, :1, :1]).all()


def test_an_empty_split_is_refused():
    with pytest.raises(UsageError, match="environment 1: none of its 30 images is in split 'uda'; pass --uda_holdout"):
        TrainLoader(ENVIRONMENTS, SPLITS, [1], 8, PLAIN, 0, unlabeled=True)
    with pytest.raises(UsageError, match="environment 0: none of its 0 images"):
        TrainLoader([environment(0)], split_environments([0], [], 0), [0], 8, PLAIN, 0)


def test_scoring_is_in_order_and_never_augmented():
    loader = EvalLoader(ENVIRONMENTS[1], [5, 3, 9, 0, 7], 2)
    batches = list(loader)
    assert [len(batch.labels) for batch in batches] == [2, 2, 1] and len(loader) == 3
    assert torch.cat([batch.labels for batch in batches]).tolist() == [2, 0, 0, 0, 1]
    x = torch.cat([batch.images for batch in batches])
    assert x.dtype == torch.uint8 and x[:, 0, 0, 0].tolist() == [55, 53, 59, 50, 57] and (x == x[:, :1, :1, :1]).all()


def test_nothing_is_read_before_the_first_batch_is_asked_for():
    class Counted(DecodedViews):
        reads = 0

        def load_evaluation_view(self, i):
            self.reads += 1
            return super().load_evaluation_view(i)

    views = Counted(ENVIRONMENTS[0].images, PLAIN)
    batches = iter(EvalLoader(views, range(20), 8))
    assert views.reads == 0
    next(batches)
    assert views.reads == 8


def test_every_split_has_a_loader():
    loaders = make_eval_loaders(ENVIRONMENTS, SPLITS, 4)
    assert {name: sum(len(batch.labels) for batch in loader) for name, loader in loaders.items()} == {
        "env0_in": 8,
        "env0_out": 4,
        "env0_uda": 8,
        "env1_in": 24,
        "env1_out": 6,
        "env2_in": 5,
        "env2_out": 1,
    }


def test_max_images_scores_the_first_of_each_split():
    loaders = make_eval_loaders(ENVIRONMENTS, SPLITS, 4, max_images=3)
    (batch,) = loaders["env0_in"]
    assert batch.images[:, 0, 0, 0].tolist() == SPLITS[0]["in"][:3]
    assert sum(len(batch.labels) for batch in loaders["env2_out"]) == 1


def test_a_batch_without_draws_is_scaled_to_one():
    x, y = Batch(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), torch.tensor([4])).to(CPU, PLAIN)
    assert torch.allclose(x, torch.tensor([[[[0, 0.2, 1]]]])) and y.tolist() == [4]

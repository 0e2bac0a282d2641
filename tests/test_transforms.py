import random
import statistics

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms

from domainbed_hp.datasets.transforms import augment, colour_jitter, crop_box, evaluate, shift_hue

SHAPES = [(227, 227), (301, 200), (97, 413), (65, 64), (64, 64), (31, 50), (50, 31), (50, 33), (17, 640)]
MODES = {
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "bilinear": transforms.InterpolationMode.BILINEAR,
}


def photo(width, height, seed=0):
    """Smooth colours and noise, so that interpolation matters."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-30, 30, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, int) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize", "theirs"), [("crop", "shortest"), ("squash", "squash")])
def test_evaluation_is_open_clips_bit_for_bit(shape, interpolation, resize, theirs):
    config = PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=theirs)
    image = photo(*shape)
    expected = image_transform_v2(config, is_train=False)(image)
    ours = evaluate(image, 64, resize, interpolation)
    assert ours.dtype == np.uint8 and ours.shape == (3, 64, 64) and ours.flags["C_CONTIGUOUS"]
    assert torch.equal(torch.from_numpy(ours).float().div(255), expected)


def test_squash_is_domainbeds():
    image = photo(301, 200)
    expected = transforms.Resize((224, 224))(image)
    assert np.array_equal(evaluate(image, 224, "squash", "bilinear"), np.asarray(expected).transpose(2, 0, 1))


def test_a_grey_image_becomes_rgb():
    assert evaluate(photo(40, 30).convert("L"), 32, "crop", "bicubic").shape == (3, 32, 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_flip_is_torchvisions_given_the_same_draws(interpolation):
    image = photo(301, 200)
    flips = 0
    for seed in range(8):
        left, top, right, bottom = crop_box(301, 200, rng := np.random.default_rng(seed))
        expected = F.resized_crop(image, top, left, bottom - top, right - left, [64, 64], MODES[interpolation])
        if rng.random() < 0.5:
            expected, flips = F.hflip(expected), flips + 1
        ours = augment(image, 64, "crop", interpolation, "crop_flip", np.random.default_rng(seed))
        assert np.array_equal(ours, np.asarray(expected).transpose(2, 0, 1))
    assert 0 < flips < 8


def test_crops_are_distributed_as_torchvisions():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = Image.new("RGB", (300, 200))
    ours = [crop_box(300, 200, rng) for _ in range(2000)]
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    theirs = [(left, top, left + width, top + height) for top, left, height, width in theirs]
    for side in range(4):
        a, b = [box[side] for box in ours], [box[side] for box in theirs]
        assert abs(statistics.mean(a) - statistics.mean(b)) < 3
        assert abs(statistics.stdev(a) - statistics.stdev(b)) < 3
    assert all(0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 200 for x0, y0, x1, y1 in ours)


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))],
)
def test_extreme_shapes_fall_back_to_the_centre(size, box):
    assert crop_box(*size, np.random.default_rng(0)) == box
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        Image.new("RGB", size), [0.7, 1.0], [3 / 4, 4 / 3]
    )
    assert (left, top, left + width, top + height) == box


@pytest.mark.parametrize("turns", [-0.3, -0.1, 0.0, 0.004, 0.25, 0.3])
def test_hue_is_torchvisions(turns):
    image = photo(50, 40)
    assert np.array_equal(np.asarray(shift_hue(image, turns)), np.asarray(F.adjust_hue(image, turns)))


def test_colour_jitter_is_torchvisions_given_the_same_draws():
    image = photo(50, 40)
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, lambda i, f: F.adjust_hue(i, f - 1)]
    orders = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        factors, order = rng.uniform(0.7, 1.3, 4), rng.permutation(4)
        orders.add(tuple(order))
        expected = image
        for i in order:
            expected = adjust[i](expected, float(factors[i]))
        assert np.array_equal(np.asarray(colour_jitter(image, np.random.default_rng(seed))), np.asarray(expected))
    assert len(orders) > 1


def test_one_domainbed_image_in_ten_is_grey():
    rng = np.random.default_rng(0)
    image = photo(24, 24)
    results = [augment(image, 16, "squash", "bilinear", "domainbed", rng) for _ in range(1000)]
    grey = sum(bool((x[0] == x[1]).all() and (x[1] == x[2]).all()) for x in results)
    assert 60 < grey < 140


def test_no_augmentation_is_evaluation():
    image = photo(80, 50)
    ours = augment(image, 32, "crop", "bicubic", "none", np.random.default_rng(0))
    assert np.array_equal(ours, evaluate(image, 32, "crop", "bicubic"))


def test_no_global_generator_is_drawn_from():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augment(photo(40, 40), 32, "crop", "bicubic", "domainbed", np.random.default_rng(0))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known: 'crop', 'squash'"):
        evaluate(photo(8, 8), 8, "stretch", "bicubic")
    with pytest.raises(ValueError, match="known: 'crop_flip', 'domainbed', 'none'"):
        augment(photo(8, 8), 8, "crop", "bicubic", "autoaugment", np.random.default_rng(0))

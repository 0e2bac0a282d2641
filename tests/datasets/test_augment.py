import random

import numpy as np
import pillow_augment
import pytest
import torch
import torchvision.transforms.functional as F
from helpers import photo
from torch import Tensor
from torchvision import transforms

from domainbed_hp.datasets.loading.augment import (
    OPERATIONS,
    Draws,
    adjust_hue,
    augment,
    crop_by_kernel,
    crop_by_matrix,
    draw_augmentation,
    draw_boxes,
    jitter_colours,
)
from domainbed_hp.networks.preprocess import Preprocess

CPU = torch.device("cpu")
MODES = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
CROPS = {"kernel": crop_by_kernel, "matrix": crop_by_matrix}


def sizes(count: int, height: int, width: int) -> np.ndarray:
    return np.array([[height, width]] * count)


def nearly_equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Kolmogorov-Smirnov at a level of 1 in 1,000: whether both samples can be of one distribution."""
    both = np.sort(np.concatenate([ours, theirs]))
    gap = [np.searchsorted(np.sort(sample), both, side="right") / len(sample) for sample in (ours, theirs)]
    limit = 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs))
    return bool(np.abs(gap[0] - gap[1]).max() < limit)


# The same draws, the same pixels.


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize("size", [48, 160])
def test_crops_are_torchvisions_given_the_same_draws(crops, interpolation, size):
    images = [photo(130, 90, seed) for seed in range(6)]
    draws = draw_augmentation(sizes(6, 90, 130), "crop_flip", np.random.default_rng(0))
    x = CROPS[crops](torch.from_numpy(np.stack([np.asarray(i) for i in images])), draws, size, interpolation)
    assert set(draws.flip) == {True, False}
    for ours, image, box, flip in zip(x, images, draws.box.tolist(), draws.flip, strict=True):
        expected = F.resized_crop(image, *box, [size, size], MODES[interpolation])
        expected = F.to_tensor(F.hflip(expected) if flip else expected)
        difference = 255 * (ours - expected).abs()
        assert difference.max() < 2.1 and difference.mean() < 0.5


@pytest.mark.parametrize("crops", CROPS)
def test_what_pads_an_image_is_never_seen(crops):
    image = torch.from_numpy(np.asarray(photo(50, 40)).copy())
    padded = torch.full((1, 70, 90, 3), 255, dtype=torch.uint8)
    padded[0, :40, :50] = image
    draws = Draws(np.array([[0, 0, 40, 50]]), np.array([False]), None)
    assert torch.equal(CROPS[crops](padded, draws, 32, "bicubic"), CROPS[crops](image[None], draws, 32, "bicubic"))


@pytest.mark.parametrize("turns", [-0.3, -0.1, 0.0, 0.004, 0.25, 0.3])
def test_hue_is_torchvisions(turns):
    plain = [[0, 0, 0], [1, 1, 1], [0.4, 0.4, 0.4], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]]
    x = torch.cat([torch.rand(4, 3, 20, 30), torch.tensor(plain)[:, :, None, None].expand(-1, -1, 20, 30)])
    ours = adjust_hue(x, torch.full((len(x), 1, 1, 1), 1 + turns))
    assert (ours - F.adjust_hue(x, turns)).abs().max() < 1e-5


@pytest.mark.parametrize("number", range(4))
def test_each_operation_is_torchvisions(number):
    theirs = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, lambda x, f: F.adjust_hue(x, f - 1)]
    x = torch.rand(3, 3, 20, 30)
    for factor in (0.7, 0.95, 1.3):
        ours = OPERATIONS[number](x, torch.full((3, 1, 1, 1), factor))
        assert (ours - theirs[number](x, factor)).abs().max() < 1e-4


def test_every_image_has_its_own_order_of_operations():
    x = torch.rand(24, 3, 8, 8)
    colour = draw_augmentation(sizes(24, 8, 8), "domainbed", np.random.default_rng(0)).colour
    assert len({tuple(order) for order in colour.order}) > 10 and 0 < colour.grey.sum() < 24
    expected = x.clone()
    for i in range(24):
        for number in colour.order[i]:
            expected[i] = OPERATIONS[number](
                expected[i : i + 1], torch.tensor(colour.factors[i, number]).float().view(1, 1, 1, 1)
            )[0]
        if colour.grey[i]:
            expected[i] = F.rgb_to_grayscale(expected[i], 3)
    assert torch.allclose(jitter_colours(x.clone(), colour), expected, atol=2e-4)


def test_batched_and_pillow_show_the_same_images():
    """Up to rounding: Pillow rounds after each operation, and its hue has 256 steps."""
    images = [photo(90, 80, seed) for seed in range(16)]
    draws = draw_augmentation(sizes(16, 80, 90), "domainbed", np.random.default_rng(0))
    theirs = torch.from_numpy(pillow_augment.augment(images, draws, 48, "bicubic")).float() / 255
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    ours = augment(stacked, draws, Preprocess(48, "crop", "bicubic", "domainbed"), CPU)
    assert (ours - theirs).abs().mean(dim=(1, 2, 3)).max() < 2.5 / 255
    assert draws.colour.grey.any() and draws.flip.any()


# The same distribution.


def boxes_of_gradients(x: Tensor) -> np.ndarray:
    """(B, 4): area, log aspect, centre, flip of crops, read off images whose red is the column and green the row."""
    red, green = x[:, 0].mean(1), x[:, 1].mean(2)  # (B, S)
    width, height = (red[:, -4] - red[:, 3]).abs(), (green[:, -4] - green[:, 3]).abs()
    return torch.stack(
        [width * height, (width / height).log(), red.mean(1), (red[:, -4] > red[:, 3]).float()], 1
    ).numpy()


@pytest.mark.parametrize("crops", CROPS)
def test_crops_and_flips_are_distributed_as_torchvisions(crops):
    count = 1500
    column, row = np.meshgrid(np.linspace(20, 235, 96), np.linspace(20, 235, 72))
    image = np.stack([column, row, np.zeros_like(row)], axis=2).astype(np.uint8)
    draws = draw_augmentation(sizes(count, 72, 96), "crop_flip", np.random.default_rng(0))
    ours = CROPS[crops](torch.from_numpy(image)[None].expand(count, -1, -1, -1), draws, 32, "bilinear")
    torch.manual_seed(0)
    transform = transforms.Compose(
        [transforms.RandomResizedCrop(32, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    theirs = torch.stack([transform(transforms.ToPILImage()(image)) for _ in range(count)])
    for a, b in zip(boxes_of_gradients(ours).T, boxes_of_gradients(theirs).T, strict=True):
        assert nearly_equal(a, b)


def colours(x: Tensor) -> np.ndarray:
    """(B, 5): brightness, contrast, saturation, hue of the mean colour, whether grey."""
    grey = F.rgb_to_grayscale(x)
    spread = x.amax(1) - x.amin(1)
    r, g, b = x.mean(dim=(2, 3)).unbind(1)
    angle = torch.atan2(3**0.5 * (g - b), 2 * r - g - b)
    is_grey = (spread.amax(dim=(1, 2)) < 0.02).float()
    angle = torch.where(is_grey > 0, torch.zeros(()), angle)
    return torch.stack(
        [grey.mean(dim=(1, 2, 3)), grey.std(dim=(1, 2, 3)), spread.mean(dim=(1, 2)), angle, is_grey], 1
    ).numpy()


def test_colours_are_distributed_as_torchvisions():
    count = 1500
    image = photo(40, 40, 3)
    tilted = np.clip(np.asarray(image) * [0.9, 0.6, 0.3] + [20, 10, 0], 0, 255).astype(np.uint8)  # of a clear hue
    draws = draw_augmentation(sizes(count, 40, 40), "domainbed", np.random.default_rng(0))
    stacked = torch.from_numpy(tilted)[None].expand(count, -1, -1, -1)
    ours = augment(stacked, draws, Preprocess(24, "squash", "bilinear", "domainbed"), CPU)
    torch.manual_seed(0)
    transform = transforms.Compose(
        [
            transforms.ToTensor(),  # on floats: Pillow rounds down four times, which darkens by a level or two
            transforms.RandomResizedCrop(24, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
        ]
    )
    theirs = torch.stack([transform(tilted) for _ in range(count)])
    for name, a, b in zip(
        ("brightness", "contrast", "saturation", "hue", "grey"), colours(ours).T, colours(theirs).T, strict=True
    ):
        assert nearly_equal(a, b), name
    assert 0.07 < colours(ours)[:, 4].mean() < 0.13


@pytest.mark.parametrize(
    ("size", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))]
)
def test_extreme_shapes_fall_back_to_the_centre(size, box):
    assert draw_boxes(np.array([size]), np.random.default_rng(0)).tolist() == [list(box)]
    assert transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), [0.7, 1.0], [3 / 4, 4 / 3]) == box


@pytest.mark.parametrize("augmentation", ["crop_flip", "domainbed"])
def test_an_image_does_not_depend_on_its_neighbours_sizes(augmentation):
    """Draws of a batch are a function of the generator and of its sizes; each crop lies inside its own image."""
    mixed = np.array([[30, 40], [90, 50], [64, 64]] * 50)
    draws = draw_augmentation(mixed, augmentation, np.random.default_rng(0))
    top, left, height, width = draws.box.T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= mixed[:, 0]).all() and (left + width <= mixed[:, 1]).all()
    again = draw_augmentation(mixed, augmentation, np.random.default_rng(0))
    assert np.array_equal(draws.box, again.box) and np.array_equal(draws.flip, again.flip)


def test_no_global_generator_is_drawn_from():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = draw_augmentation(sizes(8, 40, 40), "domainbed", np.random.default_rng(0))
    augment(torch.zeros(8, 40, 40, 3, dtype=torch.uint8), draws, Preprocess(32), CPU)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="known: 'crop_flip', 'domainbed'"):
        draw_augmentation(sizes(1, 8, 8), "autoaugment", np.random.default_rng(0))

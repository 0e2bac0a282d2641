import numpy as np
import pytest
import torchvision.transforms.functional as F
from helpers import photo
from pillow_augment import augment, shift_hue
from torchvision import transforms

from domainbed_hp.datasets.loading.augment import draw_augmentation

MODES = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
ADJUST = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, lambda i, f: F.adjust_hue(i, f - 1)]


@pytest.mark.parametrize("turns", [-0.3, -0.1, 0.0, 0.004, 0.25, 0.3])
def test_hue_is_torchvisions_bit_for_bit(turns):
    image = photo(50, 40)
    assert np.array_equal(np.asarray(shift_hue(image, turns)), np.asarray(F.adjust_hue(image, turns)))


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("augmentation", ["crop_flip", "domainbed"])
def test_images_are_torchvisions_bit_for_bit_given_the_same_draws(interpolation, augmentation):
    images = [photo(120, 80, seed) for seed in range(12)]
    draws = draw_augmentation(np.array([[80, 120]] * 12), augmentation, np.random.default_rng(0))
    ours = augment(images, draws, 48, interpolation)
    assert ours.dtype == np.uint8 and ours.shape == (12, 3, 48, 48)
    for i, image in enumerate(images):
        expected = F.resized_crop(image, *draws.box[i].tolist(), [48, 48], MODES[interpolation])
        expected = F.hflip(expected) if draws.flip[i] else expected
        if draws.colour:
            for number in draws.colour.order[i]:
                expected = ADJUST[number](expected, float(draws.colour.factors[i, number]))
            expected = F.to_grayscale(expected, 3) if draws.colour.grey[i] else expected
        assert np.array_equal(ours[i], np.asarray(expected).transpose(2, 0, 1))

import numpy as np
import pytest
import torch
from helpers import photo
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision import transforms

from domainbed_hp.datasets.loading.augment import draw_boxes
from domainbed_hp.datasets.loading.transforms import DecodedViews, make_evaluation_view, make_training_view
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.networks.preprocess import Preprocess

SHAPES = [(227, 227), (301, 200), (97, 413), (65, 64), (64, 64), (31, 50), (50, 31), (50, 33), (17, 640)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize", "theirs"), [("crop", "shortest"), ("squash", "squash")])
def test_evaluation_is_open_clips_bit_for_bit(shape, interpolation, resize, theirs):
    config = PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=theirs)
    image = photo(*shape)
    expected = image_transform_v2(config, is_train=False)(image)
    ours = make_evaluation_view(image, 64, resize, interpolation)
    assert ours.dtype == np.uint8 and ours.shape == (3, 64, 64) and ours.flags["C_CONTIGUOUS"]
    assert torch.equal(torch.from_numpy(ours).float().div(255), expected)


def test_squash_is_domainbeds():
    image = photo(301, 200)
    expected = transforms.Resize((224, 224))(image)
    assert np.array_equal(
        make_evaluation_view(image, 224, "squash", "bilinear"), np.asarray(expected).transpose(2, 0, 1)
    )


def test_a_grey_image_becomes_rgb():
    assert make_evaluation_view(photo(40, 30).convert("L"), 32, "crop", "bicubic").shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((227, 227), (77, 77)),
        ((300, 200), (77, 116)),
        ((200, 300), (116, 77)),
        ((60, 50), (50, 60)),
        ((1000, 100), (77, 154)),
        ((70, 1000), (140, 70)),
    ],
)
def test_a_training_view_has_room_for_crops_and_is_never_enlarged(shape, expected):
    view = make_training_view(photo(*shape), 64, "bicubic")
    assert view.dtype == np.uint8 and view.shape == (*expected, 3)


def test_a_small_image_is_its_own_training_view():
    image = photo(70, 60)
    assert np.array_equal(make_training_view(image, 64, "bicubic"), np.asarray(image))


@pytest.mark.parametrize("long", [200, 230, 400, 1000])
def test_what_a_training_view_cuts_off_no_crop_would_have_shown(long):
    """The box on the cut image, moved back, is the one on the whole image."""
    whole, cut = np.array([[100, long]] * 500), np.array([[100, min(long, 200)]] * 500)
    before, after = (draw_boxes(sizes, np.random.default_rng(0)) for sizes in (whole, cut))
    after[:, 1] += (long - min(long, 200)) // 2
    assert np.array_equal(before, after)


def test_decoded_images_have_both_views():
    array = np.stack([np.asarray(photo(90, 80, seed)) for seed in range(3)])
    views = DecodedViews(ArrayImages(array, np.array([2, 0, 1])), Preprocess(64, "crop", "bicubic"))
    assert len(views) == 3 and views.labels.tolist() == [2, 0, 1]
    assert np.array_equal(views.load_training_view(1), make_training_view(photo(90, 80, 1), 64, "bicubic"))
    assert np.array_equal(views.load_evaluation_view(2), make_evaluation_view(photo(90, 80, 2), 64, "crop", "bicubic"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known: 'crop', 'squash'"):
        make_evaluation_view(photo(8, 8), 8, "stretch", "bicubic")

"""Views: the batched twin equals torchvision, and draws depend on (seed, epoch, index) alone."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from clustermim.data.views import Draw, ViewConfig, draw, eval_view, eval_views, repeats, train_view, train_views
from clustermim.errors import InputError


def config(size, channels=1, **options):
    return ViewConfig(image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels, **options)


def one(boxes, place):
    return Draw(*(getattr(boxes, name)[place : place + 1] for name in ("top", "left", "height", "width", "flip")))


def by_torchvision(image, boxes, place, size):
    sides = [int(getattr(boxes, name)[place]) for name in ("top", "left", "height", "width")]
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image
    view = reference.resized_crop(
        pixels, *sides, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    return reference.horizontal_flip(view) if boxes.flip[place] else view


@settings(deadline=None, max_examples=15)
@given(
    st.tuples(st.integers(5, 40), st.integers(5, 40)),
    st.tuples(st.integers(3, 40), st.integers(3, 40)),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 99),
)
def test_train_views_equal_torchvision(stored, size, channels, floats, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, channels, *stored), dtype=torch.uint8, generator=generator)
    images = images / 255 if floats else images
    view = config(size, channels, crop_scale=(0.1, 1.0))
    boxes = draw(seed, 1, torch.arange(6), torch.tensor([stored] * 6), view)
    batched = train_views(images, boxes, view)
    assert batched.shape == (6, channels, *size) and batched.dtype == torch.float32
    assert batched.min() >= 0 and batched.max() <= 1
    for place in range(6):
        expected = by_torchvision(images[place], boxes, place, size)
        assert torch.allclose(batched[place], expected, atol=1e-4)
        assert torch.allclose(train_view(images[place], one(boxes, place), view), expected, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.integers(0, 10**6))
def test_draws_lie_inside_the_image(size, index):
    boxes = draw(0, 0, torch.tensor([index]), torch.tensor([size]), config((8, 8)))
    assert boxes.height.item() >= 1 and boxes.top.item() >= 0
    assert boxes.top.item() + boxes.height.item() <= size[0]
    assert boxes.width.item() >= 1 and boxes.left.item() >= 0
    assert boxes.left.item() + boxes.width.item() <= size[1]


@pytest.mark.parametrize("stored", [(400, 400), (200, 400)])
def test_draws_have_the_distribution_of_torchvisions_crops(stored):
    count, view = 3_000, config((8, 8), crop_scale=(0.2, 1.0))
    boxes = draw(0, 0, torch.arange(count), torch.tensor([stored] * count), view)
    torch.manual_seed(0)
    image = torch.zeros(1, *stored)
    drawn = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    for place, name in enumerate(("top", "left", "height", "width")):
        theirs = [params[place] for params in drawn]
        assert stats.ks_2samp(getattr(boxes, name).numpy(), theirs).pvalue > 1e-3
    assert abs(boxes.flip.double().mean() - 0.5) < 0.04


def test_draws_do_not_depend_on_the_batch():
    view, sizes = config((8, 8)), torch.tensor([[20, 30]] * 50)
    whole = draw(4, 2, torch.arange(50), sizes, view)
    part = draw(4, 2, torch.tensor([31, 7]), sizes[:2], view)
    other = draw(4, 3, torch.arange(50), sizes, view)
    for name in ("top", "left", "height", "width", "flip"):
        assert torch.equal(getattr(whole, name)[[31, 7]], getattr(part, name))
    assert not torch.equal(whole.top, other.top)


def test_an_extreme_image_falls_back_to_the_centre():
    view = config((8, 8), crop_scale=(0.9, 1.0))
    boxes = draw(0, 0, torch.arange(20), torch.tensor([[10, 1000]] * 20), view)
    assert boxes.height.eq(10).all() and boxes.width.eq(13).all() and boxes.left.eq(493).all()


def test_no_flip_means_no_flip():
    boxes = draw(0, 0, torch.arange(100), torch.tensor([[8, 8]] * 100), config((8, 8), flip=False))
    assert not boxes.flip.any()


@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(4, 50), st.integers(4, 50)), st.tuples(st.integers(2, 30), st.integers(2, 30)))
def test_eval_views_crop_the_centre_and_resize(stored, size):
    images = torch.randint(0, 256, (3, 2, *stored), dtype=torch.uint8)
    view = config(size, 2)
    batched = eval_views(images, view)
    assert batched.shape == (3, 2, *size)
    scale = min(Fraction(stored[0], size[0]), Fraction(stored[1], size[1]))  # exact, so that halves round alike
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (stored[0] - height) // 2, (stored[1] - width) // 2
    expected = reference.resized_crop(
        images / 255, top, left, height, width, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    assert torch.allclose(batched, expected, atol=1e-5)
    assert torch.allclose(batched[1], eval_view(images[1], view), atol=1e-6)


def test_an_image_of_the_views_size_is_left_alone():
    images = torch.randint(0, 256, (3, 1, 9, 7), dtype=torch.uint8)
    assert torch.equal(eval_views(images, config((9, 7))), images / 255)
    assert torch.equal(eval_view(images[0], config((9, 7))), images[0] / 255)


def test_config_survives_a_dictionary():
    view = config((9, 7), 3, flip=False, crop_scale=(0.3, 0.9))
    assert ViewConfig.from_dict(view.to_dict()) == view
    assert ViewConfig.from_dict({**view.to_dict(), "later": 1}) == view


def test_patch_size_must_divide():
    config((32, 48)).check_patch_size(16)
    with pytest.raises(InputError, match=r"does not divide images of 32x48.*1, 2, 4, 8, 16.*--image-size 30 50"):
        config((32, 48)).check_patch_size(5)
    with pytest.raises(InputError, match=r"patch side of 0"):
        config((32, 48)).check_patch_size(0)


def test_statistics_must_match_the_channels():
    with pytest.raises(InputError, match=r"--mean has 1 value"):
        ViewConfig(image_size=(8, 8), channels=3, mean=(0.5,), std=(1.0,) * 3)


WHOLE = {"flip": False, "crop_scale": (1.0, 1.0)}


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.floats(0.5, 1.0), st.floats(1.0, 2.0)) | st.just((3 / 4, 4 / 3)),
)
def test_views_that_are_said_to_repeat_do(size, ratio):
    view = config((8, 8), crop_ratio=ratio, **WHOLE)
    if not repeats(*size, view):
        return
    boxes = [draw(0, epoch, torch.arange(64), torch.tensor([size] * 64), view) for epoch in range(8)]
    for name in ("top", "left", "height", "width", "flip"):
        assert torch.stack([getattr(found, name) for found in boxes]).unique().numel() == 1


@given(st.integers(1, 5000))
def test_square_images_repeat_where_nothing_is_random(side):
    assert repeats(side, side, config((8, 8), **WHOLE))
    assert not repeats(side, side, config((8, 8), flip=True, crop_scale=(1.0, 1.0)))
    assert not repeats(side, side, config((8, 8), flip=False, crop_scale=(0.9, 1.0)))


def test_a_crop_of_the_whole_area_may_still_be_another_part():
    view = config((8, 8), **WHOLE)
    boxes = draw(0, 0, torch.arange(500), torch.tensor([(6, 8)] * 500), view)
    assert len(set(zip(boxes.height.tolist(), boxes.width.tolist(), strict=True))) > 1
    assert not repeats(6, 8, view)
    assert repeats(10, 40, view)  # no box of such an aspect fits, so the centred one is always taken

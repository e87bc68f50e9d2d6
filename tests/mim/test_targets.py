"""One suite over all targets, then what each promises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.data.loaders import make_loader
from clustermim.data.masks import random_masks
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.features.patches import patchify
from clustermim.features.pixel import PixelFeatures
from clustermim.mim.building import build_model
from clustermim.mim.frequencies import count_tokens, inverse_sqrt_weights
from clustermim.mim.targets import TARGETS, FeatureTarget, PixelTarget, TargetOptions, TokenTarget, make_target
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.tokenizer import Tokenizer


class Brightness(Tokenizer):
    """The simplest tokenizer: how bright a patch is, in so many steps."""

    kind = "brightness"

    def tokens(self, images, index, labels):
        bright = patchify(images, self.patch_size).mean(-1)
        return (bright * self.vocab_size).long().clamp(0, self.vocab_size - 1)


def brightness(channels):
    return Brightness({"vocab_size": 6, "patch_size": 2, "channels": channels, "image_size": [8, 8]})


def options(channels, **more):
    mean, std = (0.4,) * channels, (0.3,) * channels
    return TargetOptions(
        patch_size=2, mean=mean, std=std, tokenizer=brightness(channels), features=pixels(channels), **more
    )


def pixels(channels):
    return PixelFeatures(patch_size=2, mean=(0.4,) * channels, std=(0.3,) * channels)


def kmeans(k=6, channels=2):
    """K-means tokens of random centroids."""
    features = pixels(channels)
    codebook = Codebook(torch.randn(k, features.dim, generator=torch.Generator().manual_seed(0)))
    config = {"vocab_size": k, "patch_size": 2, "channels": channels, "image_size": [8, 4], "dim": features.dim}
    return KMeansTokenizer(config | {"metric": "l2", "features": features.config()}, features, codebook)


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((4, 12), 4)])
def test_smoke(name, size, channels):
    target = make_target(name, options(channels))
    model, _ = build_model(
        "vit_micro", image_size=size, patch_size=2, channels=channels, output_dim=target.output_dim,
        mean=[0.4] * channels, std=[0.3] * channels, decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    images = torch.rand(4, channels, *size)
    mask = random_masks(0, 0, torch.arange(4), model.num_patches, 0.75)
    loss, figures = target(model(images, mask), images, mask, index=torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert all(value.isfinite() and not value.requires_grad for value in figures.values())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
    assert not any(p.requires_grad for p in target.parameters())
    assert target.base_lr > 0


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_only_hidden_patches_count(name):
    target = make_target(name, options(1))
    images = torch.rand(3, 1, 8, 8)
    mask = random_masks(0, 0, torch.arange(3), 16, 0.5)
    predictions = torch.randn(3, 8, target.output_dim)
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    loss = target(predictions, images, mask).loss
    assert torch.equal(loss, target(predictions, torch.where(pixels, images, torch.rand(3, 1, 8, 8)), mask).loss)
    assert not torch.equal(loss, target(predictions, torch.where(pixels, torch.rand(3, 1, 8, 8), images), mask).loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_token_is_cross_entropy(smoothing):
    tokenizer = brightness(2)
    target = TokenTarget(tokenizer, smoothing)
    images, mask = torch.rand(3, 2, 8, 4), random_masks(1, 0, torch.arange(3), 8, 0.5)
    predictions = torch.randn(3, 4, 6)
    wanted = tokenizer.encode(images)[mask]
    loss, figures = target(predictions, images, mask)
    logs = predictions.reshape(-1, 6).log_softmax(-1)
    expected = -((1 - smoothing) * logs[torch.arange(12), wanted] + smoothing * logs.mean(-1)).mean()
    torch.testing.assert_close(loss, expected)
    right = F.one_hot(wanted, 6).view(3, 4, 6).float()
    assert target(10 * right, images, mask).figures["accuracy"] == 1
    assert figures["accuracy"] == (predictions.reshape(-1, 6).argmax(-1) == wanted).float().mean()


def test_soft_targets_by_hand():
    tokenizer = kmeans()
    images, mask = torch.rand(3, 2, 8, 4), random_masks(1, 0, torch.arange(3), 8, 0.5)
    predictions = torch.randn(3, 4, 6)
    rows = tokenizer.features(images)[mask]
    c = tokenizer.codebook.centroids
    between = (c[:, None] - c[None]).square().sum(-1).fill_diagonal_(float("inf")).amin(1).mean()
    goal = (-(rows[:, None] - c[None]).square().sum(-1) / (0.5 * between)).softmax(-1)
    expected = -(goal * predictions.reshape(-1, 6).log_softmax(-1)).sum(-1).mean()
    found = TokenTarget(tokenizer, soft=0.5)(predictions, images, mask)
    torch.testing.assert_close(found.loss, expected)
    # The colder, the nearer to hard tokens.
    hard = TokenTarget(tokenizer)(predictions, images, mask)
    torch.testing.assert_close(TokenTarget(tokenizer, soft=1e-4)(predictions, images, mask).loss, hard.loss)
    assert found.figures["accuracy"] == hard.figures["accuracy"]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9).filter(lambda counts: sum(counts) > 0))
@settings(deadline=None, max_examples=30)
def test_inverse_sqrt_weights(counts):
    counts = torch.tensor(counts)
    weights = inverse_sqrt_weights(counts)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1.0, rel=1e-5)
    for i in range(len(counts)):
        for j in range(len(counts)):
            if counts[i] > 0 and counts[j] > 0:
                ratio = float(weights[i] / weights[j])
                assert ratio == pytest.approx(float((counts[j] / counts[i]).sqrt()), rel=1e-4)


def test_weighted_loss_by_hand_and_counts_by_bincount():
    tokenizer = brightness(2)
    images, mask = torch.rand(3, 2, 8, 4), random_masks(1, 0, torch.arange(3), 8, 0.5)
    predictions, weights = torch.randn(3, 4, 6), torch.rand(6)
    wanted = tokenizer.encode(images)[mask]
    each = -predictions.reshape(-1, 6).log_softmax(-1)[torch.arange(12), wanted]
    loss = TokenTarget(tokenizer, weights=weights)(predictions, images, mask).loss
    torch.testing.assert_close(loss, (each * weights[wanted]).mean())
    with pytest.raises(InputError, match="5 token weights"):
        TokenTarget(tokenizer, weights=torch.ones(5))
    source = open_source(np.random.default_rng(0).integers(0, 256, (7, 8, 8, 2), dtype=np.uint8))
    loader = make_loader(source, batch_size=3, train=False)
    expected = torch.bincount(tokenizer.encode(next(loader.epoch()).images).flatten(), minlength=6)
    rest = [tokenizer.encode(batch.images).flatten() for batch in loader.epoch()][1:]
    expected += torch.bincount(torch.cat(rest), minlength=6)
    assert torch.equal(count_tokens(tokenizer, loader), expected)


@pytest.mark.parametrize("standardise", [None, True, False])
def test_feature_is_mean_squared_error(standardise):
    features = pixels(2)
    target = FeatureTarget(features, standardise)
    images, mask = torch.rand(3, 2, 8, 4), random_masks(1, 0, torch.arange(3), 8, 0.5)
    truth = features(images)[mask].view(3, 4, -1)
    if standardise is not False:
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(target(truth, images, mask).loss, torch.tensor(0.0), atol=1e-10, rtol=0)
    torch.testing.assert_close(target(truth + 3.0, images, mask).loss, torch.tensor(9.0))


def test_perfect_pixels_have_no_loss():
    images, mask = torch.rand(3, 3, 8, 8), random_masks(1, 0, torch.arange(3), 16, 0.75)
    target = PixelTarget(2, [0.4] * 3, [0.3] * 3, norm_pix=False)
    truth = patchify((images - 0.4) / 0.3, 2)[mask].view(3, 12, 12)
    torch.testing.assert_close(target(truth, images, mask).loss, torch.tensor(0.0), atol=1e-10, rtol=0)
    torch.testing.assert_close(target(truth + 2, images, mask).loss, torch.tensor(4.0))
    # A change of brightness or contrast of the whole image leaves norm-pix targets as they are.
    target, predictions = PixelTarget(2, [0.4] * 3, [0.3] * 3), torch.randn(3, 12, 12)
    torch.testing.assert_close(
        target(predictions, images, mask).loss, target(predictions, 0.5 * images + 0.1, mask).loss, atol=1e-3, rtol=1e-3
    )


def test_bad_targets():
    with pytest.raises(InputError, match="Did you mean 'token'"):
        make_target("tokens", options(1))
    with pytest.raises(InputError, match="--tokenizer"):
        make_target("token", TargetOptions(patch_size=2, mean=(0.5,), std=(0.2,)))
    with pytest.raises(InputError, match="smoothing"):
        make_target("token", options(1, label_smoothing=1.0))
    with pytest.raises(InputError, match="soft-targets"):
        make_target("token", options(1, soft=-1.0))
    with pytest.raises(InputError, match="'brightness' have none"):
        make_target("token", options(1, soft=1.0))
    with pytest.raises(InputError, match="--features"):
        make_target("feature", TargetOptions(patch_size=2, mean=(0.5,), std=(0.2,)))
    one = PixelFeatures(patch_size=1, mean=(0.5,), std=(0.2,))
    with pytest.raises(InputError, match="--no-feature-norm"):
        FeatureTarget(one)
    assert FeatureTarget(one, standardise=False).output_dim == 1
    with pytest.raises(InputError, match="variance"):
        make_target("pixel", TargetOptions(patch_size=1, mean=(0.5,), std=(0.2,)))

"""One suite over all targets, then what each promises."""

import pytest
import torch
import torch.nn.functional as F

from clustermim.data.masks import random_masks
from clustermim.errors import InputError
from clustermim.features.patches import patchify
from clustermim.mim.model import build_model
from clustermim.mim.targets import TARGETS, PixelTarget, TargetOptions, TokenTarget, make_target
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
    return TargetOptions(patch_size=2, mean=mean, std=std, tokenizer=brightness(channels), **more)


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
    with pytest.raises(InputError, match="variance"):
        make_target("pixel", TargetOptions(patch_size=1, mean=(0.5,), std=(0.2,)))

"""RandAugment, mixing, drop path and layer-wise rates: counted, bounded, and as their papers say."""

import itertools
import random

import numpy as np
import pytest
import torch

from clustermim.data.sources import open_source
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.evaluation.augmenting import Mixing, RandAugment, seeded
from clustermim.evaluation.classifier import Classifier, layered_groups, set_drop_path


def test_randaugment_is_a_function_of_seed_epoch_and_image() -> None:
    for channels in (1, 3):
        augment = RandAugment("rand-m9-mstd0.5-inc1", channels=channels, mean=(0.5,) * channels, seed=0)
        view = torch.rand(channels, 12, 16)
        random.seed(1)
        first = augment(view, 0, 7)
        random.seed(2)
        assert torch.equal(first, augment(view, 0, 7))
        changed = {tuple(augment(view, epoch, 7).flatten().tolist()) for epoch in range(8)}
        assert len(changed) > 2
        assert first.shape == view.shape and first.min() >= 0 and first.max() <= 1
    with pytest.raises(InputError, match="5 channels"):
        RandAugment("rand-m9", channels=5, mean=(0.5,) * 5, seed=0)


def test_global_generators_are_put_back() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    with seeded(1, 2):
        random.random()
        np.random.rand()  # noqa: NPY002
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("count", [6, 7])
def test_mixed_targets_sum_to_one_and_do_not_depend_on_what_was_drawn_before(
    mixup: float, cutmix: float, count: int
) -> None:
    mixing = Mixing(mixup, cutmix, 0.1, 5, seed=0)
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count) % 5
    kept = images.clone()
    mixed, targets = mixing(images, labels, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    assert torch.equal(images, kept) and mixed.shape == images.shape
    mixing(images, labels, 4)
    again, _ = mixing(images, labels, 3)
    assert torch.equal(mixed, again)
    if mixup == cutmix == 0:
        assert torch.equal(mixed, images)
        torch.testing.assert_close(targets[0], torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]))
    elif count == 7:
        assert torch.equal(mixed[-1], images[-1])


def make_classifier() -> Classifier:
    view = open_source("digits").view
    return Classifier(open_encoder("random:vit_micro?patch_size=4", view=view), 10)


def test_rates_fall_by_a_factor_from_layer_to_layer_and_every_parameter_has_one() -> None:
    classifier = make_classifier()
    groups = layered_groups(classifier, 0.05, 0.75)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in classifier.parameters() if p.requires_grad}
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    model = classifier.encoder.model
    blocks = [scale[id(block.attn.qkv.weight)] for block in model.blocks]
    for below, above in itertools.pairwise(blocks):
        assert below == pytest.approx(0.75 * above)
    assert scale[id(classifier.head.weight)] == 1 and scale[id(model.norm.weight)] == 1
    assert scale[id(model.patch_embed.proj.weight)] == pytest.approx(0.75 * blocks[0])
    assert decay[id(classifier.head.weight)] == decay[id(model.blocks[0].mlp.fc1.weight)] == 0.05
    assert decay[id(classifier.head.bias)] == decay[id(model.norm.weight)] == decay[id(model.cls_token)] == 0
    assert {group["lr_scale"] for group in layered_groups(classifier, 0.05, 1.0)} == {1.0}


def test_drop_path_rises_along_the_blocks_and_is_off_in_evaluation() -> None:
    classifier = make_classifier()
    images = torch.rand(4, 1, 8, 8)
    classifier.head.weight.data.normal_()
    before = classifier.eval()(images)
    depth = set_drop_path(classifier.encoder, 0.5)
    model = classifier.encoder.model
    assert depth == len(model.blocks)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.5 * i / (depth - 1) for i in range(depth)])
    assert torch.equal(before, classifier(images))
    assert not torch.equal(classifier.train()(images), classifier(images))


def test_the_highest_magnitude_is_survived_by_every_operation() -> None:
    # timm's increasing posterize then asks for 0 bits, which Pillow 13 refuses.
    augment = RandAugment("rand-m10-n8-inc1", channels=3, mean=(0.5, 0.5, 0.5), seed=0)
    view = torch.rand(3, 8, 8)
    for index in range(60):
        changed = augment(view, 0, index)
        assert changed.shape == view.shape and changed.min() >= 0 and changed.max() <= 1

"""One suite through which all features go: a row for each way of describing a patch."""

import json

import pytest
import torch
from feature_samples import CNN, images, passes, view, write_run, write_weights

from clustermim.errors import InputError
from clustermim.features.patches import _REGISTRY, PatchFeatures, make_features, rebuild_features

SIDE = 8
CASES = {
    # spec -> D of images with three channels
    "pixel": 192,
    "pixel?standardise=true": 192,
    "pixel?context=12": 432,
    "pixel?whiten=true": 192,
    "pixel?standardise=true&context=10&whiten=true&epsilon=0.01": 300,
    "hog": 36,
    "hog?orientations=6&cell=4&context=16&block=2&norm=l1-sqrt": 9 * 4 * 6,
    f"backbone:{CNN}@WEIGHTS?layer=1&size=32": 32,
    f"backbone:{CNN}@WEIGHTS?layer=1&size=32&dtype=bf16": 32,
    "run:RUN": 32,
    "run:RUN?layer=0&dtype=bf16": 32,
    "pixel+hog": 228,
    "pixel+hog|balance=false": 228,
    "hog|pca=5": 5,
    "pixel?whiten=true+hog|pca=20&whiten=true&epsilon=0.2": 20,
    f"pixel+backbone:{CNN}@WEIGHTS?layer=1&size=32|pca=16": 16,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of all weights, as a spec spells it; a run lies beside them."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    write_run(folder / "run", view(), SIDE)
    return str(folder).replace("+", "%2B")


def make(spec: str, weights: str, channels: int = 3, batch: int = 3) -> PatchFeatures:
    spec = spec.replace("WEIGHTS", f"{weights}/{CNN}.safetensors").replace("RUN", f"{weights}/run")
    features = make_features(spec, patch_size=SIDE, view=view(channels=channels))
    if features.needs_fit:
        features.fit(passes(images(channels=channels, count=40), batch))
    return features


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, weights: str) -> tuple[str, PatchFeatures]:
    return request.param, make(request.param, weights)


def test_every_feature_is_tried() -> None:
    tried = {part.partition("?")[0].partition(":")[0] for spec in CASES for part in spec.partition("|")[0].split("+")}
    assert tried == set(_REGISTRY)


def test_shape_and_variety(case: tuple[str, PatchFeatures]) -> None:
    spec, features = case
    with torch.no_grad():
        got = features(images())
    assert got.shape == (7, 6, CASES[spec]) and features.dim == CASES[spec] and got.dtype == torch.float32
    assert torch.isfinite(got).all() and float(got.flatten(0, 1).var(0).max()) > 0


def test_a_patch_s_description_does_not_depend_on_the_batch(case: tuple[str, PatchFeatures]) -> None:
    x = images()
    with torch.no_grad():
        whole, alone = case[1](x), torch.cat([case[1](image[None]) for image in x])
        none = case[1](x[:0])
    # The order in which products are added up depends on the batch, and 16 bits keep two or three digits.
    tolerance = {"atol": 0.05, "rtol": 0.05} if "bf16" in case[0] else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(whole, alone, **tolerance)
    assert none.shape == (0, *whole.shape[1:])
    assert not case[1].batch_invariant or torch.equal(whole, alone)


@pytest.mark.parametrize("spec", [spec for spec in CASES if "whiten" in spec or "|" in spec or "+" in spec])
def test_the_batches_it_was_fitted_on_decide_nothing(spec: str, weights: str) -> None:
    made = [make(spec, weights, batch=batch) for batch in (1, 7, 40)]
    with torch.no_grad():
        first, *others = (features(images()) for features in made)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-4)
    if CNN not in spec:  # a network's own rounding depends on the batch
        for other in made[1:]:
            assert all(torch.equal(value, made[0].state_dict()[key]) for key, value in other.state_dict().items())


def test_rebuilt_from_config_and_state_alone(case: tuple[str, PatchFeatures]) -> None:
    spec, features = case
    config = json.loads(json.dumps(features.config()).replace("/weights", "/gone"))
    again = rebuild_features(config)
    again.load_state_dict(features.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), features(images()))
    assert again.spec == features.spec.replace("/weights", "/gone") and not again.needs_fit
    assert again.config() == config, spec


def test_frozen_and_always_in_evaluation_mode(case: tuple[str, PatchFeatures]) -> None:
    features = case[1].train()
    before = {key: value.clone() for key, value in features.state_dict().items()}
    with torch.no_grad():
        features(images())
    assert not features.training and not any(p.requires_grad for p in features.parameters())
    assert all(torch.equal(value, before[key]) for key, value in features.state_dict().items())


def test_other_sizes_of_image_are_described_too(case: tuple[str, PatchFeatures]) -> None:
    with torch.no_grad():
        assert case[1](images(24, 16, count=2)).shape == (2, 6, case[1].dim)


def test_images_that_do_not_fit_are_refused(case: tuple[str, PatchFeatures]) -> None:
    with pytest.raises(InputError, match="--channels 3"):
        case[1](images(channels=1))
    with pytest.raises(InputError, match="does not divide"):
        case[1](images(16, 20))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("spec", [spec for spec in CASES if CNN not in spec and "RUN" not in spec])
def test_any_number_of_channels(spec: str, channels: int, weights: str) -> None:
    features = make(spec, weights, channels=channels)
    with torch.no_grad():
        assert features(images(channels=channels)).shape == (7, 6, features.dim)

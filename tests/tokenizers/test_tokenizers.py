"""One suite through which every kind of tokenizer goes, then what is special to each."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from clustermim.data.counted import uniform
from clustermim.data.options import DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.errors import InputError
from clustermim.tokenizers.aligned import AlignedTokenizer, merge_vocabulary
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.importing import import_centroids
from clustermim.tokenizers.tokenizer import KINDS, Tokenizer, load_tokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig

IMAGES, SIDE = 60, 4

# name -> what `fit` is asked for, and which images
CASES: dict[str, dict[str, Any]] = {
    "pixel": {"k": 8},
    "grey": {"k": 8, "channels": 1},
    "five channels": {"k": 8, "channels": 5},
    "square": {"k": 8, "size": (8, 8)},
    "cosine": {"k": 8, "metric": "cosine", "features": "pixel?standardise=true"},
    "context": {"k": 8, "features": "pixel?context=8+pixel"},
    "whitened": {"k": 8, "features": "pixel?whiten=true"},
    "hog": {"k": 8, "features": "hog?context=6&cell=3"},
    "components": {"k": 8, "features": "pixel?whiten=true+hog|pca=9&whiten=true"},
    "backbone": {"k": 8, "features": "backbone:test_resnet@WEIGHTS?layer=2&size=64"},
    "large": {"k": 200},
    "two levels": {"k": 60, "levels": 2, "probes": 3},
    "two levels, cosine": {"k": 20, "levels": 2, "metric": "cosine"},
    "imported": {"k": 8, "imported": "dot"},
    "vqvae": {"k": 8, "kind": "vqvae", "vqvae": VQVAEConfig(epochs=3, width=8, depth=1, code_dim=4)},
    "gumbel": {
        "k": 8,
        "kind": "vqvae",
        "size": (12, 8),
        "channels": 2,
        "vqvae": VQVAEConfig(estimator="gumbel", epochs=3, width=8, depth=1, code_dim=4),
    },
    "random-centroids": {"k": 8, "kind": "random-centroids"},
    "identity": {"kind": "identity"},
    "random": {"k": 8, "kind": "random", "seed": 3},
    "position": {"kind": "position"},
    "oracle": {"kind": "oracle"},
    "aligned": {"kind": "aligned", "k": 6},
}


def source_of(case: dict[str, Any]) -> ImageSource:
    height, width = case.get("size", (8, 12))
    channels = case.get("channels", 3)
    pixels = uniform(5, torch.arange(IMAGES * height * width * channels)).numpy()
    x = pixels.reshape(IMAGES, height, width, channels)
    return open_source((x, np.arange(IMAGES) % 3), split="all")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
    return file


def make(case: dict[str, Any], weights: Path, **more: Any) -> Tokenizer:
    if "imported" in case:
        table = uniform(7, torch.arange(case["k"])[:, None], torch.arange(SIDE * SIDE * 3)) - 0.5
        return import_centroids(table, "pixel", patch_size=SIDE, view=source_of(case).view, metric=case["imported"])
    asked = {key: value for key, value in case.items() if key not in ("size", "channels")} | more
    if "features" in asked:
        asked["features"] = asked["features"].replace("WEIGHTS", str(weights))
    if asked.get("kind") == "aligned":  # made from a fitted one and counts in labelled images
        fine = fit(source_of(case), patch_size=SIDE, k=40)
        assert isinstance(fine, KMeansTokenizer)
        ids = fine.encode(torch.stack([source_of(case)[i][0] for i in range(IMAGES)]))
        tables = np.zeros((2, 40, 3))
        for image in range(0, IMAGES - 4, 2):  # half of the images: some centroids stay without a patch
            np.add.at(tables[image // 2 % 2], (ids[image].numpy(), image % 3), 1.0)
        tables[:, :2] = 0.0
        return merge_vocabulary(fine, tables, asked["k"])
    return fit(source_of(case), patch_size=SIDE, **asked)


Fitted = tuple[Tokenizer, torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=CASES)
def fitted(request: pytest.FixtureRequest, weights: Path) -> Fitted:
    """A tokenizer, images for it, and what `encode` may need beside them."""
    case = CASES[request.param]
    source = source_of(case)
    assert source.labels is not None
    x = torch.stack([source[i][0] for i in range(len(source))])
    beside = {"index": torch.arange(len(x)), "labels": torch.from_numpy(source.labels)}
    return make(case, weights), x, beside


def test_every_kind_is_tried() -> None:
    assert {case.get("kind", "kmeans") for case in CASES.values()} == set(KINDS)


def test_shape_and_range(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    ids = tokenizer.encode(x, **beside)
    assert ids.dtype == torch.int64 and ids.shape == (len(x), math.prod(tokenizer.grid))
    assert tokenizer.grid == (x.shape[2] // SIDE, x.shape[3] // SIDE)
    assert int(ids.min()) >= 0 and int(ids.max()) < tokenizer.vocab_size
    assert ids.unique().numel() > 1


def test_calling_is_encoding_and_both_are_deterministic(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    assert torch.equal(tokenizer(x, **beside), tokenizer.encode(x, **beside))


def test_batches_change_nothing(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    whole = tokenizer.encode(x, **beside)
    parts = [tokenizer.encode(x[i : i + 7], **{k: v[i : i + 7] for k, v in beside.items()}) for i in range(0, 60, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert tokenizer.encode(x[:0], **{k: v[:0] for k, v in beside.items()}).shape == (0, whole.shape[1])


def test_autocast_changes_nothing(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tokenizer.encode(x, **beside)
    assert torch.equal(inside, tokenizer.encode(x, **beside))


def test_saved_and_loaded(fitted: Fitted, tmp_path: Path) -> None:
    tokenizer, x, beside = fitted
    tokenizer.save_pretrained(tmp_path / "t")
    assert {file.name for file in (tmp_path / "t").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for again in (load_tokenizer(tmp_path / "t"), Tokenizer.from_pretrained(tmp_path / "t")):
        assert type(again) is type(tokenizer) and again.config == tokenizer.config
        assert torch.equal(again.encode(x, **beside), tokenizer.encode(x, **beside))
        assert again.fingerprint() == tokenizer.fingerprint()
        assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_what_is_required_is_asked_for(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    assert tokenizer.requires <= {"index", "labels"}
    tokenizer.encode(x, **{name: beside[name] for name in tokenizer.requires})
    for name in tokenizer.requires:
        with pytest.raises(InputError, match=f"each image's {name}"):
            tokenizer.encode(x, **{other: beside[other] for other in beside if other != name})


def test_images_that_do_not_fit_are_refused(fitted: Fitted) -> None:
    tokenizer, x, beside = fitted
    with pytest.raises(InputError, match=f"--channels {tokenizer.channels}"):
        tokenizer.encode(torch.cat([x, x], 1), **beside)
    with pytest.raises(InputError, match="does not divide"):
        tokenizer.encode(x[..., :-1], **beside)


def test_views_that_do_not_fit_are_refused(fitted: Fitted) -> None:
    tokenizer, _, _ = fitted
    height, width = tokenizer.image_size

    def view(**options: Any) -> Any:
        return open_source(np.zeros((4, height, width, tokenizer.channels)), DataOptions(**options)).view

    tokenizer.check_matches(view())
    tokenizer.check_matches(view(), patch_size=SIDE)
    with pytest.raises(InputError, match=f"--image-size {height} {width}"):
        tokenizer.check_matches(view(image_size=(2 * height, width)))
    with pytest.raises(InputError, match=f"--patch-size {SIDE}"):
        tokenizer.check_matches(view(), patch_size=2)
    if tokenizer.channels in (1, 3):
        with pytest.raises(InputError, match=f"--channels {tokenizer.channels}"):
            tokenizer.check_matches(view(channels=4 - tokenizer.channels))


def test_options_left_open_are_the_tokenizer_s(fitted: Fitted) -> None:
    tokenizer, _, _ = fitted
    filled = tokenizer.fill_options(DataOptions(flip=True))
    assert (filled.size, filled.channels, filled.flip) == (tokenizer.image_size, tokenizer.channels, True)
    assert tokenizer.fill_options(DataOptions(image_size=64)).size == (64, 64)


def test_the_config_says_where_it_comes_from(fitted: Fitted) -> None:
    tokenizer, x, _ = fitted
    facts = json.loads(json.dumps(tokenizer.config))["facts"]
    assert facts["versions"]["torch"]
    if facts.get("imported"):
        assert facts["centroids_sha256"] and facts["spec"]
    else:
        assert facts["images"] == len(x) and facts["data_fingerprint"] and "seed" in facts
    if tokenizer.kind == "kmeans" and not facts.get("imported"):
        assert facts["inertia"] > 0 and facts["spec"] and facts["used_tokens"] == tokenizer.vocab_size
    row = tokenizer.rows()[0]
    assert all(isinstance(value, str | int | float | bool) for value in row.values())
    assert "advice" in row or tokenizer.__rich__().row_count == len(row)  # type: ignore[attr-defined]


def test_it_stays_in_evaluation_mode(fitted: Fitted) -> None:
    tokenizer, _, _ = fitted
    holder = torch.nn.Module()
    holder.tokenizer = tokenizer
    assert not any(module.training for module in holder.train().tokenizer.modules())


# ---------------------------------------------------------------------------------------------------------------------
# What is special to each


def test_batch_size_does_not_change_a_fit(weights: Path) -> None:
    made = [make(CASES["pixel"], weights, batch_size=size) for size in (1, 17, 60)]
    assert len({one.fingerprint() for one in made}) == 1
    assert make(CASES["pixel"], weights, seed=1).fingerprint() != made[0].fingerprint()


def test_probes_can_be_set_after_the_fit(weights: Path, tmp_path: Path) -> None:
    made = make(CASES["two levels"], weights)
    assert made.config["levels"] == 2 and made.config["probes"] == 3 and made.facts["cells"] == made.config["cells"]
    every = made.with_probes(made.config["cells"])
    assert made.codebook is not None and made.codebook.probes == 3  # the first is as it was
    assert every.fingerprint() != made.fingerprint()
    x = torch.rand(20, 3, 8, 12)
    described = made.features(x).flatten(0, 1)  # type: ignore[misc]
    assert torch.equal(every(x).flatten(), Codebook(made.codebook.centroids).assign(described))
    every.save_pretrained(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path)(x), every(x))
    with pytest.raises(InputError, match="no cells"):
        make(CASES["pixel"], weights).with_probes(2)


def test_controls_name_what_they_should(weights: Path) -> None:
    x, index, labels = torch.rand(60, 3, 8, 12), torch.arange(60), torch.arange(60) % 3
    assert torch.equal(make(CASES["identity"], weights).encode(x, index=index), torch.arange(60 * 6).view(60, 6))
    assert torch.equal(make(CASES["position"], weights)(x), torch.arange(6).expand(60, 6))
    assert torch.equal(make(CASES["oracle"], weights).encode(x, labels=labels), labels[:, None].expand(60, 6))
    chance = make(CASES["random"], weights, k=5)
    ids = chance.encode(x, index=index)
    assert torch.equal(ids, chance.encode(torch.rand_like(x), index=index))  # of the place, not of the pixels
    many = chance.encode(torch.zeros(1, 3, 8, 12).expand(20_000, -1, -1, -1), index=torch.arange(20_000))
    assert (torch.bincount(many.flatten()) - 24_000).abs().max() < 800
    assert not torch.equal(ids, make(CASES["random"], weights, k=5, seed=4).encode(x, index=index))


def test_random_centroids_have_the_features_mean_and_deviation(weights: Path) -> None:
    made = make(CASES["random-centroids"], weights, k=4000)
    assert made.features is not None and made.codebook is not None
    source = source_of({})
    described = made.features(torch.stack([source[i][0] for i in range(60)])).flatten(0, 1)
    torch.testing.assert_close(made.codebook.centroids.mean(0), described.mean(0), atol=0.12, rtol=0)
    torch.testing.assert_close(made.codebook.centroids.std(0), described.std(0, correction=0), atol=0.08, rtol=0)


def test_merged_tokens_are_groups_of_centroids_and_unseen_ones_join_the_nearest(weights: Path) -> None:
    made = make(CASES["aligned"], weights)
    assert isinstance(made, AlignedTokenizer) and made.codebook is None
    x = torch.stack([source_of({})[i][0] for i in range(IMAGES)])
    fine = made.fine.assign(made.features(x).flatten(0, 1))
    assert torch.equal(made(x).flatten(), made.groups[fine])
    assert set(made.groups.tolist()) == set(range(6))
    facts = made.facts
    assert facts["align_from"] == 40 and facts["fine_tokens_seen"] < 39 and facts["align_prior_patches"] >= 0
    centroids = made.fine.centroids
    nearest = (centroids[:2, None] - centroids[None, 2:]).square().sum(2).argsort(1)
    for unseen in (0, 1):  # tokens 0 and 1 were never seen; neither perhaps was the nearest, so look along the order
        assert any(made.groups[unseen] == made.groups[2 + int(n)] for n in nearest[unseen, :5])
    with pytest.raises(InputError, match="nothing to merge"):
        merge_vocabulary(fit(source_of({}), patch_size=SIDE, k=6), np.ones((2, 6, 3)), 6)  # type: ignore[arg-type]


def test_controls_refuse_images_that_they_never_met(weights: Path) -> None:
    x = torch.rand(2, 3, 8, 12)
    with pytest.raises(InputError, match="images 0 to 59"):
        make(CASES["identity"], weights).encode(x, index=torch.tensor([0, 60]))
    with pytest.raises(InputError, match="classes 0 to 2"):
        make(CASES["oracle"], weights).encode(x, labels=torch.tensor([0, 3]))
    with pytest.raises(InputError, match="8 × 12"):
        make(CASES["position"], weights).encode(torch.rand(2, 3, 12, 8))


def test_a_pixel_tokenizer_takes_larger_images(weights: Path) -> None:
    assert make(CASES["pixel"], weights).encode(torch.rand(1, 3, 16, 20)).shape == (1, 20)


def test_bad_fits_are_told(weights: Path) -> None:
    for more, told in (
        ({"k": 1}, "at least 2"),
        ({"k": 1, "kind": "random"}, "at least 2"),
        ({"k": 361}, "360 among 360"),
        ({"kind": "kmean"}, "Did you mean 'kmeans'"),
        ({"features": "pxel"}, "Did you mean 'pixel'"),
        ({"probes": 2}, "on two levels only"),
        ({"k": 100, "levels": 2, "probes": 11}, "has 10 cells"),
        ({"k": 3, "levels": 2}, "at least 4"),
        ({"kind": "random", "levels": 2}, "one level"),
        ({"k": 361, "levels": 2}, "360 among 360"),
    ):
        with pytest.raises(InputError, match=told):
            make({}, weights, **more)
    with pytest.raises(InputError, match="1, 2, 4"):
        fit(source_of({}), patch_size=5)
    unlabelled = open_source(np.zeros((4, 8, 8, 1)))
    with pytest.raises(InputError, match="label"):
        fit(unlabelled, patch_size=4, kind="oracle")


def test_folders_that_hold_no_tokenizer(weights: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    make(CASES["pixel"], weights).save_pretrained(good)

    def spoilt(name: str, **files: str | bytes | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        for stem, content in files.items():
            file = folder / {"config": "config.json", "weights": "model.safetensors"}[stem]
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    config = json.loads((good / "config.json").read_text())
    cases = {
        tmp_path / "god": "Did you mean '.*good'",
        good / "config.json": "is a file",
        tmp_path: "holds no config.json",
        spoilt("a", weights=None): "holds no model.safetensors",
        spoilt("b", config="{"): "damaged",
        spoilt("c", weights=b"rubbish"): "damaged",
        spoilt("d", config=json.dumps(config | {"kind": "kmens"})): "Did you mean 'kmeans'",
        spoilt("e", config=json.dumps(config | {"vocab_size": 9})): "do not fit each other",
        spoilt("f", config=json.dumps({"kind": "kmeans"})): "incomplete",
        spoilt("g", config="[]"): "kind is None",
    }
    for path, told in cases.items():
        with pytest.raises(InputError, match=told):
            load_tokenizer(path)
    with pytest.raises(InputError, match="from the hub"):
        load_tokenizer("hf:nobody/nothing-of-the-kind")

"""What `show` shows is what the encoder and the model compute, and every sheet and the page are whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.cli import run as command_line
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.features.patches import patchify
from clustermim.mim.predicting import unpatchify
from clustermim.render.encoder_pictures import component_maps, hide_patches, principal_components
from clustermim.verbs.encoder_views import class_attention, look_at_encoder
from clustermim.verbs.prediction_views import look_at_predictions, rebuild_model
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.show_run import show
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from door_samples import random_weights, tiny_beit, tiny_vit, write_tiny_run
from page_checker import check

FEW = DataOptions(limit=40)
TINY: dict[str, Any] = {"patch_size": 2, "epochs": 1, "batch_size": 20, "options": FEW}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A token run, a pixel run with norm-pix and one whose encoder sees mask tokens, each of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = folder / "tokens"
    fit_tokenizer("digits", k=6, patch_size=2, options=FEW, out=tokens)
    pretrain("digits", out=folder / "token", tokenizer=str(tokens), **TINY)
    pretrain("digits", out=folder / "pixel", target="pixel", decoder_dim=32, decoder_heads=8, **TINY)
    pretrain("digits", out=folder / "full", tokenizer=str(tokens), encoder="full", mask_kind="block", **TINY)
    return {name: folder / name for name in ("token", "pixel", "full")}


@pytest.mark.parametrize("name", ["token", "pixel", "full"])
def test_a_run_is_shown_whole(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    shown = show(runs[name], data="digits", out=tmp_path / "show", examples=4, nearest=3, options=FEW)
    assert shown.missing == []
    names = sorted(path.name for path in shown.files)
    assert names == ["attention.png", "features.png", "neighbours.png", "predictions.png", "scatter.png"]
    assert all(Image.open(path).size[0] >= 1000 for path in shown.files)
    found = check(shown.page.read_text())
    assert len(found.images) == 4 * 4
    assert ("Predicted tokens" if name != "pixel" else "Reconstructions") in shown.page.read_text()


def test_predictions_are_those_of_the_model(runs: dict[str, Path]) -> None:
    source = open_source("digits", FEW)
    for name in ("token", "full"):
        model = rebuild_model(runs[name])
        assert model is not None
        found = look_at_predictions(runs[name], open_encoder(runs[name]), source, [0, 7])
        tokenizer = found.tokenizer
        assert tokenizer is not None
        for place, shown in zip([0, 7], found.shown, strict=True):
            image, mask = source[place][0][None], torch.from_numpy(shown.mask).flatten()[None]
            assert shown.true is not None and shown.predicted is not None
            true = tokenizer.encode(image)[0].numpy()
            with torch.no_grad():
                wanted = model(image, mask)[0].argmax(1).numpy()
            assert shown.true.ravel().tolist() == true.tolist()
            assert shown.predicted[shown.mask].tolist() == wanted.tolist()
            assert (shown.predicted == shown.true)[~shown.mask].all()
            assert shown.figure == pytest.approx((wanted == true[shown.mask.ravel()]).mean())


def test_reconstructions_keep_what_is_visible(runs: dict[str, Path]) -> None:
    source = open_source("digits", FEW)
    shown = look_at_predictions(runs["pixel"], open_encoder(runs["pixel"]), source, [3]).shown[0]
    assert shown.rebuilt is not None and shown.mask.sum() == 12
    hidden = shown.mask.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(shown.rebuilt[~hidden], shown.picture[~hidden])
    assert not np.array_equal(shown.rebuilt[hidden], shown.picture[hidden])
    assert (hide_patches(shown.picture, shown.mask)[hidden] == 128).all()


def test_what_cannot_be_shown_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    shown = show("raw-pixels", data="digits", out=tmp_path / "floor", examples=3, options=FEW)
    assert len(shown.missing) == 3 and "Only a run directory" in shown.page.read_text()
    foreign = write_tiny_run(tmp_path / "run", (16, 16))
    (foreign / "model.safetensors").unlink()
    colour = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    shown = show(foreign, data=colour, out=tmp_path / "show", examples=3)
    assert ["no decoder" in reason for reason in shown.missing] == [True]
    text = (runs["token"] / "manifest.json").read_text()
    (runs["token"] / "manifest.json").write_text(text.replace("/tokens", "/gone"))
    source = open_source("digits", FEW)
    missing = look_at_predictions(runs["token"], open_encoder(runs["token"]), source, [0]).missing
    (runs["token"] / "manifest.json").write_text(text)
    assert "tokenizer of this run cannot be opened" in missing


def test_attention_is_that_of_the_last_block() -> None:
    vit = tiny_vit()
    weights = class_attention(open_encoder(vit), images := torch.rand(2, 3, 32, 32))
    assert weights is not None and weights.shape == (2, 16)
    # Values that are the one-hot of their token turn the output of attention into its weights.
    layer = vit.blocks[-1].attn  # type: ignore[index, union-attr]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder = open_encoder(vit)
    with torch.no_grad():
        encoder(images)
        q, k, _ = (part.unflatten(2, (3, 64)).transpose(1, 2) for part in layer.qkv(seen[-1]).chunk(3, dim=2))
        eye = torch.eye(17).expand(2, 3, 17, 17)
        naive = torch.nn.functional.scaled_dot_product_attention(q, k, eye)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(weights, naive)
    assert class_attention(open_encoder(tiny_beit()), images) is None


def test_neighbours_are_the_nearest_others() -> None:
    source = open_source("digits", FEW)
    encoder = open_encoder("raw-pixels", view=source.view)
    view = look_at_encoder(encoder, source, examples=5, nearest=3)
    unit = view.vectors / np.linalg.norm(view.vectors, axis=1, keepdims=True)
    for query, found in view.neighbours:
        order = [i for i in np.argsort(-(unit @ unit[query])).tolist() if i != query]
        assert list(found) == order[:3]


def test_patches_and_components() -> None:
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), (2, 3), 4), images)
    points = np.random.default_rng(0).normal(size=(30, 2)) * [5, 1] @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    found = principal_components(points, 2)
    assert found[:, 0].var() > 10 * found[:, 1].var() and abs(np.corrcoef(found.T)[0, 1]) < 1e-9
    assert principal_components(points, 3)[:, 2].tolist() == [0.0] * 30
    maps = component_maps(np.random.default_rng(0).normal(size=(3, 6, 5)), (2, 3))
    assert len(maps) == 3 and maps[0].shape == (2, 3, 3)


def test_bad_input_is_told_before_anything_is_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (("--run", runs["token"], "--examples", 0), "--examples must be at least 1"),
        (("--run", tmp_path / "no"), "no run directory"),
        (("--run", runs["token"], "--data", "digit"), "'digits'"),
        (("--run", "tim:test_vit"), "Did you mean 'timm:'"),
    ):
        assert command_line(["show", *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert words in message and "Traceback" not in message
    with pytest.raises(InputError, match=r"5|channel"):
        show(random_weights(tiny_vit()), data=np.zeros((5, 32, 32, 5), np.uint8), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

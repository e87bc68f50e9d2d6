"""Tokens of a second round: features of an encoder that was pretrained here."""

import shutil
from pathlib import Path

import pytest
import torch
from feature_samples import images, view, write_run

from clustermim.cli import run as command
from clustermim.data.sources import open_source
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.features.patches import make_features
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.tokenizer import load_tokenizer


def test_they_are_the_encoder_s_patches(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", view(), 8)
    features = make_features(f"run:{folder}", patch_size=8, view=view())
    encoder = open_encoder(folder)
    x = images()
    with torch.no_grad():
        want = encoder(x).patches
        first = encoder.model.forward_intermediates(
            (x - 0.45) / 0.2, indices=[0], output_fmt="NLC", intermediates_only=True
        )[0]
        torch.testing.assert_close(features(x), want, atol=1e-5, rtol=1e-5)
        got = make_features(f"run:{folder}?layer=0", patch_size=8, view=view())(x)
        torch.testing.assert_close(got, first, atol=1e-5, rtol=1e-5)
        half = make_features(f"run:{folder}?dtype=bf16", patch_size=8, view=view())(x)
    assert half.dtype == torch.float32 and 0 < float((half - want).abs().max()) < 0.1


def test_a_tokenizer_made_with_them_outlives_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", view(), 8)
    source = open_source(images(count=40).permute(0, 2, 3, 1).numpy(), split="all")
    made = fit(source, patch_size=8, features=f"pixel+run:{folder}?layer=0|pca=6", k=5)
    made.save_pretrained(tmp_path / "t")
    shutil.rmtree(folder)
    again = load_tokenizer(tmp_path / "t")
    assert torch.equal(again(images()), made(images())) and again.fingerprint() == made.fingerprint()
    assert made(images()).unique().numel() > 1


@pytest.mark.parametrize(
    ("options", "shown", "side", "told"),
    [
        ("", view(), 4, "--patch-size 8"),
        ("", view(channels=1), 8, "--channels 3"),
        ("", view(32, 48), 8, "--image-size 16 24"),
        ("?layer=2", view(), 8, "layers 0 to 1"),
        ("?dtype=fp8", view(), 8, "float32, bf16"),
        ("?size=64", view(), 8, "no option 'size'"),
    ],
)
def test_a_run_that_does_not_fit_is_told(tmp_path: Path, options: str, shown: object, side: int, told: str) -> None:
    folder = write_run(tmp_path / "run", view(), 8)
    with pytest.raises(InputError, match=told):
        make_features(f"run:{folder}{options}", patch_size=side, view=shown)  # type: ignore[arg-type]


def test_what_is_no_run_is_told_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for features, told in (("run", "name the run directory"), (f"run:{tmp_path}", "manifest"), ("run:gone", "gone")):
        arguments = ["tokenizer", "fit", "--features", features, "--limit", "20", "--out", str(tmp_path / "t")]
        assert command(arguments) == 2
        assert told in capsys.readouterr().err

"""Checkpoints of other projects: found inside their wrappers, sized by their tensors, loaded whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from clustermim.encoders.foreign import HALF, IMAGENET, read_foreign
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from door_samples import MEAN, STD, foreign_content, tiny_beit, tiny_mim, tiny_vit

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normalised(images: torch.Tensor, statistics: tuple[Any, Any]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (images - mean) / std


@pytest.mark.parametrize("kind", ["bare", "mae", "dino", "ibot", "moco", "ema", "lightning"])
def test_wrappers_come_off_and_the_teacher_is_taken(kind: str, tmp_path: Path) -> None:
    model = tiny_vit()
    torch.save(foreign_content(kind, model.state_dict()), tmp_path / "c.pth")
    encoder = open_encoder(f"mae:{tmp_path / 'c.pth'}")
    with torch.no_grad():
        expected = model.forward_features(normalised(IMAGES, IMAGENET))  # type: ignore[operator]
        found = encoder(IMAGES)
    torch.testing.assert_close(found.cls, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches, expected[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_ratio": 2.0},
        {"qkv_bias": False},
        {"init_values": 0.1},
        {"global_pool": "avg"},
        {"img_size": (24, 40)},
        {"in_chans": 1},
        {"patch_size": 4},
    ],
    ids=str,
)
def test_what_the_tensors_tell_is_found(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_vit(**changes)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    size = changes.get("img_size", (32, 32))
    channels = changes.get("in_chans", 3)
    found = read_foreign(tmp_path / "c.pth", image_size=size, mean=[0.5], std=[0.5])
    built = found.build("c.pth")
    images = torch.rand(1, channels, *size)
    with torch.no_grad():
        torch.testing.assert_close(built(images), model(images), rtol=0, atol=1e-6)
    assert (found.image_size, found.channels) == (size, channels) and found.mean == (0.5,) * channels


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "global_pool": "token"},
        {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "global_pool": "avg"},
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "global_pool": "token"},
        {"use_rel_pos_bias": True, "init_values": None, "use_abs_pos_emb": True, "global_pool": "token"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_beit_becomes_timms_beit(changes: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    model = tiny_beit(**changes)
    extra = {"mask_token": torch.ones(1, 1, 32), "lm_head.weight": torch.ones(5, 32)}
    index = {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    torch.save({"model": model.state_dict() | extra | index}, tmp_path / "beit.pth")
    encoder = open_encoder(f"mae:{tmp_path / 'beit.pth'}?size={size[0]}x{size[1]}")
    # timm's own way to another size is the oracle
    model.set_input_size(img_size=size)  # type: ignore[operator]
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = model.forward_features(normalised(images, HALF))  # type: ignore[operator]
        found = encoder(images)
    torch.testing.assert_close(found.patches, expected[:, 1:], rtol=0, atol=1e-5)
    whole = model.forward_head(expected, pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(found.cls, whole, rtol=0, atol=1e-5)


def test_positions_are_resampled_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    model, _ = tiny_mim((32, 32))
    torch.save({"model": model.mae_state()}, tmp_path / "mae.pth")
    found = read_foreign(tmp_path / "mae.pth", image_size=(24, 48), heads=4)
    for key, state in (("pos_embed", found.encoder), ("decoder_pos_embed", found.decoder)):
        expected = resample_abs_pos_embed(model.mae_state()[key], [3, 6], old_size=[4, 4], num_prefix_tokens=1)
        torch.testing.assert_close(state[key], expected)
    same = read_foreign(tmp_path / "mae.pth", heads=4)
    assert all(torch.equal(value, model.mae_state()[key]) for key, value in (same.encoder | same.decoder).items())
    assert set(same.encoder | same.decoder) == set(model.mae_state())


def fails(path: Path, words: str, **options: Any) -> None:
    with pytest.raises(InputError, match=words):
        read_foreign(path, **options).build(str(path))


def test_what_is_open_must_be_told(tmp_path: Path) -> None:
    model, _ = tiny_mim((24, 32))
    file = tmp_path / "c.pth"
    torch.save(model.mae_state(), file)
    fails(file, "how many attention heads a ViT of width 128 has.*--heads")
    fails(file, "not those of a square image.*--image-size", heads=4)
    fails(file, "cannot have 5 attention heads", heads=5, image_size=(24, 32))
    fails(file, "patches of side 8, which does not divide 20", heads=4, image_size=(20, 32))
    fails(file, r"--mean .* does not fit", heads=4, image_size=(24, 32), mean=MEAN[:2], std=STD)
    grey = tiny_vit(in_chans=2)
    torch.save(grey.state_dict(), file)
    fails(file, r"2 channel\(s\), and nothing tells its mean and std")


def test_another_architecture_names_the_first_key_and_both_shapes(tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    state = dict(tiny_vit().state_dict())
    torch.save(state | {"blocks.1.mlp.fc2.weight": torch.zeros(192, 700)}, file)
    fails(file, r"blocks\.1\.mlp\.fc2\.weight is \(192, 700\), the model's is \(192, 768\)")
    torch.save({key: value for key, value in state.items() if key != "blocks.1.norm2.bias"}, file)
    fails(file, r"blocks\.1\.norm2\.bias \(192,\) is not in it")
    torch.save(state | {"reg_token": torch.zeros(1, 4, 192)}, file)
    fails(file, r"holds reg_token \(1, 4, 192\), which a plain ViT or BEiT has no place for")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, file)
    fails(file, r"no vision transformer.*conv1\.weight \(64, 3, 7, 7\)")
    torch.save({key: value for key, value in state.items() if key != "cls_token"}, file)
    fails(file, r"no cls_token \(1, 1, 192\)")
    torch.save({key: value for key, value in state.items() if not key.startswith("blocks.0")}, file)
    fails(file, "blocks are numbered")
    torch.save({"epoch": 3}, file)
    fails(file, "no tensors at all")

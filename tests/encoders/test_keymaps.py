"""Key maps between our layout, MAE's and timm's are one-to-one."""

import pytest
import torch

from clustermim.encoders.keymaps import from_mae_layout, to_mae_layout, to_timm, unwrap
from clustermim.errors import InputError

ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.bias")
DECODER = (
    "decoder_embed.weight",
    "mask_token",
    "decoder_pos_embed",
    "decoder_blocks.0.norm1.weight",
    "decoder_norm.bias",
    "decoder_pred.weight",
)
OURS = {f"encoder.{k}": torch.tensor(i) for i, k in enumerate(ENCODER)} | {
    k: torch.tensor(100 + i) for i, k in enumerate(DECODER)
}


def test_there_and_back() -> None:
    flat = to_mae_layout(OURS | {"tokenizer.centroids": torch.zeros(2)})
    assert set(flat) == {*ENCODER, *DECODER}
    assert from_mae_layout(flat) == OURS
    assert set(to_timm(OURS)) == set(to_timm(flat)) == set(ENCODER)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "state_dict_ema", None])
def test_wrappers_come_off(wrap: str | None) -> None:
    inner = {"module.norm.bias": torch.zeros(1)}
    assert set(unwrap({wrap: inner, "epoch": 3} if wrap else inner)) == {"norm.bias"}


def test_nothing_inside_is_said() -> None:
    with pytest.raises(InputError, match=r"here\.pth holds no weights.*epoch"):
        unwrap({"epoch": 3}, "here.pth")

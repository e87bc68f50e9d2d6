"""Operations counted against the formula on paper; peaks by the names that drivers give."""

import pytest
import torch

from clustermim.mim.building import build_model
from clustermim.mim.costs import known_peak, peak_flops, training_flops


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_flops_are_those_on_paper(decoder):
    model, _ = build_model(
        "vit_micro", image_size=16, patch_size=4, channels=3, output_dim=7, mean=[0.5] * 3, std=[0.2] * 3,
        decoder=decoder, decoder_dim=32, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    d, w, seen, asked = 128, 32, 5, 6  # width, decoder's width, class token and 4 visible patches, 6 of 12 predicted
    products = 4 * 48 * d + 6 * (12 * d * d * seen + 2 * seen * seen * d) + seen * d * w + asked * w * 7
    if decoder == "self":
        tokens = seen + asked
        products += 12 * w * w * tokens + 2 * tokens * tokens * w
        products += 2 * w * w * tokens + 10 * w * w * asked + 2 * asked * tokens * w  # the last: what is asked for
    else:
        products += 2 * (2 * w * w * seen + 10 * w * w * asked + 2 * asked * seen * w)
    assert training_flops(model, 12, asked) == 3 * 2 * products
    assert model.mask_token.device.type == "cpu"


def test_peaks():
    assert known_peak("NVIDIA H100 80GB HBM3", True) == 989e12
    assert known_peak("NVIDIA H100 PCIe", True) == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB", False) == 156e12
    assert known_peak("NVIDIA L40S", True) == 362e12
    assert known_peak("Somebody's GPU", True) is None
    state = torch.get_rng_state()
    assert peak_flops(torch.device("cpu"), "32-true") > 1e9
    assert torch.equal(state, torch.get_rng_state())
    assert peak_flops(torch.device("mps"), "32-true") is None

"""What a step of masked pretraining costs in floating-point operations, and how many the device can do a second.

Their quotient is the model FLOPs utilisation (MFU; Chowdhery et al. 2022, "PaLM", appendix B): the share of the
device's peak that the model's own operations take, whatever is computed twice to save memory.
"""

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from clustermim.mim.contract import MaskedModel

PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 1100e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "A10": (125e12, 62e12),
    "RTX 4090": (165e12, 82e12),
    "RTX 3090": (71e12, 36e12),
    "RTX A6000": (155e12, 77e12),
}
"""Part of a GPU's name -> FLOP/s in bfloat16 and in TensorFloat-32, dense, from NVIDIA's data sheets."""

_SIDE = 1024


def training_flops(model: MaskedModel, hidden: int, asked: int) -> int:
    """Floating-point operations for one image: forward, and twice that for the backward pass; products only.

    Parameters
    ----------
    model
        Copied without its numbers; nothing is computed.
    hidden, asked
        Patches hidden of an image, and those of them that are predicted.
    """
    shape = copy.deepcopy(model).to("meta")
    rows, columns = model.grid
    images = torch.empty(1, model.channels, rows * model.patch_size, columns * model.patch_size, device="meta")
    mask = torch.empty(1, model.num_patches, dtype=torch.bool, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape(images, mask, hidden, mask if asked < hidden else None, asked)
    return 3 * int(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device at its best: from `PEAKS` for known GPUs, measured on a CPU, None for others.

    Parameters
    ----------
    device
        Where training runs.
    precision
        `32-true` or `bf16-mixed`.
    """
    low = "bf16" in precision
    if device.type == "cuda":
        return known_peak(torch.cuda.get_device_name(device), low)
    if device.type != "cpu":
        return None
    kind = torch.bfloat16 if low else torch.float32
    square = torch.ones(_SIDE, _SIDE, dtype=kind)
    square @ square
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - began)
    return 2.0 * _SIDE**3 / best


def known_peak(name: str, low: bool) -> float | None:
    """The entry of `PEAKS` for a GPU of this name, in bfloat16 where `low`; the longest part that fits counts."""
    words = name.replace("-", " ")
    fitting = [part for part in PEAKS if f" {part} " in f" {words} "]
    return PEAKS[max(fitting, key=len)][0 if low else 1] if fitting else None

"""What a run would cost, before it is started: model size, and time and memory from a few measured steps."""

import resource
import sys
import time
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric

from clustermim.data.loaders import Loader
from clustermim.mim.contract import MaskedModel
from clustermim.mim.costs import peak_flops, training_flops
from clustermim.mim.pretraining import Masking, PretrainConfig, choose_kernels, compiled, masked_loss
from clustermim.mim.targets import Target
from clustermim.training.optimiser import make_adamw
from clustermim.training.sharding import set_up

_MEASURE_SECONDS = 3.0
_MEASURE_STEPS = 20


def estimate(
    fabric: Fabric, model: MaskedModel, target: Target, loader: Loader, config: PretrainConfig
) -> dict[str, Any]:
    """Take a few real steps on throw-away weights and say what the whole run would take.

    Parameters
    ----------
    fabric, model, target, loader, config
        As for `pretraining.train`; the weights of `model` are changed.

    Returns
    -------
    dict
        `steps` of the whole run, `encoder_parameters`, `decoder_parameters`, `flops_per_image` (forward and backward),
        `images_per_second`, `mfu` where the device's peak is known, `seconds` of the
        whole run, and `memory_bytes`: on CUDA the peak that the step allocates, elsewhere that of this process.
    """
    encoder = sum(p.numel() for p in model.encoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    masking = Masking(config, model.grid)
    flops = training_flops(model, masking.hidden, masking.asked)
    able = peak_flops(fabric.device, str(fabric.strategy.precision.precision))
    choose_kernels(model, fabric)
    forward, optimiser = set_up(fabric, compiled(model) if config.compile else model, partial(make_adamw, lr=1e-6))
    fabric.to_device(target)
    cuda = fabric.device.type == "cuda"

    taken: list[float] = []
    parts = loader.epoch(0)
    while len(taken) < _MEASURE_STEPS and (len(taken) < 3 or sum(taken) < _MEASURE_SECONDS):
        began = time.monotonic()
        for _ in range(config.accumulate):
            batch = next(parts, None)
            if batch is None:
                parts = loader.epoch(0)
                batch = next(parts)
            fabric.backward(masked_loss(forward, target, batch, masking, 0).loss / config.accumulate)
        optimiser.step()
        optimiser.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.monotonic() - began)
    # The first step pays for allocation, and for compilation where that is on.
    later = sorted(taken[1:])
    per_step = later[len(later) // 2]
    steps = config.total_steps(len(loader) // config.accumulate)
    # The kernel counts in kilobytes on Linux, in bytes on macOS.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rate = config.batch_size / per_step
    return {
        "steps": steps,
        "encoder_parameters": encoder,
        "decoder_parameters": everything - encoder,
        "flops_per_image": flops,
        "images_per_second": rate,
        **({} if able is None else {"mfu": rate * flops / (able * fabric.world_size)}),
        "seconds": taken[0] + per_step * max(0, steps - 1),
        "memory_bytes": int(torch.cuda.max_memory_allocated()) if cuda else int(resident),
    }

"""Frozen features, computed once for each encoder and source and then shared by all protocols, in memory or on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float, Shaped
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.data.loaders import Loader
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError
from clustermim.runs import atomic_save

Layers = Literal["last", "all"]
Which = Layers | tuple[int, ...]
"""Or the numbers of the layers themselves."""

Vectors = dict[tuple[int, str], Float[Tensor, "n d"]]
"""(layer, pool) -> one float32 vector an image, on the CPU; the width may differ from layer to layer."""

Progress = Callable[[str, int, int], None]
"""(what is being done, images done, images in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, a file for each encoder, source, view and choice of layers; safe to share and to delete."""

    folder: Path

    def path(self, encoder: Encoder, loader: Loader, layers: Which, data_fingerprint: str) -> Path:
        """Where these features lie or would lie: whatever they depend on is in the name."""
        facts = {
            "encoder": fingerprint(encoder),
            "data": data_fingerprint,
            "view": loader.view.to_dict(),
            "layers": layers,
            "device": loader.device.type,
            "versions": [metadata.version(name) for name in ("torch", "timm")],
        }
        return self.folder / f"features-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.safetensors"

    @staticmethod
    def read(path: Path) -> Vectors:
        """Features of an earlier call."""
        found: Vectors = {}
        for key, block in safetensors.torch.load_file(path).items():
            layer, _, pool = key.partition(".")
            found[int(layer), pool] = block
        return found

    @staticmethod
    def write(path: Path, vectors: Vectors) -> None:
        """Keep features, whole or not at all; ResourceError when they cannot be written."""
        named = {f"{layer}.{pool}": block.contiguous() for (layer, pool), block in vectors.items()}
        atomic_save(path, lambda file: safetensors.torch.save_file(named, file))


def fingerprint(encoder: Encoder) -> str:
    """Identifies an encoder: structure, settings and weights, whatever it is called; 64 hexadecimal digits.

    Code is not part of it: a module whose `forward` is edited keeps its fingerprint.
    """
    digest = hashlib.sha256(str(encoder).encode())
    for name, module in encoder.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if key not in ("name", "training") and not key.startswith("__") and _is_plain(value)
        }
        digest.update(f"{name} {type(module).__qualname__} {plain}".encode())
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def extract(
    encoder: Encoder,
    loader: Loader,
    layers: Which = "last",
    *,
    cache: FeatureCache | None = None,
    data_fingerprint: str = "",
    fabric: Fabric | None = None,
    progress: Progress = silent,
) -> Vectors:
    """Run every image of a loader through an encoder once.

    Parameters
    ----------
    encoder
        On the loader's device.
    loader
        With `train=False`; of the rank and world size of `fabric`, if there is one.
    layers
        `last`, `all` of them, or the numbers of some.
    cache
        Where to look first, and where to leave the features.
    data_fingerprint
        Of the source, for the cache.
    fabric
        Joins the parts of several processes; each gets all features.
    progress
        Told after each batch.

    Returns
    -------
    dict
        Under every pool that the encoder has: its global vector and the mean of its patches.

    Raises
    ------
    InputError
        The encoder gives NaN or infinite features.
    """
    path = None if cache is None else cache.path(encoder, loader, layers, data_fingerprint)
    if cache is not None and path is not None and path.is_file():
        return cache.read(path)
    source, which = loader.source, chosen_layers(encoder, layers)
    parts: dict[tuple[int, str], list[Tensor]] = {}
    done = 0
    with torch.inference_mode():
        for batch in loader.epoch():
            for layer, output in zip(which, encoder.layers(batch.images, which), strict=True):
                for pool, block in output.pooled(encoder.global_name).items():
                    if not block.isfinite().all():
                        raise InputError(
                            f"{encoder.name} gives NaN or infinite features (layer {layer}, {pool}) for images of "
                            f"{source.name}. Its weights may be damaged, or made by a training that diverged."
                        )
                    parts.setdefault((layer, pool), []).append(block.float().cpu())
            done += len(batch.index)
            progress(f"features of {encoder.name} on {source.name} ({source.split})", done, len(source))
    vectors = {key: join(torch.cat(blocks), fabric) for key, blocks in parts.items()}
    if cache is not None and path is not None and (fabric is None or fabric.is_global_zero):
        cache.write(path, vectors)
    return vectors


def chosen_layers(encoder: Encoder, layers: Which) -> Sequence[int]:
    """Numbers of the layers that are judged."""
    if isinstance(layers, tuple):
        return layers
    return range(encoder.depth) if layers == "all" else range(encoder.depth - 1, encoder.depth)


def join(block: Shaped[Tensor, "part ..."], fabric: Fabric | None) -> Shaped[Tensor, "whole ..."]:
    """The blocks of all processes one behind the other, on the CPU, in each of them; they may differ in length."""
    if fabric is None or fabric.world_size == 1:
        return block.cpu()
    sizes: Any = fabric.all_gather(torch.tensor(len(block), device=fabric.device))
    longest = int(sizes.max())
    padded = torch.zeros(longest, *block.shape[1:], dtype=block.dtype, device=fabric.device)
    padded[: len(block)] = block
    gathered: Any = fabric.all_gather(padded)
    return torch.cat([part[: int(size)] for part, size in zip(gathered, sizes, strict=True)]).cpu()

"""From images to a trained VQ-VAE tokenizer: first codes by K-means, training, and the check on images held out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.data.counted import Stream
from clustermim.data.loaders import Loader, make_loader
from clustermim.data.sources import ImageSource
from clustermim.data.splits import hold_out, seeded_order
from clustermim.errors import InputError, NonFiniteLossError
from clustermim.runs import RunDirectory
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.signatures import note_signatures
from clustermim.tokenizers.vqvae.model import VQVAE
from clustermim.tokenizers.vqvae.tokenizer import CodeSpaceFeatures, VQVAETokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig, train
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest

_HELD_OUT, _MOST_HELD_OUT = 0.05, 2000  # share of the images, and their largest number
_ROWS_A_CODE = 64  # encoder outputs for each code that K-means starts from
_START_PASSES = 10


def check(source: ImageSource, *, patch_size: int, k: int, batch_size: int, processes: int) -> tuple[int, int]:
    """Refuse, before any work, what cannot be trained; returns the images to train on and the batch of one process.

    Parameters
    ----------
    source
        Images.
    patch_size, k
        Patch side and number of codes.
    batch_size
        Images a step over all processes; all of them are taken where there are fewer.
    processes
        Among which a step is divided.

    Raises
    ------
    InputError
        Fewer than two images, more codes than patches, or a batch that cannot be divided.
    """
    source.view.check_patch_size(patch_size)
    if k < 2:
        raise InputError(f"A vocabulary of k = {k} tells no patches apart; choose k of at least 2.")
    if len(source) < 2:
        raise InputError(
            f"{source.name} ({source.split}) has {len(source)} image(s); a VQ-VAE takes at least 2, because one is "
            "held out for the check at the end."
        )
    training = int((~held_out(source)).sum())
    height, width = source.view.image_size
    patches = training * (height // patch_size) * (width // patch_size)
    if k > patches:
        raise InputError(
            f"k = {k} is more than there are patches to learn from: {patches} in {training} images. Choose k of at "
            f"most {patches}, a smaller patch side, or more images."
        )
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {batch_size}.")
    per_process = min(batch_size, training) // processes
    if batch_size % processes and batch_size <= training:
        raise InputError(f"--batch-size {batch_size} cannot be divided over {processes} processes.")
    if per_process < 1:
        raise InputError(f"A batch of {min(batch_size, training)} images cannot be divided over {processes} processes.")
    return training, per_process


def held_out(source: ImageSource) -> np.ndarray:
    """Which images are kept from training for the final check: one in twenty, groups kept whole; (n,) bool."""
    # No stratification by class: a tokenizer must come out the same with labels as without.
    fraction = min(_HELD_OUT, _MOST_HELD_OUT / len(source))
    return hold_out(np.zeros(len(source), dtype=np.int64), fraction, seed=0, groups=source.groups)


def fit_vqvae(
    source: ImageSource,
    *,
    patch_size: int,
    k: int,
    seed: int,
    batch_size: int,
    config: VQVAEConfig,
    fabric: Fabric,
    workers: int | None,
    facts: dict[str, Any],
    run: RunDirectory | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
) -> VQVAETokenizer:
    """Train a VQ-VAE on the train views of a source.

    Parameters
    ----------
    source
        Images; their own view decides size, channels, mean, std, crops and flips.
    patch_size, k
        Patch side and number of codes.
    seed
        Of weights, first codes, order, views, restarts and draws.
    batch_size
        Images a step over all processes, at most all of them.
    config
        Networks, estimator and training.
    fabric
        Launched.
    workers
        As for `make_loader`.
    facts
        Provenance to note in the tokenizer's config.
    run, checkpoints, stop
        As for `train`.

    Returns
    -------
    VQVAETokenizer
        On the CPU. Its facts hold, for the eval views of the held-out images, ``reconstruction_mse`` (squared units of
        [0, 1]), ``mean_mse`` (what predicting each channel's mean costs), ``perplexity`` and ``used_tokens``, and
        ``train_reconstruction_mse`` on as many training images.

    Raises
    ------
    InputError
        See `check`.
    """
    view = source.view
    _, part = check(source, patch_size=patch_size, k=k, batch_size=batch_size, processes=fabric.world_size)
    apart = held_out(source)
    training, kept = source.subset(np.flatnonzero(~apart)), source.subset(np.flatnonzero(apart))

    def batches(images: ImageSource, *, train: bool) -> Loader:
        rank, world_size = (fabric.global_rank, fabric.world_size) if train else (0, 1)
        return make_loader(
            images,
            view,
            batch_size=part,
            train=train,
            seed=seed,
            device=fabric.device,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )

    model = VQVAE(
        config.make_quantiser(k, seed=seed),
        patch_size=patch_size,
        mean=view.mean,
        std=view.std,
        width=config.width,
        depth=config.depth,
        seed=seed,
    )
    loader = batches(training, train=True)
    patches = (view.image_size[0] // patch_size) * (view.image_size[1] // patch_size)
    rows = part * fabric.world_size * patches

    def start(made: VQVAE) -> None:
        some = training.subset(seeded_order(seed, Stream.SAMPLE, len(training))[: -(-_ROWS_A_CODE * k // patches)])
        start_codes(made, [batches(some, train=False), batches(training, train=False)], k, seed, rows)

    row = train(fabric, model, start, loader, config, run, checkpoints, stop)
    with torch.no_grad():
        seen = training.subset(np.arange(min(len(kept), len(training))))
        figures = evaluate(model, batches(kept, train=False)) | {
            "train_reconstruction_mse": evaluate(model, batches(seen, train=False))["reconstruction_mse"]
        }
    model = model.cpu().to(memory_format=torch.contiguous_format)  # as it will be loaded: the same bits
    features = CodeSpaceFeatures(
        patch_size=patch_size,
        width=config.width,
        depth=config.depth,
        code_dim=config.code_dim,
        mean=view.mean,
        std=view.std,
        encoder=model.encoder,
    )
    made = {
        "kind": "vqvae",
        "vocab_size": k,
        "patch_size": patch_size,
        "channels": view.channels,
        "image_size": list(view.image_size),
        "features": features.config(),
        "dim": config.code_dim,
        "metric": "l2",
    }
    told = {
        "estimator": config.estimator,
        "epochs": config.epochs_for(len(training)),
        "batch_size": part * fabric.world_size,
        "training_images": len(training),
        "held_out_images": len(kept),
        "steps": row["step"],
        "train_perplexity": row["perplexity"],
        "spec": features.spec,
    }
    tokenizer = VQVAETokenizer(
        made | {"facts": facts | told | figures}, features, Codebook(model.quantiser.codes.detach()), model.decoder
    )
    note_signatures(tokenizer, source, batch_size=part, device=fabric.device, workers=workers)
    return tokenizer


@torch.no_grad()
def start_codes(model: VQVAE, loaders: list[Loader], k: int, seed: int, rows: int) -> None:
    """First codes: K-means on the outputs of the untrained encoder.

    Parameters
    ----------
    model
        Its quantiser gets the codes.
    loaders
        Eval views of a part of the images, and of more of them in case that part has too few distinct patches.
    k, seed
        As for `fit_kmeans`.
    rows
        Patches of a step.

    Raises
    ------
    InputError
        There are fewer than k distinct patches in all of the loaders.
    NonFiniteLossError
        The encoder has diverged.
    """
    for loader in loaders:

        def blocks(images: Loader = loader) -> Iterator[Tensor]:
            for batch in images.epoch():
                z = model.encode(batch.images).permute(0, 2, 3, 1).flatten(0, 2)
                if not bool(z.isfinite().all()):
                    raise NonFiniteLossError(
                        "What the encoder makes of the images is NaN or infinite already in the steps before the "
                        "first codes. Lower --lr, or use --precision 32-true."
                    )
                yield z

        try:
            found = fit_kmeans(blocks, k, seed=seed, n_init=1, max_passes=_START_PASSES)
        except InputError:
            if loader is loaders[-1]:
                raise
            continue
        model.quantiser.start(found.centroids, found.inertia / found.num_rows, rows)
        return


def evaluate(model: VQVAE, loader: Loader) -> dict[str, Any]:
    """Reconstruction through the nearest codes, and the use of the codes, on each image once.

    Returns
    -------
    dict
        ``reconstruction_mse`` and ``mean_mse`` (predicting each channel's mean) in squared units of [0, 1],
        ``perplexity``, ``used_tokens``.
    """
    error = flat = torch.zeros((), dtype=torch.float64)
    values = 0
    counts = torch.zeros(model.quantiser.size, dtype=torch.int64)
    for batch in loader.epoch():
        z = model.encode(batch.images).permute(0, 2, 3, 1)
        ids = model.quantiser.nearest(z.flatten(0, 2))
        rebuilt: Tensor = model.decoder(model.quantiser.codes[ids].view(z.shape).permute(0, 3, 1, 2))
        error = error + _squares(rebuilt * model.std + model.mean - batch.images)
        flat = flat + _squares(batch.images - model.mean)
        values += batch.images.numel()
        counts += torch.bincount(ids, minlength=len(counts)).cpu()
    share = counts[counts > 0].double() / counts.sum()
    return {
        "reconstruction_mse": float(error) / values,
        "mean_mse": float(flat) / values,
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
        "used_tokens": int((counts > 0).sum()),
    }


def _squares(x: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    return x.square().sum().double().cpu()

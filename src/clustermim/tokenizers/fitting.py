"""From images to a tokenizer: describe the patches, cluster them, note how it was done."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.data.counted import Stream, uniform
from clustermim.data.loaders import Loader, make_loader
from clustermim.data.sources import require_labels
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.errors import InputError
from clustermim.features.moments import Spread
from clustermim.features.patches import PatchFeatures, make_features
from clustermim.runs import environment_facts
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.kmeans import MAX_PASSES, TOL, KMeansResult, fit_kmeans
from clustermim.tokenizers.nearest import FitMetric
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.signatures import note_signatures
from clustermim.tokenizers.streams import Blocks
from clustermim.tokenizers.tokenizer import Tokenizer, class_of
from clustermim.tokenizers.twolevelfit import TWO_LEVELS_FROM, TwoLevelResult, check_levels, fit_two_levels
from clustermim.tokenizers.vqvae.fitting import fit_vqvae
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import Device, StopRequest, make_fabric


def fit(
    source: AnySource,
    *,
    patch_size: int,
    features: str | PatchFeatures = "pixel",
    k: int = 50,
    kind: str = "kmeans",
    metric: FitMetric = "l2",
    seed: int = 0,
    n_init: int | None = None,
    max_passes: int = MAX_PASSES,
    tol: float = TOL,
    levels: int | None = None,
    probes: int | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: bool = False,
    fit_views: Literal["eval", "train"] = "eval",
    vqvae: VQVAEConfig | None = None,
    fabric: Fabric | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
) -> Tokenizer:
    """Make a tokenizer of any kind from the images of a source; a VQ-VAE always from its train views.

    Parameters
    ----------
    source
        Images; their own view decides size, channels, mean and std.
    patch_size
        Patch side P in pixels.
    features
        What patches are described by; for the kinds that look at pixels.
    k
        Vocabulary, at least 2; the kinds `identity`, `position` and `oracle` have one by nature and ignore it.
    kind
        A name in `clustermim.tokenizers.tokenizer.KINDS`.
    metric, seed, n_init, max_passes, tol
        As for `fit_kmeans`; two levels have one start and a fixed number of passes, so there the last three are errors.
    levels
        1 searches all centroids for a patch, 2 those of the nearest cells (`fit_two_levels`); None takes 2 from
        `TWO_LEVELS_FROM` on. The config says which it was.
    probes
        Cells searched for a patch, on two levels; None takes 4.
    batch_size
        Images described at once; changes speed and memory, not the result.
    device
        Where to compute.
    workers
        As for `make_loader`.
    progress
        Show a bar on stderr.
    fit_views
        Which view of each image is described: ``"eval"``, or ``"train"``: the crop and flip of (seed, epoch 0, index),
        the same in every pass. Centroids meet crops in pretraining, whose resized pixels are smoother.
    vqvae
        How a VQ-VAE is trained; only for that kind, and there `batch_size` is the number of images of a step.
    fabric
        For K-means; launched. Its processes share the images out among them and get the same tokenizer. None: this
        process alone.
    checkpoints, stop
        As for `fit_kmeans`.

    Returns
    -------
    Tokenizer
        On the CPU, with data fingerprint, image size, channels, seed, inertia, spec and versions in its config.

    Raises
    ------
    InputError
        A patch side that does not divide the images, an unknown kind, feature, or network, k < 2 or more than there
        are distinct patches, `probes` that fit no two levels, or labels missing where the kind needs them. Raised
        before work starts, save for the number of distinct patches.
    """
    view = source.view
    view.check_patch_size(patch_size)
    made = class_of(kind)
    if kind in ("kmeans", "random-centroids", "random") and k < 2:
        raise InputError(f"A vocabulary of k = {k} tells no patches apart; choose k of at least 2.")
    if vqvae is not None and kind != "vqvae":
        raise InputError(f"Tokenizers of kind {kind!r} are not trained: leave out `vqvae`, or use kind 'vqvae'.")
    if levels is None:
        levels = 2 if kind == "kmeans" and k >= TWO_LEVELS_FROM else 1
    check_levels(kind, k, levels, probes)
    if levels == 2:
        _refuse_one_level_options(n_init=(n_init, None), max_passes=(max_passes, MAX_PASSES), tol=(tol, TOL))
    grid = (view.image_size[0] // patch_size, view.image_size[1] // patch_size)
    config: dict[str, Any] = {
        "kind": kind,
        "vocab_size": k,
        "patch_size": patch_size,
        "channels": view.channels,
        "image_size": list(view.image_size),
    }
    if isinstance(source, StreamSource) and kind in ("vqvae", "oracle"):
        why = "holds images out at random" if kind == "vqvae" else "must know all classes beforehand"
        raise InputError(
            f"A tokenizer of kind {kind} {why}, and {source.name} is read from the front. Leave the prefix out: the "
            f"files are then indexed once, when they are opened."
        )
    facts = provenance(source, seed)
    if kind == "vqvae":
        assert not isinstance(source, StreamSource)
        how = vqvae or VQVAEConfig()
        own = make_fabric(_kind_of(device), precision=how.precision)
        own.launch()
        return fit_vqvae(
            source,
            patch_size=patch_size,
            k=k,
            seed=seed,
            batch_size=batch_size,
            config=how,
            fabric=own,
            workers=workers,
            facts=facts,
        )
    if kind == "identity":
        return made(config | {"vocab_size": len(source) * grid[0] * grid[1], "facts": facts})
    if kind == "position":
        return made(config | {"vocab_size": grid[0] * grid[1], "facts": facts})
    if kind == "oracle":
        assert not isinstance(source, StreamSource)
        labels = require_labels(source, "an oracle tokenizer")
        classes = len(source.classes) if source.classes is not None else int(labels.max()) + 1
        return made(config | {"vocab_size": classes, "facts": facts})
    if kind == "random":
        return made(config | {"seed": seed, "facts": facts})
    if not issubclass(made, KMeansTokenizer):
        raise InputError(f"Tokenizers of kind {kind!r} cannot be fitted here.")

    described = make_features(features, patch_size=patch_size, view=view).to(device)
    rank, processes = (0, 1) if fabric is None or kind != "kmeans" else (fabric.global_rank, fabric.world_size)
    loader = make_loader(
        source,
        view,
        batch_size=batch_size,
        train=False,
        crops=fit_views == "train",
        seed=seed,
        device=device,
        workers=workers,
        rank=rank,
        world_size=processes,
    )
    facts |= {"fit_views": fit_views}

    if described.needs_fit:
        facts |= _fit_features(described, loader, progress)
    spread = Spread(described.dim, len(source) * grid[0] * grid[1] // processes)

    def blocks() -> Iterator[Tensor]:
        measure = not spread.rows  # in the first pass
        for batch in loader.epoch():
            with torch.no_grad():
                rows = described(batch.images).flatten(0, 1)
            if measure:
                spread.add(rows)
            yield rows
        if processes == 1:  # one of several may see blank images only
            spread.check(described.spec)

    streamed: dict[str, Any] = {
        "metric": metric,
        "seed": seed,
        "progress": progress,
        "first_row": loader.first_image * grid[0] * grid[1],
        "device": device,
        "checkpoints": checkpoints,
        "stop": stop,
    }
    result: KMeansResult | TwoLevelResult
    if kind == "random-centroids":
        codebook = Codebook(_gaussian_like(blocks, k, seed, progress).cpu(), metric)
    elif levels == 2:
        result = fit_two_levels(blocks, k, probes=probes, **streamed)
        if processes > 1:
            spread.share()
        codebook = result.codebook.cpu()
        config |= {"levels": 2, "cells": result.codebook.num_cells, "probes": result.codebook.probes}
        facts |= {"levels": 2, "cells": config["cells"], "probes": config["probes"]} | _of_result(result)
    else:
        result = fit_kmeans(blocks, k, n_init=n_init, max_passes=max_passes, tol=tol, **streamed)
        if processes > 1:
            spread.share()
        codebook = Codebook(result.centroids.cpu(), metric)
        facts |= {"levels": 1, "starts": result.starts} | _of_result(result)
    described = described.cpu()
    config |= {"features": described.config(), "dim": described.dim, "metric": metric}
    facts |= {"spec": described.spec, "metric": metric, **spread.facts()}
    tokenizer = made(config | {"facts": facts}, described, codebook)
    if kind == "kmeans":  # the controls are what they are
        note_signatures(tokenizer, source, batch_size=batch_size, device=device, workers=workers)
    return tokenizer


def _refuse_one_level_options(**given: tuple[Any, Any]) -> None:
    """Options that two levels would ignore, each with its default."""
    unfit = ", ".join(f"--{key.replace('_', '-')}" for key, (value, default) in given.items() if value != default)
    if unfit:
        raise InputError(
            f"{unfit}: K-means on two levels makes one start and a fixed number of passes. "
            "Leave it out, or use --levels 1."
        )


def _of_result(result: KMeansResult | TwoLevelResult) -> dict[str, Any]:
    """What a fit tells about itself, however it was made."""
    return {
        "patches": result.num_rows,
        "inertia": result.inertia,
        "inertia_per_patch": result.inertia / result.num_rows,
        "full_passes": sum(step["stage"] == "full" for step in result.history),
        "used_tokens": int((result.counts > 0).sum()),
        "perplexity": _perplexity(result.counts),
    }


def _fit_features(features: PatchFeatures, loader: Loader, progress: bool) -> dict[str, Any]:
    """Let features that need it see the images that will be clustered."""
    with PassProgress("images", show=progress) as bar:

        def images() -> Iterator[Tensor]:
            batches = (batch.images for batch in loader.epoch())
            yield from bar.track(batches, f"fitting {features.spec}", loader.num_images)

        return features.fit(images)


def _kind_of(device: str | torch.device) -> Device:
    found: Device = torch.device(device).type  # type: ignore[assignment]
    return found


def provenance(source: AnySource, seed: int) -> dict[str, Any]:
    """What every tokenizer's facts begin with: data and its fingerprint, seed, versions."""
    return {
        "data": source.name,
        "split": source.split,
        "images": len(source),
        "data_fingerprint": source.fingerprint(),
        "seed": seed,
        "versions": environment_facts()["versions"],
    }


def _gaussian_like(blocks: Blocks, k: int, seed: int, progress: bool) -> Float[Tensor, "k d"]:
    """K draws with the features' mean and standard deviation in each dimension (Box and Muller, 1958)."""
    rows, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with PassProgress("patches", show=progress) as bar:
        for block in bar.track(blocks(), "measuring the patches"):
            exact = block.cpu().double()
            rows, total, squares = rows + len(exact), total + exact.sum(0), squares + exact.square().sum(0)
    if not rows:
        raise InputError("There are no patches to describe: the data is empty.")
    mean = total / rows
    std = (squares / rows - mean.square()).clamp_min(0.0).sqrt()
    draw, column = torch.arange(k)[:, None], torch.arange(len(mean))
    radius = (-2.0 * torch.log(1.0 - uniform(seed, Stream.INIT, draw, column, 0).double())).sqrt()
    angle = 2.0 * math.pi * uniform(seed, Stream.INIT, draw, column, 1).double()
    return (mean + std * radius * angle.cos()).float()


def _perplexity(counts: Tensor) -> float:
    """How many tokens, evenly used, would be as varied: exp of the entropy of their use."""
    share = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))

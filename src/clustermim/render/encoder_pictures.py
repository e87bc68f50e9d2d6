"""Pictures of what an encoder sees: principal components of patches as colours, attention as light, a scatter."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from matplotlib.figure import Figure
from PIL import Image

from clustermim.render.figures import _STYLE, _blank
from clustermim.render.palette import light, token_colours

HIDDEN = 128
"""Grey of a hidden patch."""


def principal_components(features: Float[np.ndarray, "n d"], count: int) -> Float[np.ndarray, "n count"]:
    """The first `count` principal components; the sign is that of the largest loading, so that pictures repeat.

    Components beyond the rank of the features are zero.
    """
    centre, axes = _principal_axes(features, count)
    return _project(features, centre, axes, count)


def _principal_axes(
    features: Float[np.ndarray, "n d"], count: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "axes d"]]:
    """The mean of the features, and at most `count` directions in which they differ most."""
    centre = np.asarray(features, dtype=np.float64).mean(axis=0)
    _, _, axes = np.linalg.svd(features - centre, full_matrices=False)
    axes = axes[:count]
    largest = np.abs(axes).argmax(axis=1)
    return centre, axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]


def _project(
    features: Float[np.ndarray, "n d"], centre: Float[np.ndarray, " d"], axes: Float[np.ndarray, "axes d"], count: int
) -> Float[np.ndarray, "n count"]:
    found: Float[np.ndarray, "n count"] = np.zeros((len(features), count))
    found[:, : len(axes)] = (features - centre) @ axes.T
    return found


def component_maps(
    patches: Float[np.ndarray, "images n d"],
    grid: tuple[int, int],
    like: Float[np.ndarray, "others n d"] | None = None,
) -> list[UInt8[np.ndarray, "rows columns 3"]]:
    """Patch features of several images as colours: red, green and blue are their first three principal components.

    The components are those of all patches of all images, so like colours mean like features everywhere. Each is
    stretched from its 2nd to its 98th percentile.

    Parameters
    ----------
    patches
        Features.
    grid
        Patches down and across.
    like
        Features whose components and percentiles are taken; those of `patches` where None.
    """
    images, count, _ = patches.shape
    model = patches if like is None else like
    flat = model.reshape(model.shape[0] * count, -1)
    centre, axes = _principal_axes(flat, 3)
    low, high = np.percentile(_project(flat, centre, axes, 3), [2, 98], axis=0)
    found = _project(patches.reshape(images * count, -1), centre, axes, 3)
    scaled = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = np.round(scaled * 255).astype(np.uint8).reshape(images, *grid, 3)
    return list(colours)


def attention_picture(
    picture: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image lit by how much attention each patch gets: the most attended as it is, the least at a fifth."""
    spread = np.ptp(weights)
    scaled = (weights - weights.min()) / spread if spread > 0 else np.ones_like(weights)
    size = (picture.shape[1], picture.shape[0])
    lit = np.asarray(Image.fromarray(scaled.astype(np.float32), "F").resize(size, Image.Resampling.NEAREST))
    found: UInt8[np.ndarray, "h w 3"] = np.round(picture * (0.2 + 0.8 * lit[..., None])).astype(np.uint8)
    return found


def heat_picture(weights: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 3"]:
    """Weights alone, from dark (the smallest) to bright (the largest), in matplotlib's viridis."""
    spread = np.ptp(weights)
    scaled = (weights - weights.min()) / spread if spread > 0 else np.zeros_like(weights)
    colours: UInt8[np.ndarray, "rows columns 3"] = matplotlib.colormaps["viridis"](scaled, bytes=True)[..., :3]
    return np.ascontiguousarray(colours)


def hide_patches(
    picture: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its hidden patches (True) in grey."""
    rows, columns = mask.shape
    whole = mask.repeat(picture.shape[0] // rows, axis=0).repeat(picture.shape[1] // columns, axis=1)
    return np.where(whole[..., None], np.uint8(HIDDEN), picture)


def scatter_chart(
    points: Float[np.ndarray, "n 2"], labels: Int64[np.ndarray, " n"] | None, classes: Sequence[str] | None
) -> Figure:
    """Images as dots, in the colour of their class where there are classes; up to twenty of them are named.

    Parameters
    ----------
    points
        Two coordinates an image.
    labels
        Class of each, or None.
    classes
        Name of each class.
    """
    with matplotlib.rc_context(_STYLE):
        named = classes is not None and len(classes) <= 20
        figure = _blank(420, 380 + (18 * -(-len(classes) // 4) if named and classes is not None else 0))
        axes = figure.subplots()
        if labels is None or classes is None:
            axes.scatter(points[:, 0], points[:, 1], s=9, color=light("series-1"), alpha=0.6, linewidths=0)
        else:
            palette = token_colours(np.arange(len(classes))) / 255 * 0.88
            for label, name in enumerate(classes):
                chosen = labels == label
                axes.scatter(
                    points[chosen, 0], points[chosen, 1], s=11, color=palette[label], alpha=0.75, linewidths=0,
                    marker="osD^v"[label % 5], label=name,
                )  # fmt: skip
            if named:
                figure.legend(loc="outside upper left", ncols=4, handletextpad=0.1, columnspacing=0.8)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
        return figure

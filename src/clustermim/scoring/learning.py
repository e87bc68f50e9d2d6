"""How many labelled images are enough: the score against their number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from clustermim.errors import InputError
from clustermim.scoring.counts import RowCounts, TokenCounts
from clustermim.scoring.figures import figures
from clustermim.scoring.folds import ImagePlan
from clustermim.scoring.sums import TokenSummer

POINTS = 7
# A curve has flattened where it is this near to its end: a share of the end's value, or of the whole scale of 1.
NEAR_SHARE, NEAR = 0.05, 0.005


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Alignment from a number of labelled images, over several draws of them."""

    images: int
    alignment_crossfit: float
    """Mean over the draws."""
    alignment_crossfit_min: float
    alignment_crossfit_max: float
    alignment: float
    """Plug-in, mean over the draws."""
    draws: tuple[float, ...]
    """Cross-fitted alignment in each draw."""

    def to_dict(self) -> dict[str, Any]:
        """A flat record."""
        return {
            "curve_images": self.images,
            "alignment_crossfit": self.alignment_crossfit,
            "alignment_crossfit_min": self.alignment_crossfit_min,
            "alignment_crossfit_max": self.alignment_crossfit_max,
            "alignment": self.alignment,
        }


def learning_curve(counts: TokenCounts, *, points: int = POINTS, draws: int = 5, seed: int = 0) -> list[CurvePoint]:
    """Score growing subsets of the images, drawn at random within each class.

    The same draws are made for every tokenizer counted under the same plan, so curves can be compared draw by draw.

    Parameters
    ----------
    counts
        Counts of each image (`per_image=True`).
    points
        Number of sizes, evenly spaced in the logarithm, up to all images.
    draws
        Random subsets of each size; each is cut into folds anew.
    seed
        Seed of the draws.

    Raises
    ------
    InputError
        Counts without images, or too few images of a class to be cross-fitted.
    """
    plan = counts.plan
    if not counts.per_image:
        raise InputError("A learning curve needs the counts of each image: make TokenCounts with per_image=True.")
    if not plan.num_folds:
        raise InputError("A learning curve shows cross-fitted alignment, but some class has a single image (or group).")
    if points < 2 or draws < 1:
        raise InputError(f"A learning curve needs at least 2 points and 1 draw; got {points} and {draws}.")
    rows = counts.rows()
    units = np.bincount(plan.strata % plan.num_classes, minlength=plan.num_classes)
    smallest = min(1.0, max(5.0, 20 / plan.num_classes) / float(units.mean()))
    curve = []
    for share in np.geomspace(smallest, 1.0, points):
        found = [_score_part(rows, plan, float(share), [seed, 3, draw]) for draw in range(draws)]
        crossfit = tuple(part["alignment_crossfit"] for part in found)
        curve.append(
            CurvePoint(
                images=round(np.mean([part["images"] for part in found])),
                alignment_crossfit=float(np.mean(crossfit)),
                alignment_crossfit_min=min(crossfit),
                alignment_crossfit_max=max(crossfit),
                alignment=float(np.mean([part["alignment"] for part in found])),
                draws=crossfit,
            )
        )
    return curve


def enough_images(curve: Sequence[CurvePoint]) -> int | None:
    """The number of images from which on the curve stays near its end; None if it is still rising there."""
    end = curve[-1].alignment_crossfit
    near = max(NEAR, NEAR_SHARE * abs(end))
    enough = None
    for point in reversed(curve[:-1]):
        if abs(point.alignment_crossfit - end) > near:
            break
        enough = point.images
    return enough


def settled_images(curves: Mapping[str, Sequence[CurvePoint]]) -> tuple[str, int | None]:
    """Which tokenizer is best with all images, and from how many images on it is best in every draw (None: never)."""
    best = max(curves, key=lambda name: curves[name][-1].alignment_crossfit)
    settled = None
    for at in reversed(range(len(curves[best]))):
        rivals = [curves[name][at].draws for name in curves if name != best]
        if any(theirs >= ours for rival in rivals for theirs, ours in zip(rival, curves[best][at].draws, strict=True)):
            break
        settled = curves[best][at].images
    return best, settled


def curve_advice(curves: Mapping[str, Sequence[CurvePoint]]) -> list[str]:
    """Sentences that say how many labelled images are enough, and for what."""
    rising = [name for name, curve in curves.items() if enough_images(curve) is None]
    known = {name: enough for name, curve in curves.items() if (enough := enough_images(curve)) is not None}
    total = next(iter(curves.values()))[-1].images
    sentences = []
    if known:
        listed = ", ".join(f"{images:,} for {name}" for name, images in known.items())
        sentences.append(f"Labelled images after which alignment hardly changes: {listed}.")
    if rising:
        sentences.append(
            f"Still rising at {total:,} labelled images: {', '.join(rising)}. More labels would show more of these "
            "vocabularies."
        )
    if len(curves) > 1:
        best, settled = settled_images(curves)
        sentences.append(
            f"{best} leads in every draw from {settled:,} labelled images on: that many are enough to choose it."
            if settled is not None
            else f"Even {total:,} labelled images do not put {best} first in every draw: the lead is not settled."
        )
    return sentences


def _score_part(rows: RowCounts, plan: ImagePlan, share: float, seed: list[int]) -> dict[str, float]:
    kept = _draw_units(plan, share, seed)
    images = np.flatnonzero(kept[plan.units])
    part = plan.part(images, seed[-1])
    assert rows.row_image is not None
    mine = np.flatnonzero(np.isin(rows.row_image, images))
    counts = RowCounts(
        matrix=rows.matrix[mine],
        tokens=rows.tokens,
        row_class=np.searchsorted(part.classes, rows.row_class[mine]),
        row_fold=part.folds[np.searchsorted(images, rows.row_image[mine])],
        num_classes=part.num_classes,
        num_folds=part.num_folds,
    ).by_cell()
    values = figures(TokenSummer(counts).sums(np.ones((1, counts.matrix.shape[0]))))
    return {"images": float(len(images))} | {name: float(value[0]) for name, value in values.items()}


def _draw_units(plan: ImagePlan, share: float, seed: list[int]) -> Int64[np.ndarray, " units"]:
    """1 for the units drawn: the first of a shuffle of each class, so that larger draws contain smaller ones."""
    classes = plan.strata % plan.num_classes
    order = np.random.default_rng(seed).permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    size = np.bincount(classes, minlength=plan.num_classes)
    place = np.empty(len(classes), dtype=np.int64)
    place[order] = np.arange(len(classes)) - np.repeat(np.cumsum(size) - size, size)
    # Two units of a class are the least that can be cross-fitted.
    quota = np.minimum(size, np.maximum(2, np.round(share * size)))
    return np.asarray(place < quota[classes], dtype=np.int64)

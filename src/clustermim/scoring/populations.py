"""Made-up populations whose alignment is known, to see how far scores of a few hundred images may be trusted.

`weak`: classes differ a little, as they do by pixel tokens. `strong`: they differ much. `bursty`: as weak, but each
image has favourite tokens of its own, so that its patches tell less than as many independent ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from clustermim.scoring.figures import alignment_of

Case = Literal["weak", "strong", "bursty"]
CASES: tuple[Case, ...] = ("weak", "strong", "bursty")
_DEPTH: dict[Case, float] = {"weak": 0.4, "strong": 0.9, "bursty": 0.4}
_BURST = 300.0


@dataclass(frozen=True, kw_only=True)
class Population:
    """p(token | class), and how images are drawn from it."""

    chances: Float64[np.ndarray, "l k"]
    """p(token | class); rows sum to 1."""
    shares: Float64[np.ndarray, " l"]
    """p(class); sums to 1."""
    burst: float | None
    """An image's own p(token) is Dirichlet with `burst` times that of its class; None: the class's own."""

    @property
    def alignment(self) -> float:
        """Alignment of the population: what endless labelled images would show."""
        joint = self.chances.T * self.shares
        walk = self.chances @ (joint / joint.sum(axis=1, keepdims=True))
        return float(alignment_of(walk[None], self.shares[None])[0])

    def draw(
        self, images: int, patches: int, rng: np.random.Generator
    ) -> tuple[Int64[np.ndarray, "images patches"], Int64[np.ndarray, " images"]]:
        """Token ids and labels; each class has its share of the images, rounded.

        Parameters
        ----------
        images, patches
            Number of images, and of patches in each.
        rng
            Source of chance.
        """
        ends = np.round(np.cumsum(self.shares) * images).astype(np.int64)
        labels = np.searchsorted(ends, np.arange(images), side="right")
        ids = np.empty((images, patches), dtype=np.int64)
        for image, label in enumerate(labels):
            own = self.chances[label] if self.burst is None else rng.gamma(self.burst * self.chances[label])
            ids[image] = rng.choice(len(own), patches, p=own / own.sum())
        return ids, labels


def make_population(
    case: Case, *, classes: int = 10, vocab: int = 1000, sizes: Sequence[float] | None = None, seed: int = 0
) -> Population:
    """One of the cases above: uneven tokens, whose log-chances differ between classes by a normal amount.

    Parameters
    ----------
    case
        `weak`, `strong` or `bursty`.
    classes, vocab
        L and K.
    sizes
        Relative class sizes; None for equal ones.
    seed
        Seed of the population, not of the draws.
    """
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.ones(vocab)) * np.exp(_DEPTH[case] * rng.normal(size=(classes, vocab)))
    shares = np.ones(classes) if sizes is None else np.asarray(sizes, dtype=np.float64)
    return Population(
        chances=chances / chances.sum(axis=1, keepdims=True),
        shares=shares / shares.sum(),
        burst=_BURST if case == "bursty" else None,
    )

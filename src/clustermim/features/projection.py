"""Linear maps fitted on features: whitening that keeps the axes (ZCA), and principal components."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from clustermim.features.moments import Moments

EPSILON = 0.1
"""Share of the mean eigenvalue that is added to each before its root is divided by (after Coates and Ng, 2011)."""

_FLOOR = 1e-10
"""Directions with less than this share of the largest eigenvalue are rounding noise and mapped to 0."""


class Projection(nn.Module):
    """x ↦ (x − centre) · matrixᵀ, row by row; both are part of the state dict.

    Parameters
    ----------
    dim
        D, columns that come in.
    out
        Columns that come out.
    """

    centre: Tensor
    matrix: Tensor

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("matrix", torch.zeros(out, dim))

    def set(self, centre: Float[Tensor, " d"], matrix: Float[Tensor, "out d"]) -> None:
        """Take what was fitted."""
        self.centre.copy_(centre)
        self.matrix.copy_(matrix)

    def forward(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n out"]:
        """Map rows."""
        return functional.linear(rows - self.centre, self.matrix)

    def undo(self, rows: Float[Tensor, "*n out"]) -> Float[Tensor, "*n d"]:
        """The rows of least deviation from the centre that are mapped to these: the exact inverse of a whitening."""
        inverse = torch.linalg.pinv(self.matrix.double().cpu()).to(rows)
        return functional.linear(rows, inverse) + self.centre


def eigen(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues, largest first, and eigenvectors as columns; what is only rounding is exactly 0.

    Each vector's largest component is positive, so that equal data give equal signs.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    values = torch.where(values > _FLOOR * values[0], values, 0.0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)


def inverse_roots(values: Float[Tensor, " d"], epsilon: float) -> Float[Tensor, " d"]:
    """1/√(λ + ε·mean λ) of each eigenvalue; 0 of those that are 0, so that noise is never blown up."""
    return torch.where(values > 0, (values + epsilon * values.mean()).clamp_min(1e-300).rsqrt(), 0.0)


def zca(moments: Moments, epsilon: float) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Centre and matrix of ZCA whitening: U (Λ + ε·mean Λ)^-½ Uᵀ (Bell and Sejnowski, 1997; ε as in Coates and Ng).

    Of all whitenings the one that changes the data least: a whitened patch still looks like one. K-means sees
    distances only, and those are the same after PCA whitening, which differs by a rotation.
    """
    values, vectors = eigen(moments.covariance)
    return moments.mean, (vectors * inverse_roots(values, epsilon)) @ vectors.T


def principal(
    moments: Moments, scale: Float[Tensor, " d"], count: int, *, whiten: bool, epsilon: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, "count d"], float]:
    """Centre and matrix of the first `count` principal components of scaled features, and their share of the variance.

    Parameters
    ----------
    moments
        Of the features before they are scaled.
    scale
        What each dimension is multiplied by first.
    count
        Components kept.
    whiten
        Bring each component to unit variance, damped by `epsilon` as in `inverse_roots`.
    epsilon
        Share of the mean eigenvalue, over all components.
    """
    values, vectors = eigen(scale[:, None] * moments.covariance * scale)
    matrix = vectors[:, :count].T * scale
    if whiten:
        matrix = inverse_roots(values, epsilon)[:count, None] * matrix
    return moments.mean, matrix, float(values[:count].sum() / values.sum())

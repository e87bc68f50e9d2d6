"""What `clustermim graph` draws: the toy model whole, of real images the views of a few."""

from collections.abc import Mapping
from typing import TypeAlias, get_args

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse

from clustermim.scoring.graph import GraphReport, ToyTokens, augmentation_spectrum, toy_model

Drawing: TypeAlias = tuple[np.ndarray, np.ndarray | None]
"""Weights between visible views and hidden nodes, (n1, n2), and class memberships of the visible views, (n1, L)."""

MOST_NODES = 80
"""On either side of a graph that is drawn."""
IMAGES = 3


def toy_graphs(views: int, shared: int) -> tuple[dict[str, GraphReport], dict[str, Drawing]]:
    """Reports and drawings of the toy model under its three tokenizers.

    Parameters
    ----------
    views, shared
        n and m of `toy_model`.

    Raises
    ------
    InputError
        As `toy_model`.
    """
    reports: dict[str, GraphReport] = {}
    drawings: dict[str, Drawing] = {}
    for kind in get_args(ToyTokens):
        weights, tokens, members = toy_model(views, shared, kind)
        reports[kind] = augmentation_spectrum(weights, tokens=tokens, labels=members)
        drawings[kind] = (merged(weights, tokens), members)
    return reports, {name: one for name, one in drawings.items() if max(one[0].shape) <= MOST_NODES}


def cut_drawings(
    weights: sparse.csr_matrix,
    tokens: Mapping[str, Int64[np.ndarray, " n2"] | None],
    image: Int64[np.ndarray, " n1"],
    labels: Int64[np.ndarray, " n1"] | None,
) -> dict[str, Drawing]:
    """The part of each graph that a few images make, of different classes where there are some.

    Parameters
    ----------
    weights
        Of the whole graph of masks.
    tokens
        Name -> token of each hidden view; None without tokens.
    image
        Image of each visible view.
    labels
        Class of each visible view.

    Returns
    -------
    dict
        Empty where even that part has more nodes than can be drawn.
    """
    numbers, first = np.unique(image, return_index=True)
    if labels is None:
        chosen = numbers[:IMAGES]
    else:
        found = np.unique(labels[first], return_index=True)[1]
        rest = np.setdiff1d(np.arange(len(numbers)), found)
        chosen = numbers[np.concatenate([found, rest])[:IMAGES]]
    rows = np.concatenate([np.flatnonzero(image == one) for one in chosen])
    part = weights[rows]
    columns = np.flatnonzero(np.asarray(part.sum(axis=0)).ravel())
    if max(len(rows), len(columns)) > MOST_NODES:
        return {}
    dense = part[:, columns].toarray()
    members = None if labels is None else np.eye(int(labels.max()) + 1)[labels[rows]]
    return {
        name: (dense if ids is None else merged(dense, np.unique(ids[columns], return_inverse=True)[1]), members)
        for name, ids in tokens.items()
    }


def merged(weights: Float64[np.ndarray, "n1 n2"], tokens: Int64[np.ndarray, " n2"]) -> Float64[np.ndarray, "n1 k"]:
    """Hidden views of one token become one node."""
    return np.asarray(weights @ np.eye(int(tokens.max()) + 1)[tokens])

"""Whether bounds would spare K-means distances: the share of rows that a step could skip, and what else a step costs.

    python benchmarks/kmeans_bounds.py --data /path/to/cifar10

Hamerly's bounds ("Making k-means even faster", SDM 2010): a row keeps its centroid unseen where its distance to it plus
that centroid's last move stays below half the way to the next centroid, or below its distance to the second nearest
minus the largest move. Measured after so many plain Lloyd steps on a random 65,536 of the patches.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from kmeans_speed import write_patches
from recording import record

ROWS, STEPS = 1 << 16, (2, 4, 8, 12)


def skipped(x: torch.Tensor, k: int) -> list[float]:
    """The share of rows that may be skipped after each of `STEPS`."""
    c, shares = x[:k].clone(), []
    for step in range(1, max(STEPS) + 1):
        near = [torch.cdist(part, c).topk(2, dim=1, largest=False) for part in x.split(4096)]
        distance, ids = torch.cat([n.values for n in near]), torch.cat([n.indices[:, 0] for n in near])
        counts = torch.bincount(ids, minlength=k)[:, None]
        sums = torch.zeros_like(c).index_add_(0, ids, x)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), c)
        move = (means - c).norm(dim=1)
        between = torch.cdist(means, means).fill_diagonal_(float("inf")).min(1).values / 2
        bound = torch.maximum(between[ids], distance[:, 1] - move.max())
        if step in STEPS:
            shares.append(float((distance[:, 0] + move[ids] < bound).float().mean()))
        c = means
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_patches(options.data, 8000, Path(folder) / "patches.npy")
        x = torch.from_numpy(np.load(Path(folder) / "patches.npy"))
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:ROWS]]
    rows = [
        {"k": k, "step": step, "skipped": round(share, 4)}
        for k in (50, 1000)
        for step, share in zip(STEPS, skipped(x, k), strict=True)
    ]
    for row in rows:
        print(json.dumps(row))
    record("kmeans_bounds", rows)


if __name__ == "__main__":
    main()

"""A vocabulary of 65,536 on CIFAR-10's 3.2 M patches: K-means on two levels beside brute force.

    python benchmarks/large_vocabulary.py --data /path/to/cifar10 [--k 65536] [--quick] [--only-fit]

Two levels, in a process of its own that streams the patches (4x4x3 normalised pixels) from a file: seconds and peak
memory of the fit, seconds to assign all patches, and for 1, 2, 4, ... probes the error and the speed on a random part
of the patches, beside an exhaustive search of the same centroids there.

Brute force is Lloyd's algorithm over all patches, from random ones, for `--flat-steps` (10) steps, each an exhaustive
search. Ten would take most of an hour, so only the first is made; the other nine compare a patch with the 64 centroids
nearest to its first one (`neighbourhoods.py`). The time of a step is scaled from a part of the patches, with the faster
of two exhaustive searches: ours that is exact, and ours that rounds as a plain float32 product and maximum do. The
error is that of the centroids found, searched exhaustively. Times of assignment are medians of three.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kmeans_speed import write_patches
from memory import peak_above, start_peak
from recording import record

from clustermim.openmp import WAITING

DIM, BLOCK, REPEATS = 48, 16_384, 3
SPEED_BAR, ERROR_BAR = 10.0, 1.05


def stream(path: Path) -> Iterator[torch.Tensor]:
    """The patches in blocks, read anew each time, so that the file is no part of the memory that is measured."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while len(part := np.fromfile(file, dtype=np.float32, count=BLOCK * DIM)):
            yield torch.from_numpy(part.reshape(-1, DIM))


def median_seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def random_part(path: Path, rows: int, seed: int) -> torch.Tensor:
    """So many of all patches, without replacement."""
    x = np.load(path, mmap_mode="r")
    chosen = np.sort(np.random.default_rng(seed).choice(len(x), min(rows, len(x)), replace=False))
    return torch.from_numpy(x[chosen])


def error(x: torch.Tensor, centroids: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean squared distance to the assigned centroid, in float64."""
    parts = zip(torch.split(x, BLOCK), torch.split(ids, BLOCK), strict=True)
    return sum(float((part.double() - centroids[i].double()).square().sum()) for part, i in parts) / len(x)


def two_levels(path: Path, k: int, judged: int, timed: int, only_fit: bool) -> dict[str, Any]:
    """Fit, and unless that is all, assign, and the curve of error against speed."""
    from clustermim.tokenizers.assigning import Assigner
    from clustermim.tokenizers.nearest import nearest_to
    from clustermim.tokenizers.twolevelfit import fit_two_levels

    before = start_peak()
    began = time.perf_counter()
    fitted = fit_two_levels(lambda: stream(path), k)
    seconds = time.perf_counter() - began
    book, n = fitted.codebook, fitted.num_rows
    found: dict[str, Any] = {
        "patches": n,
        "cells": book.num_cells,
        "probes": book.probes,
        "fit_seconds": seconds,
        "fit_peak_mib": peak_above(before),
        "inertia_per_patch": fitted.inertia / n,
        "used": int((fitted.counts > 0).sum()),
    }
    if only_fit:
        return found
    book.assign(next(stream(path)))
    blocks = list(stream(path))
    found["assign_seconds"] = median_seconds(lambda: [book.assign(block) for block in _joined(blocks)])
    del blocks
    x = random_part(path, judged, 1)
    exhaustive = Assigner(book.centroids, "l2")
    part = x[:timed]
    exhaustive(part)
    rough = nearest_to(book.centroids, "l2", part.mean(0))
    rough(part)
    brute = {"exact": median_seconds(lambda: exhaustive(part)), "rounded": median_seconds(lambda: rough(part))}
    found["brute_seconds"] = {name: taken * n / len(part) for name, taken in brute.items()}
    found["brute_assign_seconds_scaled"] = min(found["brute_seconds"].values())  # the faster one is what is compared
    least = error(x, book.centroids, exhaustive(x))
    found["exhaustive_error"] = least
    found["curve"] = []
    probes = 1
    while probes <= book.num_cells:
        taken = median_seconds(lambda p=probes: book.assign(x, p))
        reached = error(x, book.centroids, book.assign(x, probes))
        found["curve"].append({"probes": probes, "patches_per_second": len(x) / taken, "error": reached})
        probes *= 2
        if taken * REPEATS > 60.0:
            break
    return found


def _joined(blocks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    for start in range(0, len(blocks), 16):
        yield torch.cat(blocks[start : start + 16])


def flat(path: Path, k: int, judged: int, steps: int) -> dict[str, Any]:
    """Lloyd's algorithm: one step with an exhaustive search, the others near by."""
    from clustermim.tokenizers.assigning import Assigner
    from clustermim.tokenizers.neighbourhoods import Neighbourhoods

    x = torch.from_numpy(np.load(path))
    generator = torch.Generator().manual_seed(0)
    start = torch.unique(x[torch.randperm(len(x), generator=generator)[: 2 * k]], dim=0)
    if len(start) < k:
        raise SystemExit(f"Only {len(start)} different patches among {2 * k}; choose a smaller --k.")
    c = start[torch.randperm(len(start), generator=generator)[:k]].clone()
    near = Neighbourhoods(x)
    for _ in range(steps):
        c = means(x, near.assign(c, "l2"), c)
    judge = random_part(path, judged, 1)
    return {
        "steps": steps,
        "error": error(judge, c, Assigner(c, "l2")(judge)),
    }


def means(x: torch.Tensor, ids: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The means of the clusters; one without rows stays where it is."""
    count = torch.bincount(ids, minlength=len(c))[:, None]
    total = torch.zeros(c.shape, dtype=torch.float64)
    for part, here in zip(torch.split(x, BLOCK), torch.split(ids, BLOCK), strict=True):
        total.index_add_(0, here, part.double())
    return torch.where(count > 0, (total / count.clamp_min(1)).float(), c)


def in_process(options: argparse.Namespace, what: str, path: Path) -> dict[str, Any]:
    """Run one part by itself, so that its peak memory is its own."""
    plain = {key: value for key, value in os.environ.items() if key not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    plain |= {"OMP_NUM_THREADS": str(options.threads)} | WAITING
    command = [sys.executable, *sys.argv, "--worker", what, "--patches", str(path)]
    done = subprocess.run(command, env=plain, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--k", type=int, help="default: 65,536, or 2,048 with --quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flat-steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2,000 images and a small K; printed and not recorded")
    parser.add_argument("--only-fit", action="store_true", help="seconds and memory of the fit; not recorded")
    parser.add_argument("--worker", choices=("two-levels", "flat"), help=argparse.SUPPRESS)
    parser.add_argument("--patches", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    k = options.k or (2048 if options.quick else 65_536)
    judged, timed = (16_384, 4096) if options.quick else (1 << 18, 1 << 14)
    if options.worker:
        torch.set_num_threads(options.threads)
        if options.worker == "two-levels":
            print(json.dumps(two_levels(options.patches, k, judged, timed, options.only_fit)))
        else:
            print(json.dumps(flat(options.patches, k, judged, options.flat_steps)))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patches.npy"
        write_patches(options.data, 2000 if options.quick else None, path)
        ours = in_process(options, "two-levels", path)
        if options.only_fit:
            print(json.dumps(ours))
            sys.exit()
        brute = in_process(options, "flat", path)
    brute["fit_seconds_scaled"] = brute["steps"] * ours["brute_assign_seconds_scaled"]
    brute["patches_per_second"] = ours["patches"] / ours["brute_assign_seconds_scaled"]
    fit_ratio = brute["fit_seconds_scaled"] / ours["fit_seconds"]
    for point in ours["curve"]:
        point["speed_ratio"] = point["patches_per_second"] / brute["patches_per_second"]
        point["error_ratio"] = point["error"] / brute["error"]
    met = fit_ratio >= SPEED_BAR and any(
        point["speed_ratio"] >= SPEED_BAR and point["error_ratio"] <= ERROR_BAR for point in ours["curve"]
    )
    print(f"K = {k:,}, {ours['patches']:,} patches, {ours['cells']} cells, {ours['probes']} probes by default")
    print(
        f"{fit_ratio:.1f}x faster to fit: {ours['fit_seconds']:.0f} s, against {brute['fit_seconds_scaled']:.0f} s "
        f"scaled ({brute['steps']} steps); peak memory above the start: {ours['fit_peak_mib']:.0f} MiB; used tokens: "
        f"{ours['used']:,}"
    )
    print(
        f"all patches in {ours['assign_seconds']:.1f} s with the default, against "
        f"{ours['brute_assign_seconds_scaled']:.0f} s scaled"
    )
    for point in ours["curve"]:
        print(
            f"  {point['probes']:>4} probes: {point['speed_ratio']:6.1f}x faster to assign "
            f"({point['patches_per_second']:,.0f} patches/s), {point['error_ratio']:.3f}x the error of brute force "
            f"({point['error'] / ours['exhaustive_error']:.4f}x that of an exhaustive search of these centroids)"
        )
    print(f"aim (10x faster to fit and, at some number of probes, to assign, at 1.05x the error): {met=}")
    if not options.quick:
        row = {"k": k, "fit_ratio": fit_ratio, "met": met, "two_levels": ours, "brute_force": brute}
        print(record("large_vocabulary", [row], threads=options.threads))

"""One process against two gloo processes with a thread each: the same centroids, in how much of the time.

    python benchmarks/kmeans_processes.py [--quick]

Synthetic rows (float64 for the comparison of centroids after 10 full passes, float32 for time), held by each process as
its part; timed between two barriers, the median of three. One process with two threads is printed beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from recording import record
from torch import distributed

from clustermim.openmp import WAITING

DIM, K, SEEDS = 48, 200, 3


def make_rows(first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows by their position, so that processes need not share memory: 500 blobs with noise."""
    from clustermim.data.counted import uniform

    column, parts = torch.arange(DIM), []
    for start in range(first, last, 1 << 15):
        place = torch.arange(start, min(start + (1 << 15), last))[:, None]
        parts.append((uniform(0, place, column) + 2 * uniform(1, place * 2654435761 % 500, column)).to(dtype))
    return torch.cat(parts)


def work(folder: Path, total: int, size: int, rank: int, threads: int, dtype: str) -> None:
    from clustermim.tokenizers.kmeans import fit_kmeans

    torch.set_num_threads(threads)
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    first, last = total * rank // size, total * (rank + 1) // size
    x = make_rows(first, last, getattr(torch, dtype))
    fit_kmeans(lambda: iter(x[:20_000].split(8192)), 4, max_passes=1)  # warm
    if size > 1:
        distributed.barrier()
    began = time.perf_counter()
    result = fit_kmeans(lambda: iter(x.split(16_384)), K, first_row=first, tol=0.0, max_passes=10)
    if size > 1:
        distributed.barrier()
    if rank == 0:
        full = sum(step["stage"] == "full" for step in result.history)
        torch.save(
            {"seconds": time.perf_counter() - began, "centroids": result.centroids, "full": full}, folder / "found"
        )
    if size > 1:
        distributed.destroy_process_group()


def fit(total: int, size: int, threads: int, dtype: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | WAITING
        jobs = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", folder, str(total), str(size), str(rank), str(threads), dtype],
                env=environment,
            )
            for rank in range(size)
        ]
        codes = [job.wait() for job in jobs]
        if any(codes):
            raise SystemExit("a process failed; its message stands above")
        found: dict[str, object] = torch.load(Path(folder) / "found", weights_only=True)
        return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        folder, total, size, rank, threads, dtype = sys.argv[2:]
        work(Path(folder), int(total), int(size), int(rank), int(threads), dtype)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="150,000 rows, one run each; nothing is recorded")
    options = parser.parse_args()
    total, repeats = (150_000, 1) if options.quick else (options.rows, SEEDS)
    one, two = fit(total, 1, 1, "float64"), fit(total, 2, 1, "float64")
    difference = float((one["centroids"] - two["centroids"]).abs().max())  # type: ignore[operator]
    kinds = {
        "one process, one thread": (1, 1),
        "two processes, one thread each": (2, 1),
        "one process, two threads": (1, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (size, threads) in kinds.items():
            seconds[name].append(float(fit(total, size, threads, "float32")["seconds"]))  # type: ignore[arg-type]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    base = medians["one process, one thread"]
    summary = {
        "time ratio, two processes / one": round(medians["two processes, one thread each"] / base, 4),
        "bar": 0.6,
        "time ratio, two threads / one": round(medians["one process, two threads"] / base, 4),
        "largest difference of centroids in float64": difference,
        "its bar": 1e-8,
        "full passes": one["full"],
    }
    print(json.dumps(summary))
    if not options.quick:
        rows = [{"kind": name, "rows": total, "k": K, "dim": DIM, "seconds": found} for name, found in seconds.items()]
        record("kmeans_processes", rows, summary=summary)


if __name__ == "__main__":
    main()

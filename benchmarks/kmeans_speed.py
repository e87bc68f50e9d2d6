"""K-means of CIFAR-10's patches: ours against faiss and scikit-learn's MiniBatchKMeans, inertia and time.

    python benchmarks/kmeans_speed.py --data /path/to/cifar10 [--quick]

All cluster one array of normalised pixels (3.2 M patches of 4x4x3, float32) that stands in memory, with two threads,
three seeds each, in turn, every fit in a process of its own; the time is that of the fit alone. Ours runs with the
package's defaults. The inertia of everyone's centroids is computed by one float64 evaluation. faiss makes 25 full
iterations over all points, scikit-learn two epochs.
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

import numpy as np
import torch
from recording import record

THREADS = 2
METHODS = ("clustermim", "faiss", "scikit-learn")
BARS = {"faiss": 1 / 6, "scikit-learn": 1 / 2}
INERTIA_BARS = {50: 1.002, 1000: 1.005}


def write_patches(data: str, images: int | None, path: Path) -> None:
    """The features that `tokenizer fit --features pixel --patch-size 4` would cluster, in one array."""
    from clustermim.data.loaders import make_loader
    from clustermim.data.options import DataOptions
    from clustermim.data.sources import open_source
    from clustermim.features.patches import make_features

    source = open_source(data, DataOptions(limit=images))
    features = make_features("pixel", patch_size=4, view=source.view)
    loader = make_loader(source, source.view, batch_size=256, train=False)
    np.save(path, torch.cat([features(batch.images).flatten(0, 1) for batch in loader.epoch()]).numpy())


def fit(method: str, x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, float]:
    """Centroids and seconds; a small fit before it warms up threads and lazy imports."""
    if method == "clustermim":
        from clustermim.tokenizers.kmeans import fit_kmeans

        rows = torch.from_numpy(x)
        fit_kmeans(lambda: iter(rows[:20_000].split(16_384)), 4)
        began = time.perf_counter()
        result = fit_kmeans(lambda: iter(rows.split(16_384)), k, seed=seed)
        return result.centroids.numpy(), time.perf_counter() - began
    if method == "faiss":
        import faiss

        faiss.omp_set_num_threads(THREADS)
        faiss.Kmeans(x.shape[1], 4, niter=2).train(x[:20_000])
        began = time.perf_counter()
        found = faiss.Kmeans(x.shape[1], k, niter=25, seed=seed + 1, max_points_per_centroid=len(x) // k + 1)
        found.train(x)
        return found.centroids, time.perf_counter() - began
    from sklearn.cluster import MiniBatchKMeans

    MiniBatchKMeans(4, n_init=1).fit(x[:20_000])
    began = time.perf_counter()
    # Two epochs, none cut short; batches so large that its steps are worth their overhead (its default, 1,024, took
    # eleven times as long), and no last pass for labels.
    made = MiniBatchKMeans(
        k, n_init=1, max_iter=2, batch_size=1 << 14, max_no_improvement=None, random_state=seed, compute_labels=False
    ).fit(x)
    return made.cluster_centers_, time.perf_counter() - began


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """The sum of squared distances to the nearest centroid, in float64."""
    c = torch.from_numpy(np.asarray(centroids)).double()
    bias = c.square().sum(1)
    total = 0.0
    for part in torch.from_numpy(x).split(1 << 14):
        rows = part.double()
        total += float((rows.square().sum(1) + torch.addmm(bias, rows, c.t(), alpha=-2.0).min(1).values).sum())
    return total


def in_process(method: str, array: Path, k: int, seed: int) -> dict[str, float]:
    """One fit in a process of its own, at full speed: nothing in the environment slows a BLAS, and two threads each."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
    environment.pop("OMP_WAIT_POLICY", None)  # as each library finds it in a plain Python process
    job = [sys.executable, __file__, "--worker", method, str(array), str(k), str(seed)]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(method: str, array: str, k: int, seed: int) -> None:
    torch.set_num_threads(THREADS)
    x = np.load(array)
    centroids, seconds = fit(method, x, k, seed)
    print(json.dumps({"seconds": seconds, "inertia_per_patch": inertia(x, centroids) / len(x)}))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--k", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2,000 images and k = 50 and 200; nothing is recorded")
    options = parser.parse_args()
    images, ks = (2000, [50, 200]) if options.quick else (None, options.k)
    rows, medians = [], {}
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder) / "patches.npy"
        write_patches(options.data, images, array)
        for k in ks:
            runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
            for seed in range(options.seeds):
                for method in METHODS:  # in turn, so that a slow minute of the machine hits all
                    found = in_process(method, array, k, seed)
                    runs[method].append(found)
                    rows.append({"k": k, "method": method, "seed": seed, **found})
                    print(json.dumps(rows[-1]), file=sys.stderr)
            medians[k] = {
                method: {key: statistics.median(run[key] for run in found) for key in found[0]}
                for method, found in runs.items()
            }
    ratios = []
    for k, by_method in medians.items():
        ours = by_method["clustermim"]
        ratio = {"k": k}
        for other, bar in BARS.items():
            ratio[f"time / {other}"] = round(ours["seconds"] / by_method[other]["seconds"], 4)
            ratio[f"time bar, {other}"] = round(bar, 4)
        ratio["inertia / faiss"] = round(ours["inertia_per_patch"] / by_method["faiss"]["inertia_per_patch"], 5)
        ratio["inertia bar, faiss"] = INERTIA_BARS.get(k)
        ratio["seconds"] = {method: round(found["seconds"], 2) for method, found in by_method.items()}
        ratios.append(ratio)
        print(json.dumps(ratio))
    if not options.quick:
        import faiss
        import sklearn

        record("kmeans_speed", rows, ratios=ratios, peers={"faiss": faiss.__version__, "sklearn": sklearn.__version__})


if __name__ == "__main__":
    main()

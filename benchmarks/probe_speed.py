"""How fast the probes are: `linear` against scikit-learn's LogisticRegression, and k-NN with its memory.

    python benchmarks/probe_speed.py [--data ../shared/data/cifar10] [--quick]

Both regressions minimise the same objective on the same standardised float32 features (50,000 × 384, 10 classes) with
the weight decay that `linear` chooses, on the same threads; each is timed three times in turn, every fit
in a process of its own (threads that one library leaves spinning would slow the other), medians count. Without
--data the features are drawn: classes in the leading directions of a power-law spectrum, rotated. With --data they are
those of an untrained ViT-S on these images. k-NN takes 10,000 queries to a bank of 50,000 and reports the memory that
its process grew by at most.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_above, start_peak
from recording import record
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_splits
from clustermim.encoders.opening import open_encoder
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.linear import fit_linear, standardise
from clustermim.evaluation.logistic import fit_logistic

CLASSES, DIM = 10, 384
RUNS = 3


def drawn_features(train: int, test: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features whose spectrum falls as a power of the rank, as those of networks do; classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))
    scale = (torch.arange(DIM) + 1.0).pow(-0.75)
    labels = torch.randint(CLASSES, (train + test,), generator=generator)
    centres = 0.5 * torch.randn(CLASSES, DIM, generator=generator) * (torch.arange(DIM) < 60)
    points = torch.randn(train + test, DIM, generator=generator) + centres[labels]
    features = ((points * scale) @ rotation.T + 0.5 * torch.randn(DIM, generator=generator)).contiguous()
    return features[:train], labels[:train], features[train:], labels[train:]


def network_features(data: str, limit: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of an untrained ViT-S (384 wide, patch side 4) on real images."""
    found: list[Tensor] = []
    for source in open_splits(data, DataOptions(limit=limit)):
        encoder = open_encoder("random:vit_s?patch_size=4", view=source.view)
        with torch.inference_mode():
            parts = [encoder(b.images).cls for b in make_loader(source, batch_size=256, train=False)]
        found += [torch.cat([part for part in parts if part is not None]), torch.as_tensor(source.labels)]
    return found[0], found[1], found[2], found[3]


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, decay: float) -> float:
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.double() + bias.double(), y)
    return float(loss + decay / 2 * weight.double().square().sum())


def compare_linear(train: Tensor, y: Tensor, test: Tensor, truth: Tensor) -> list[dict[str, Any]]:
    """One row for each of the two, and one for the choice of weight decay with all that belongs to it."""
    whole, judge = seconds(lambda: fit_linear(train, y, CLASSES, torch.arange(len(y)) % 5 == 0))
    decay = judge.chosen["weight_decay"]
    x, mean, std = standardise(train)
    held = (test - mean) / std
    fits: dict[str, list[dict[str, Any]]] = {"clustermim": [], "scikit-learn": []}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "train.npz", x=x.numpy(), y=y.numpy())
        for _ in range(RUNS):
            for name, found in fits.items():
                command = [sys.executable, __file__, "--fit", name, folder, str(decay)]
                subprocess.run(command, check=True)
                with np.load(Path(folder) / "fit.npz") as file:
                    found.append({key: torch.from_numpy(file[key]) for key in file.files})
    common = {"train": len(y), "dim": x.shape[1], "weight_decay": decay}
    table = []
    for name, found in fits.items():
        spent = [float(fit["seconds"]) for fit in found]
        weight, bias = found[-1]["weight"], found[-1]["bias"]
        table.append(
            common
            | {"what": "logistic regression", "by": name, "seconds": statistics.median(spent), "all_seconds": spent}
            | {"objective": objective(x, y, weight, bias, decay), "iterations": int(found[-1]["iterations"])}
            | {"top1": ((held.double() @ weight.double() + bias.double()).argmax(1) == truth).double().mean().item()}
        )
    table[0]["times_faster"] = table[1]["seconds"] / table[0]["seconds"]
    note = "choice among the weight decays on a fifth of train, and the last fit on all of it"
    return [*table, common | {"what": "whole protocol `linear`", "seconds": whole, "note": note}]


def fit_one(name: str, folder: Path, decay: float) -> None:
    """One regression, in this process, which should be fresh."""
    with np.load(folder / "train.npz") as file:
        x, y = file["x"], file["y"]
    few = slice(0, 2000)  # threads and imports are there before the clock runs
    if name == "clustermim":
        rows, classes = torch.from_numpy(x), torch.from_numpy(y)
        fit_logistic(rows[few], classes[few], CLASSES, decay)
        spent, fit = seconds(lambda: fit_logistic(rows, classes, CLASSES, decay))
        weight, bias, iterations = fit.weight.numpy(), fit.bias.numpy(), fit.iterations
    else:
        peer = LogisticRegression(C=1 / (decay * len(y)), max_iter=5000)
        LogisticRegression(C=1 / (decay * 2000)).fit(x[few], y[few])
        spent, _ = seconds(lambda: peer.fit(x, y))
        weight, bias, iterations = peer.coef_.T, peer.intercept_, int(peer.n_iter_[0])
    np.savez(folder / "fit.npz", weight=weight, bias=bias, iterations=iterations, seconds=spent)


def measure_knn(train: int, test: int) -> dict[str, Any]:
    """In this process, which should be fresh: its peak of memory is compared with that before."""
    bank, labels, queries, truth = drawn_features(train, test)
    validation = torch.arange(len(labels)) % 5 == 0
    before = start_peak()
    judge = fit_knn(bank, labels, CLASSES, validation, ks=(20,))
    spent, answer = seconds(lambda: judge.answer(queries))
    peak = peak_above(before)
    top1 = (answer.scores.argmax(1) == truth).double().mean().item()
    sizes = {"train": train, "test": test, "dim": DIM, "k": judge.k}
    whole = 4 * train * test / 2**20
    return {"what": "k-NN", **sizes, "seconds": spent, "peak_mib": peak, "similarities_mib": whole, "top1": top1}


def main() -> None:
    """Measure and write results/probe_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled images with a test split; default: drawn features")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images; nothing is recorded")
    parser.add_argument("--knn", action="store_true", help="only k-NN, as JSON (what the benchmark calls itself with)")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        fit_one(options.fit[0], Path(options.fit[1]), float(options.fit[2]))
        return
    train, test = (5_000, 1_000) if options.quick else (50_000, 10_000)
    if options.knn:
        print(json.dumps(measure_knn(train, test)))
        return
    command = [sys.executable, __file__, "--knn", *(["--quick"] if options.quick else [])]
    knn = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]
    middle = sorted(knn, key=lambda row: row["seconds"])[RUNS // 2] | {"all_seconds": [row["seconds"] for row in knn]}
    if options.data:
        features = network_features(options.data, train if options.quick else None)
    else:
        features = drawn_features(train, test)
    rows = [*compare_linear(*features), middle]
    for row in rows:
        print(json.dumps(row))
    if not options.quick:
        print(record("probe_speed", rows, threads=torch.get_num_threads(), features=options.data or "drawn"))


if __name__ == "__main__":
    main()

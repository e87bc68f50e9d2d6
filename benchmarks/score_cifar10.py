"""Scores at scale on CIFAR-10: one pass for eight tokenizers, bootstrap, learning curve, tokens made for labels.

    python benchmarks/score_cifar10.py --data ../shared/data/cifar10 --work runs/score_cifar10

fits pixel vocabularies of K = 10, 50, 200 and 1000 and four controls on the training images, counts all eight in one
pass (seconds in tokenizing and in counting, with and without the counts of each image that a bootstrap needs), times
1,000 bootstrap replicates of K = 1000, draws the learning curve, and measures on held-out training images what merging
1,000 tokens down to 50 by labels gains over plain K-means of 50. Test images are never read.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from clustermim.openmp import WAITING

os.environ.update(WAITING)  # as the command line does; read when torch loads

import numpy as np
from recording import record

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.scoring.folds import plan_images
from clustermim.scoring.learning import curve_advice, learning_curve
from clustermim.scoring.stream import CountedStream, count_stream
from clustermim.scoring.tcas import score_counts
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.launch import resolve_device
from clustermim.verbs.tokenizer_fit import fit_tokenizer

SIZES = (10, 50, 200, 1000)
PASSES = 5  # over all patches, at most: the score is measured here, not the fit
CONTROLS = ("identity", "random", "position", "oracle")


def fitted(work: Path, name: str, source: ImageSource, **how: Any) -> tuple[Tokenizer, float]:
    """The tokenizer of that name, fitted now or on an earlier try, and the seconds it took now."""
    start = time.perf_counter()
    made = fit_tokenizer(source, patch_size=4, out=work / name, resume=True, **({"max_passes": PASSES} | how))
    return load_tokenizer(made), round(time.perf_counter() - start, 2)


def times(counted: CountedStream, names: list[str]) -> dict[str, float]:
    """Seconds in tokenizing (images read and cut once; features and nearest centroids of each) and in counting."""
    encoding = sum(counted.seconds_tokenizing[name] for name in names)
    counting = sum(counted.seconds_counting[name] for name in names)
    tokenizing = counted.seconds_reading + encoding
    return {
        "seconds_tokenizing": tokenizing,
        "seconds_counting": counting,
        "counting_over_tokenizing": counting / tokenizing,
        "counting_over_encoding_alone": counting / encoding,
    }


def main() -> None:
    """Run all parts and write results/score_cifar10.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, or any labelled source")
    parser.add_argument("--work", type=Path, default=Path("runs/score_cifar10"), help="where tokenizers are kept")
    parser.add_argument("--quick", action="store_true", help="2,000 images, 60 replicates, nothing recorded")
    asked = parser.parse_args()
    options = DataOptions(limit=2000 if asked.quick else None)
    replicates = 60 if asked.quick else 1000
    source = open_source(asked.data, options)
    device = resolve_device()
    if source.labels is None:
        parser.error(f"{asked.data} has no labels")

    tokenizers: dict[str, Tokenizer] = {}
    for k in SIZES:
        tokenizers[f"pixel-k{k}"], _ = fitted(asked.work, f"pixel-k{k}", source, k=k)
    for kind in CONTROLS:
        tokenizers[kind], _ = fitted(asked.work, kind, source, k=50, kind=kind, max_passes=20)
    for one in tokenizers.values():
        one.to(device)
    pixels = [name for name in tokenizers if name not in CONTROLS]
    plan = plan_images(source.labels, groups=source.groups)
    loader = make_loader(source, batch_size=256, train=False, device=device)
    for _ in loader.epoch():  # what is read once for all passes is not a pass's time
        break

    notes: dict[str, Any] = {"images": len(source), "device": device, "passes": {}}
    for per_image in (False, True):
        start = time.perf_counter()
        counted = count_stream(tokenizers, loader.epoch(), plan, per_image=per_image)
        notes["passes"]["counts of each image" if per_image else "table alone"] = {
            "seconds_in_all": time.perf_counter() - start,
            "eight tokenizers": times(counted, list(tokenizers)),
            "four of pixels": times(counted, pixels),
        }
    for kind, found in notes["passes"].items():
        for which in ("eight tokenizers", "four of pixels"):
            told = found[which]
            print(
                f"{kind}, {which}: tokenizing {told['seconds_tokenizing']:.2f} s, counting "
                f"{told['seconds_counting']:.3f} s, ratio {told['counting_over_tokenizing']:.2%}",
                flush=True,
            )
    start = time.perf_counter()
    sparse = {name: counts.rows() for name, counts in counted.counts.items()}
    notes["seconds_to_sparse_matrices"] = time.perf_counter() - start
    notes["sparse_entries"] = {name: int(rows.matrix.nnz) for name, rows in sparse.items()}
    print(f"sparse matrices of all eight: {notes['seconds_to_sparse_matrices']:.2f} s", flush=True)
    del sparse

    rows = []
    for name, counts in counted.counts.items():
        boots = replicates if name == "pixel-k1000" else min(200, replicates)
        start = time.perf_counter()
        score = score_counts(counts, bootstrap=boots)
        seconds = time.perf_counter() - start
        rows.append(
            {"tokenizer": name, "seconds_scoring": seconds} | score.to_dict() | {"notes": " ".join(score.notes)}
        )
        print(f"{name}: alignment {score.alignment_crossfit:.4f}, {boots} replicates in {seconds:.1f} s", flush=True)

    start = time.perf_counter()
    curves = {name: learning_curve(counted.counts[name], draws=3) for name in pixels}
    notes["curve_seconds"] = time.perf_counter() - start
    notes["curves"] = {name: [point.to_dict() for point in curve] for name, curve in curves.items()}
    notes["curve_advice"] = curve_advice(curves)
    print(*notes["curve_advice"], sep="\n", flush=True)

    fine = 200 if asked.quick else 1000
    aligned, seconds = fitted(asked.work, f"aligned-{fine}-k50", source, k=50, align_with="labels", align_from=fine)
    held_out = {key: value for key, value in aligned.facts.items() if key.startswith(("held_out", "align"))}
    notes["aligned"] = held_out | {"seconds": seconds}
    print({key: np.round(value, 4) for key, value in held_out.items()}, flush=True)
    if not asked.quick:
        print(record("score_cifar10", rows, **notes))


if __name__ == "__main__":
    main()

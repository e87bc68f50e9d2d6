"""Does CrossMAE's decoder cost quality? Cross against self decoder on CIFAR-10, at equal epochs and at equal wall time.

    python benchmarks/cross_decoder.py --data ../shared/data/cifar10 --work runs/cross_decoder [--limit 5000]

`vit_micro`, patch 4, pixels (norm-pix), three seeds. Arms: the self decoder (MAE's), the cross decoder that predicts a
quarter of the hidden patches for as many epochs, and the same for as many epochs as take the self decoder's time
(from the images a second that the first two runs report, which go side by side). Two runs go at a time, one thread
each. All are judged by k-NN and the linear probe. Every step is a command of the public command line; a killed run
goes on where it was, and results appear once all are there.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cifar10_smoke import Steps, command
from recording import provenance, record

from clustermim.runs import read_metrics

CROSS = ("--decoder", "cross", "--predict-ratio", 0.25)


def rate(run: Path) -> float:
    """Median images a second over the log rows of a run, the first row left out."""
    found = [float(row["images_per_second"]) for row in read_metrics(run)]
    return statistics.median(found[1:] or found)


def pretrain(steps: Steps, options: argparse.Namespace, name: str, seed: int, epochs: int, *more: object) -> Path:
    """Pretrain one arm for one seed, or find it done; gives back its directory."""
    out = steps.work / f"{name}-seed{seed}"
    shared: tuple[object, ...] = (
        "--target",
        "pixel",
        "--model",
        "vit_micro",
        "--patch-size",
        4,
        "--data",
        options.data,
    )
    shared += ("--batch-size", options.batch_size, "--precision", options.precision, "--lr", options.lr)
    shared += ("--seed", seed, "--epochs", epochs, "--resume", "--out", out)
    shared += () if options.limit is None else ("--limit", options.limit)
    steps.run(f"pretrain-{out.name}", command("pretrain", *shared, *more), threads=1)
    return out


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over the seeds of each arm's test accuracy, a row for each protocol and pool."""
    table: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        arm = str(row["encoder"]).rsplit("-seed", 1)[0]
        table.setdefault((arm, row["protocol"], str(row.get("pool"))), []).append(float(row["top1"]))
    return [
        {"arm": arm, "protocol": protocol, "pool": pool, "seeds": len(found), "mean_top1": statistics.mean(found)}
        | {"lowest": min(found), "highest": max(found)}
        for (arm, protocol, pool), found in table.items()
    ]


def main() -> None:
    """Run all steps and write results/cross_decoder.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a parquet folder or any source with train and test")
    parser.add_argument("--work", type=Path, default=Path("runs/cross_decoder"), help="where runs and logs go")
    parser.add_argument("--epochs", type=int, default=10, help="of the self decoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--limit", type=int, help="train and probe on so many images")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--lr", default="1e-3", help="for 256 images; the same for all arms")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    started, steps = provenance(), Steps(options.work)
    arms: list[tuple[str, tuple[object, ...]]] = [("self", ()), ("cross", CROSS)]

    def train(arm: str, more: tuple[object, ...], seed: int, epochs: int) -> Path:
        return pretrain(steps, options, arm, seed, epochs, *more)

    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda arm: train(*arm, 0, options.epochs), arms))
        # The epochs of equal time are settled once, by the first seed, and kept for a resumed run.
        settled = options.work / "equal_time.json"
        if not settled.exists():
            settled.write_text(json.dumps(max(1, round(options.epochs * rate(first[1]) / rate(first[0])))))
        longer = json.loads(settled.read_text())
        todo = [(*arm, seed, options.epochs) for seed in range(options.seeds) for arm in arms]
        todo += [("cross-equal-time", CROSS, seed, longer) for seed in range(options.seeds)]
        runs = list(pool.map(lambda one: train(*one), todo))
    speeds = [
        {"run": run.name, "epochs": epochs, "images_per_second": rate(run)}
        for run, (_, _, _, epochs) in zip(runs, todo, strict=True)
    ]
    judged = options.work / "probe.json"
    probing: tuple[object, ...] = ("--data", options.data, "--protocol", "knn", "linear", "--json", judged)
    probing += () if options.limit is None else ("--limit", options.limit)
    steps.run("probe", command("probe", "--encoder", *runs, *probing))
    rows = json.loads(judged.read_text())
    for row in rows:
        row["encoder"] = Path(row["encoder"]).name
    for line in (*speeds, *summary(rows)):
        print(json.dumps(line))
    commands = list(steps.done.values())
    how = {"limit": options.limit, "epochs": options.epochs, "epochs_of_equal_time": longer}
    print(
        record("cross_decoder", summary(rows), started=started, **how, speeds=speeds, all_rows=rows, commands=commands)
    )


if __name__ == "__main__":
    main()

"""The same training by one process, by two, and by two "nodes" of one each on the loopback: the same losses.

    python benchmarks/world_sizes.py [--strategy ddp|fsdp]

Twenty steps on the embedded digits at one global batch, over gloo: pixels and K-means tokens, in 64 and in 32 bits.
Prints the largest difference of a loss from that of one process, beside the bars 1e-8 and 1e-4.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from recording import record

STEPS, BARS = 20, {"64-true": 1e-8, "32-true": 1e-4}
OPTIONS = "--data digits --limit 320 --batch-size 32 --epochs 2 --log-every 1 --device cpu --decoder-dim 16"
OPTIONS += " --decoder-depth 1 --decoder-heads 2 --clip-grad 1"
WORLDS = ("one process", "two processes", "two nodes of one process")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(out: Path, world: str, more: list[str], strategy: str) -> list[float]:
    """One training; as a cluster would start it where there are two nodes."""
    command = ["-m", "clustermim", "pretrain", *OPTIONS.split(), *more, "--out", str(out)]
    if world != WORLDS[0]:
        command += ["--strategy", strategy]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if world != WORLDS[2]:
        devices = ["--devices", "2"] if world == WORLDS[1] else []
        jobs = [subprocess.Popen([sys.executable, *command, *devices], env=environment, stdout=subprocess.DEVNULL)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        jobs = [
            subprocess.Popen(
                [sys.executable, *torchrun, "--node-rank", str(node), *command],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for node in range(2)
        ]
    codes = [job.wait(600) for job in jobs]  # all of them, also where the first fails
    if any(codes):
        raise SystemExit(f"{world}: a process failed; its message stands above")
    return losses(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="ddp", choices=("ddp", "fsdp"), help="of the runs of two processes")
    strategy = parser.parse_args().strategy
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        fit = "tokenizer fit --data digits --patch-size 4 --k 20 --device cpu --out"
        subprocess.run([sys.executable, "-m", "clustermim", *fit.split(), str(work / "k20")], check=True)
        targets = {
            "pixel": ["--target", "pixel", "--patch-size", "4"],
            "token": ["--target", "token", "--tokenizer", str(work / "k20")],
        }
        for target, chosen in targets.items():
            for precision, bar in BARS.items():
                if strategy == "fsdp" and precision == "64-true":
                    continue  # Fabric's strategy has no 64 bits
                more = [*chosen, "--precision", precision]
                found = {
                    world: train(work / f"{target}-{precision}-{place}", world, more, strategy)
                    for place, world in enumerate(WORLDS)
                }
                one = found[WORLDS[0]]
                for world in WORLDS[1:]:
                    difference = max(abs(a - b) for a, b in zip(one, found[world], strict=True))
                    met = len(one) == STEPS and difference <= bar
                    row = {"target": target, "precision": precision, "world": world, "strategy": strategy}
                    rows.append(row | {"steps": len(one), "largest difference": difference, "bar": bar, "met": met})
                    print(json.dumps(rows[-1]), flush=True)
    record("world_sizes" if strategy == "ddp" else f"world_sizes_{strategy}", rows)
    if not all(row["met"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

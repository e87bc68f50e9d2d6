"""How fast a masked autoencoder trains, and in how much memory: ours beside three peers, in 32 bits and in bf16.

    pip install --no-deps --target PEERS lightly==1.6.0 stable-pretraining==0.1.8 ... (and what they import)
    python benchmarks/pretraining_speed.py --peers PEERS [--eager-only] [--rounds 3]

Every arm of `pretraining_arms.py` is a process of its own: ViT-S/16, 224², batches of 32, three quarters hidden, equal
sizes (checked), one optimiser. The arms take a step in turn, so that a slow moment of the machine meets all of them;
the first steps are not counted, medians are. `products` makes only the matrix products of our step: the floor. Memory
is the peak above that after the imports. A peer that cannot be imported is reported as such. With compilation each
arm's model goes through torch.compile with default settings. The profile says which kernels our step's time goes into.
`BATCH=2 ... --dry` tries it out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretraining_arms import BATCH, PEERS, PRODUCTS, choose
from recording import record

from clustermim.openmp import WAITING
from clustermim.products import multiplies_bfloat16

OURS = ("pixel", "token")
CROSS = ("pixel cross", "pixel cross 1/4")
FLOOR = "products"
AIMS = {"fp32": 1.15, "bf16": 1.3}
ARMS = Path(__file__).with_name("pretraining_arms.py")

KERNELS = {
    "matrix products": PRODUCTS,
    "attention by one kernel": ("flash_attention",),
    "softmax, GELU": ("softmax", "gelu"),
    "norms": ("layer_norm",),
    "copies and casts": ("copy_", "cat", "fill_", "index", "clone"),
    "sums (bias gradients, losses)": ("sum", "mse_loss", "var_mean"),
    "AdamW": ("adamw",),
}


class Arm:
    """A process that takes a step when told to."""

    def __init__(self, name: str, precision: str, compile: bool, peers: str | None) -> None:
        self.name = name
        command = [sys.executable, str(ARMS), "--arm", name, "--precision", precision]
        command += ["--compile"] if compile else []
        command += ["--peers", peers] if peers else []
        # Ours as its command line starts it; the peers as PyTorch starts.
        policy = {} if name in PEERS else WAITING
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=os.environ | policy, **pipes)
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        """What the process says next."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        return json.loads(line) if line else {"problem": "the process ended"}

    def tell(self, word: str) -> dict[str, Any]:
        """Say a word, wait for the answer."""
        self.process.stdin.write(word + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.answer()


def measure(
    precision: str, compile: bool, names: tuple[str, ...], rounds: int, peers: str | None, until: float
) -> list[Any]:
    """One row an arm; those that have not begun by `until` (of the monotonic clock) are not measured."""
    arms, rows = [], []
    for name in names:
        if time.monotonic() > until:
            rows.append(
                {"precision": precision, "compiled": compile, "arm": name, "problem": "not measured: time was up"}
            )
            continue
        arm = Arm(name, precision, compile, peers)
        row = {"precision": precision, "compiled": compile, "arm": name, **arm.first}
        rows.append(row)
        if "problem" not in row:
            began = time.perf_counter()
            first = arm.tell("step")
            row |= first if "problem" in first else {"first_step_seconds": time.perf_counter() - began}
        if "problem" not in row:
            arms.append((arm, row, []))
    for number in range(rounds + 1):
        for arm, row, seconds in arms:
            step = arm.tell("step")
            if number:  # the round before the first counted one warms up what the first step did not
                seconds.append(step["seconds"])
            row["loss"] = step["loss"]
    for arm, row, seconds in arms:
        row["memory_mib"] = arm.tell("end")["memory_mib"]
        row["seconds"] = seconds
        row["images_per_second"] = BATCH / statistics.median(seconds)
        arm.process.wait()
    for _, row, _ in arms:
        for part, own in rows_of(arms, "pixel").items():
            # stable-pretraining trains positions too (75,648 numbers) and has one projection more in its decoder.
            if row["arm"] in PEERS and abs(row["parameters"][part] - own) > 0.02 * own:
                sys.exit(f"{row['arm']} differs in size by more than 2 %: {row['parameters']}")
    return rows


def rows_of(arms: list[Any], name: str) -> dict[str, int]:
    """The parameter counts of an arm; empty if it is not there."""
    return next((row["parameters"] for _, row, _ in arms if row["arm"] == name), {})


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each precision and way our speed and memory against the best peer's, and whether the aim is met."""
    found = []
    for precision, compile in sorted({(row["precision"], row["compiled"]) for row in rows}):
        here = {r["arm"]: r for r in rows if (r["precision"], r["compiled"]) == (precision, compile)}
        theirs = [here[name] for name in PEERS if "images_per_second" in here.get(name, {})]
        if not theirs or "images_per_second" not in here.get("pixel", {}):
            continue
        best = max(theirs, key=lambda row: row["images_per_second"])
        least = min(theirs, key=lambda row: row["memory_mib"])
        speed = here["pixel"]["images_per_second"]
        said = {"precision": precision, "compiled": compile, "best_peer": best["arm"]}
        said |= {"speed_ratio": speed / best["images_per_second"], "aim": AIMS[precision]}
        said |= {"memory_ratio": here["pixel"]["memory_mib"] / least["memory_mib"], "least_memory_peer": least["arm"]}
        if "seconds" in here.get(FLOOR, {}):
            said["share_of_products"] = speed / here[FLOOR]["images_per_second"]
        said["met"] = bool(said["speed_ratio"] >= said["aim"] and said["memory_ratio"] < 1)
        for name in (*OURS[1:], *CROSS):
            if "images_per_second" in here.get(name, {}):
                said[f"{name} / pixel"] = here[name]["images_per_second"] / speed
        found.append(said)
    return found


def profile(precision: str) -> dict[str, float]:
    """Share of the time of our `pixel` step in each kind of kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    torch.set_num_threads(2)
    _, step = choose("pixel", precision, False)()
    step()
    with profiled(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = [(event.key, event.self_cpu_time_total) for event in seen.key_averages()]
    total = sum(time for _, time in events)
    shares = dict.fromkeys(KERNELS, 0.0)
    for key, time_taken in events:
        name = key.split("::")[-1]
        for kind, parts in KERNELS.items():
            exact = kind == "matrix products"
            if name in parts if exact else any(part in name for part in parts):
                shares[kind] += time_taken / total
                break
    shares["other element-wise work and dispatch"] = 1.0 - sum(shares.values())
    return {kind: round(share, 4) for kind, share in shares.items()}


def main() -> None:
    """Measure and write results/pretraining_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder with lightly and stable-pretraining; transformers is a dev dependency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further arm after so long")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    able = [p for p in AIMS if p != "bf16" or multiplies_bfloat16()]
    if able != list(AIMS):
        print("No arm in bf16: this processor would take a hundred times as long.", flush=True)
    groups = [(p, False, (*PEERS, *OURS, *CROSS, FLOOR)) for p in able]
    groups += [] if options.eager_only else [(p, True, (*PEERS, *OURS)) for p in able]
    for precision, compile, names in groups:
        rows += measure(precision, compile, names, options.rounds, options.peers, began + 60 * options.minutes)
        for row in rows[-len(names) :]:
            print(json.dumps(row), flush=True)
    shares = {precision: profile(precision) for precision in able}
    ratios = compare(rows)
    for line in (*ratios, shares):
        print(json.dumps(line))
    if not options.dry:
        print(record("pretraining_speed", rows, ratios=ratios, profile_of_pixel_step=shares, batch=BATCH))


if __name__ == "__main__":
    main()

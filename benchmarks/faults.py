"""A campaign of faults: pretraining is broken in every way we know of, resumed, and compared with an unbroken run.

    python benchmarks/faults.py [--seed 0] [--kills 25] [--quick]

A tiny run (80 steps, a checkpoint every 10) on the embedded digits, float32 on a CPU, a process of its own for every
attempt. Each row: what was done and when, the exit codes, whether the message said what happened and which command to
type, how many steps had to be repeated, and whether the end is bit-identical (weights, rows of metrics but for times).
Disks are real small ones (tmpfs) where the user may mount; elsewhere their rows are left out and the summary says so.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# One thread, asleep while it waits: many small processes share the machine, and float32 sums keep their order.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import fault_points as points
from recording import record

STEPS, EVERY = 80, 10
OPTIONS = f"--data digits --limit 320 --target pixel --patch-size 4 --batch-size 32 --epochs {STEPS // 10} --device cpu"
OPTIONS += f" --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --log-every 1 --checkpoint-every {EVERY}"
RESUME = "--resume"


def attempt(out: Path, said: Path, extra: list[str], fault: tuple[str, int, str] | None, counts: Path | None) -> None:
    """One process: the command line, with a fault in it or not."""
    os.setsid()  # a group of its own, as a job has
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this in the background has it ignored
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from clustermim.cli import run

    passed = points.count() if counts is not None else {}
    if fault is not None:
        points.install(*fault)
    code = run(["pretrain", *OPTIONS.split(), "--out", str(out), *extra])
    if counts is not None:
        counts.write_text(json.dumps(passed))
    sys.exit(code)


@dataclass
class Case:
    """One fault, and what came of it."""

    out: Path
    kind: str
    when: str
    expected: int | None
    """Exit code of the broken attempt."""
    words: tuple[str, ...] = ()
    """What its message must say."""
    extra: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    repeated: int = 0

    @property
    def said(self) -> str:
        """What the last attempt told, as one line."""
        file = self.out.with_suffix(".log")
        return " ".join(file.read_text().split()) if file.exists() else ""

    def steps(self) -> int:
        """The last step of which a row stands."""
        from clustermim.runs import read_metrics

        return max((row["step"] for row in read_metrics(self.out)), default=0)

    def start(self, fault: tuple[str, int, str] | None = None, counts: Path | None = None) -> Any:
        """One attempt in a process of its own."""
        arguments = (self.out, self.out.with_suffix(".log"), [RESUME, *self.extra], fault, counts)
        process = CONTEXT.Process(target=attempt, args=arguments)
        process.start()
        return process

    def go(self, meddle: Callable[[Any], None] | None = None, **how: Any) -> int:
        """One attempt, meddled with from outside or not; gives back its exit code."""
        process = self.start(**how)
        if meddle is not None:
            meddle(process)
        process.join(600)
        if process.is_alive():
            process.kill()
            raise SystemExit(f"{self.kind}, {self.when}: still running after ten minutes")
        self.codes.append(process.exitcode)
        return int(process.exitcode)

    def finish(self) -> None:
        """Resume to the end, noting how many steps were done twice."""
        reached = self.steps()
        self.out.with_suffix(".log").rename(self.out.with_suffix(".first.log"))
        self.go()
        at = self.said.partition("Continuing from the checkpoint of step ")[2].partition(" ")[0]
        self.repeated = reached - int(at or 0) if self.codes[0] else 0

    def row(self, whole: Path) -> dict[str, Any]:
        """What came of it, beside an unbroken run."""
        first = " ".join(self.out.with_suffix(".first.log").read_text().split())
        told = all(words in first for words in self.words) and "Traceback" not in first + self.said
        if self.expected is not None and self.expected > 0:
            told = told and "Next: clustermim pretrain" in first and first.endswith(RESUME)
        return {
            "fault": self.kind,
            "when": self.when,
            "exit codes": self.codes,
            "as designed": self.codes[0] == self.expected if self.expected is not None else True,
            "said so": told,
            "finished": self.codes[-1] == 0,
            "steps done twice": self.repeated,
            "bit-identical": same(self.out, whole),
        }


def same(one: Path, other: Path) -> bool:
    """Whether two runs left the same weights and, but for times, the same rows."""
    from clustermim.runs import read_manifest, read_metrics

    def rows(run: Path) -> list[dict[str, Any]]:
        times = ("seconds", "images_per_second", "mfu")
        return [{key: value for key, value in row.items() if key not in times} for row in read_metrics(run)]

    weights = ("encoder.safetensors", "model.safetensors")
    return (
        all((one / name).exists() and (one / name).read_bytes() == (other / name).read_bytes() for name in weights)
        and rows(one) == rows(other)
        and read_manifest(one)["status"] == "finished"
    )


def at_step(case: Case, step: int, process: Any) -> None:
    """Wait until a run has passed a step."""
    while process.is_alive() and case.steps() < step:
        time.sleep(0.005)


def send(case: Case, step: int, number: int, group: bool = False) -> Callable[[Any], None]:
    def meddle(process: Any) -> None:
        at_step(case, step, process)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)

    return meddle


def kill_a_reader(case: Case, step: int) -> Callable[[Any], None]:
    def meddle(process: Any) -> None:
        at_step(case, step, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    return meddle


def kills(work: Path, draw: random.Random, number: int, counts: dict[str, int]) -> Iterator[Case]:
    """SIGKILL: two in five at a point inside a write, the others at any time at all."""
    inside = [point for point in counts if point != "loss"]
    for place in range(number):
        if place % 5 < 2:
            turn = place // 5 * 2 + place % 5
            point = inside[turn] if turn < len(inside) else "half a checkpoint"
            call = draw.randint(1, counts[point])
            case = Case(work / f"kill{place}", "SIGKILL", f"{point}, the {call}th of {counts[point]}", -9)
            case.go(fault=(point, call, points.KILL))
        else:
            step, after = draw.randrange(STEPS), draw.uniform(0.0, 0.1)
            case = Case(work / f"kill{place}", "SIGKILL", f"{after:.3f} s after step {step}", -9)

            def wait(process: Any, case: Case = case, step: int = step, after: float = after) -> None:
                at_step(case, step, process)
                process.join(after)
                process.kill()

            if case.go(wait) == 0:
                case.expected = 0  # it was faster this time
        yield case


def stops(work: Path, draw: random.Random) -> Iterator[Case]:
    """Requests to stop, of one process and of its whole group with readers of images."""
    for name, code in (("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)):
        for group in (False, True):
            step = draw.randint(2, STEPS - 10)
            what = f"{name} to the whole group, one reader" if group else name
            words = () if code == 130 else (f"stopped by {name}", "--resume")
            extra = ["--workers", "1"] if group else []
            case = Case(work / f"{name}{group}", what, f"after step {step}", code, words, extra)
            case.go(send(case, step, getattr(signal, name), group))
            yield case
    case = Case(work / "minutes", "--max-minutes", "after 0.6 s", 75, ("at --max-minutes",))
    case.extra = ["--max-minutes", "0.01"]
    case.go()
    case.extra = []
    yield case


def inner(work: Path, draw: random.Random, counts: dict[str, int]) -> Iterator[Case]:
    """What goes wrong inside: NaN, memory, a reader, what the system says of a disk."""
    step = draw.randint(12, STEPS)
    case = Case(work / "nan", "NaN loss", f"step {step}", 3, (f"loss of step {step} is nan", "--lr"))
    case.go(fault=("loss", step, points.NAN))
    log = case.out.with_suffix(".log")
    # The proposed command changes --lr; a passing fault is gone when the same command is repeated.
    log.write_text(log.read_text().replace(f"--lr 7.5e-05 {RESUME}", RESUME))
    yield case
    step = draw.randint(12, STEPS)
    case = Case(work / "memory", "out of memory", f"step {step}", 4, ("--accumulate 2", "--batch-size such as 16"))
    case.go(fault=("loss", step, points.MEMORY))
    yield case
    step = draw.randint(12, STEPS - 10)
    case = Case(work / "reader", "a reader of images is killed", f"after step {step}", 4, ("reads images died",))
    case.extra = ["--workers", "1"]
    case.go(kill_a_reader(case, step))
    yield case
    for what in (points.ENOSPC, points.EROFS):
        for point in ("half a checkpoint", "before fsync", "before a rename", "half the final weights"):
            call = draw.randint(max(1, counts[point] // 4), counts[point])
            case = Case(work / f"{what}{point}", f"{what} said by the system", f"{point}, the {call}th", 4)
            case.words = (os.strerror(getattr(points.errno, what)),)
            case.go(fault=(point, call, what))
            yield case


def damages(work: Path, draw: random.Random) -> Iterator[Case]:
    """A checkpoint that is torn or altered after it was written."""
    for what in ("last checkpoint cut short", "bit flipped in the last checkpoint", "both checkpoints damaged"):
        step = draw.randint(32, STEPS - 10)
        case = Case(work / what.replace(" ", "-"), what, f"killed after step {step}", -9)
        case.go(send(case, step, signal.SIGKILL))
        standing = sorted((case.out / "checkpoints").glob("step-*-*.pt"))
        for file in standing if what.startswith("both") else standing[-1:]:
            content = bytearray(file.read_bytes())
            place = draw.randrange(len(content))
            content[place] ^= 1 << draw.randrange(8)
            file.write_bytes(content if "flipped" in what else content[:place])
        yield case


def disks(work: Path, draw: random.Random) -> Iterator[Case]:
    """A small disk that fills up, becomes read-only, or goes away and comes back."""
    for what in ("disk full", "disk read-only", "output moved away"):
        step = draw.randint(12, 25)
        mount = work / what.replace(" ", "-")
        mount.mkdir()
        case = Case(mount / "run", what, f"after step {step}", 4)
        size = "36m" if what == "disk full" else "100m"  # room for two checkpoints, or for all
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)

        def away(process: Any, case: Case = case, step: int = step, mount: Path = mount, what: str = what) -> None:
            if what == "disk full":
                return
            at_step(case, step, process)
            if what == "output moved away":
                case.out.rename(mount / "elsewhere")
                return
            remount = ["mount", "-o", "remount,ro", str(mount)]
            while process.is_alive() and subprocess.run(remount, capture_output=True, check=False).returncode:
                time.sleep(0.001)  # busy while a file is open for writing

        # What a process says is written beside the run, which is no place for a log on a broken disk.
        (work / f"{mount.name}.log").touch()
        case.out.with_suffix(".log").symlink_to(work / f"{mount.name}.log")
        try:
            case.go(away)
            if what == "output moved away":
                case.words = ("bring the folder back",)
                (mount / "elsewhere").rename(case.out)
            else:
                case.words = ("No space left" if what == "disk full" else "Read-only file system",)
                case.when = f"after step {case.steps()}"
                subprocess.run(["mount", "-o", "remount,rw,size=100m", str(mount)], check=True)
            text = (work / f"{mount.name}.log").read_text()
            case.out.with_suffix(".log").unlink()
            case.out.with_suffix(".log").write_text(text)
            yield case
        finally:
            subprocess.run(["umount", str(mount)], check=True)


def two(work: Path, draw: random.Random) -> Iterator[tuple[Case, Path]]:
    """Two processes that train together."""

    def start(case: Case) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "clustermim", "pretrain", *OPTIONS.split(), "--devices", "2"]
        with case.out.with_suffix(".log").open("a") as log:
            full = [*command, "--out", str(case.out), RESUME]
            return subprocess.Popen(full, stdout=log, stderr=log, start_new_session=True)

    whole = Case(work / "two-whole", "", "", None)
    if start(whole).wait(600):
        raise SystemExit(f"two processes: the unbroken run failed: {whole.said}")
    for what, code, words in (
        ("two processes: SIGTERM to the first", 75, ("stopped by SIGTERM",)),
        ("two processes: SIGUSR1 to both", 75, ("stopped by SIGUSR1",)),
        ("two processes: the second is killed", None, ()),
    ):
        step = draw.randint(12, STEPS - 20)
        case = Case(work / what.replace(" ", "-").replace(":", ""), what, f"after step {step}", code, words)
        process = start(case)
        while process.poll() is None and case.steps() < step:
            time.sleep(0.005)
        if "second" in what:
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
            os.kill(int(child), signal.SIGKILL)
        elif "both" in what:
            os.killpg(process.pid, signal.SIGUSR1)
        else:
            os.kill(process.pid, signal.SIGTERM)
        case.codes.append(process.wait(600))
        reached = case.steps()
        case.out.with_suffix(".log").rename(case.out.with_suffix(".first.log"))
        case.codes.append(start(case).wait(600))
        at = case.said.partition("Continuing from the checkpoint of step ")[2].partition(" ")[0]
        case.repeated = reached - int(at or 0)
        yield case, whole.out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="five kills and no second process; nothing is recorded")
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup every run would rightly ignore it
    draw, began, rows = random.Random(options.seed), time.monotonic(), []
    mounts = os.geteuid() == 0 and shutil.which("mount") is not None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole = Case(work / "whole", "", "", None)
        whole.go(counts=work / "counts.json")  # also the first use of everything, which takes longer
        if whole.codes != [0]:
            raise SystemExit(f"the unbroken run failed: {whole.said}")
        counts = json.loads((work / "counts.json").read_text())
        timed = Case(work / "again", "", "", None)
        timed.go()
        assert same(timed.out, whole.out), "two unbroken runs differ: nothing can be compared"

        # Readers of images cut views one by one, not a batch at a time, which rounds otherwise.
        reading = Case(work / "reading", "", "", None, extra=["--workers", "1"])
        reading.go()

        def note(case: Case, other: Path) -> None:
            rows.append(case.row(other))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(case.out)

        number = 5 if options.quick else options.kills
        chains = [kills(work, draw, number, counts), stops(work, draw), inner(work, draw, counts)]
        chains += [damages(work, draw), *([disks(work, draw)] if mounts else [])]
        for chain in chains:
            for case in chain:
                case.finish()
                note(case, reading.out if "--workers" in case.extra else whole.out)
        for case, other in () if options.quick else two(work, draw):
            note(case, other)
    good = [row for row in rows if row["as designed"] and row["said so"] and row["finished"] and row["bit-identical"]]
    summary = {
        "faults": len(rows),
        "as designed, told, finished and bit-identical": len(good),
        "lost runs": sum(not row["finished"] or not row["bit-identical"] for row in rows),
        "most steps done twice": max(row["steps done twice"] for row in rows),
        "real disks": mounts,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(summary))
    if not options.quick:
        record("faults", rows, summary=summary)
    if len(good) < len(rows):
        raise SystemExit(1)


CONTEXT: Any = multiprocessing.get_context("forkserver")  # spares each process the import of torch

if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["clustermim.verbs.pretrain_encoder", "clustermim.cli", "fault_points"])
    main()

"""Peak memory of this process above a starting point, from the kernel."""

from pathlib import Path


def status_mib(key: str) -> float:
    """A memory figure of this process in MiB: `VmRSS` now, `VmHWM` at its highest."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def start_peak() -> float:
    """What is resident now; the highest mark starts anew, which otherwise holds all that was, even in the starter."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def peak_above(start: float) -> float:
    """The highest mark since `start_peak`, above what was resident then."""
    return status_mib("VmHWM") - start

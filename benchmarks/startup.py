"""How long `clustermim --help` takes: median of eleven starts; it must stay below half a second."""

import statistics
import subprocess
import sys
import time

from recording import record

LIMIT = 0.5

if __name__ == "__main__":
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "clustermim", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    row = {"what": "clustermim --help", "median_seconds": statistics.median(seconds), "limit_seconds": LIMIT}
    print(f"clustermim --help: median {row['median_seconds']:.3f} s of {len(seconds)} starts (limit {LIMIT} s)")
    print(record("startup", [row]))
    sys.exit(statistics.median(seconds) > LIMIT)

"""Peak memory of K-means above that of importing the package: 1 M and 10 M patches of a synthetic stream.

    python benchmarks/kmeans_memory.py [--quick]

Each fit runs in a process of its own; patches are made as they are asked for and never held by the caller.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

from memory import peak_above, start_peak
from recording import record

DIM, K, PART = 48, 50, 16_384


def work(patches: int) -> None:
    import torch

    from clustermim.data.counted import uniform
    from clustermim.tokenizers.kmeans import fit_kmeans

    def blocks() -> Iterator[torch.Tensor]:
        column = torch.arange(DIM)
        for start in range(0, patches, PART):
            place = torch.arange(start, min(start + PART, patches))[:, None]
            yield uniform(0, place, column) + uniform(1, place // 7 % 97, column)

    next(iter(blocks()))
    before = start_peak()
    result = fit_kmeans(blocks, K, max_passes=2)
    peak = peak_above(before)
    print(json.dumps({"patches": result.num_rows, "megabytes": peak, "import_megabytes": before}))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200,000 and 1 M patches; nothing is recorded")
    options = parser.parse_args()
    rows = []
    for patches in (200_000, 1_000_000) if options.quick else (1_000_000, 10_000_000):
        done = subprocess.run(
            [sys.executable, __file__, "--worker", str(patches)], capture_output=True, text=True, check=True
        )
        rows.append({"k": K, "dim": DIM, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(rows[-1]), file=sys.stderr)
    ratio = rows[1]["megabytes"] / rows[0]["megabytes"]
    print(json.dumps({"ratio of peaks": round(ratio, 4), "bar": 1.1}))
    if not options.quick:
        record("kmeans_memory", rows, ratio_of_peaks=ratio, bar=1.1)


if __name__ == "__main__":
    main()

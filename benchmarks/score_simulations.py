"""Bias and coverage of cross-fitted alignment where the truth is known: about ten minutes on two cores.

    python benchmarks/score_simulations.py

Samples of 500 images with 64 patches and K = 1000 are drawn from made-up populations (weak, strong, bursty; ten
classes, of equal and of unequal sizes), each sample is scored with its interval, and the table says: bias of
cross-fitted and of plug-in alignment against the population's alignment, and how often the 95 % interval covers (a) the
population's alignment, at which it aims, and (b) the mean of cross-fitted alignment over samples of this size: what can
be learned from so many images.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from recording import record

from clustermim.scoring.populations import CASES, Case, make_population
from clustermim.scoring.tcas import score_tokens

IMAGES, PATCHES, VOCAB = 500, 64, 1000
UNEQUAL = (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)
LIMITS = {"bias in the weak case": 0.005, "coverage": (0.90, 0.98)}


def scored(job: tuple[Case, bool, int, int]) -> tuple[float, float, float, float]:
    """Cross-fitted alignment, its interval and plug-in alignment of one sample."""
    case, unequal, seed, bootstrap = job
    population = make_population(case, vocab=VOCAB, sizes=UNEQUAL if unequal else None)
    ids, labels = population.draw(IMAGES, PATCHES, np.random.default_rng([1, seed]))
    score = score_tokens(ids, labels, vocab_size=VOCAB, bootstrap=bootstrap, seed=seed)
    low, high = score.intervals["alignment_crossfit"]
    assert score.alignment_crossfit is not None
    return score.alignment_crossfit, low, high, score.alignment


def summary(case: Case, unequal: bool, found: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    truth = make_population(case, vocab=VOCAB, sizes=UNEQUAL if unequal else None).alignment
    value, low, high, plug_in = found.T
    learned = float(value.mean())
    return {
        "case": case,
        "classes": "unequal" if unequal else "equal",
        "samples": len(found),
        "population_alignment": truth,
        "crossfit_mean": learned,
        "crossfit_bias": learned - truth,
        "plug_in_bias": float(plug_in.mean()) - truth,
        "crossfit_sd": float(value.std(ddof=1)),
        "mean_half_width": float((high - low).mean() / 2),
        "covers_population": float(np.mean((low <= truth) & (truth <= high))),
        "covers_learnable": float(np.mean((low <= learned) & (learned <= high))),
        "interval_below_truth": float(np.mean(high < truth)),
        "interval_above_truth": float(np.mean(low > truth)),
    }


def main() -> None:
    """Run all cases and write results/score_simulations.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="of the samples; the intervals were made while looking at 0 to 149"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="20 samples a case, nothing recorded")
    options = parser.parse_args()
    samples = 20 if options.quick else options.samples
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for unequal in (False, True):
            for case in CASES:
                start = time.perf_counter()
                seeds = range(options.first_seed, options.first_seed + samples)
                jobs = [(case, unequal, seed, options.bootstrap) for seed in seeds]
                row = summary(case, unequal, np.array(list(pool.map(scored, jobs, chunksize=5))))
                rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
                print(
                    f"{case:7} {row['classes']:8} true {row['population_alignment']:.4f}",
                    f"bias {row['crossfit_bias']:+.4f} (plug-in {row['plug_in_bias']:+.4f})",
                    f"sd {row['crossfit_sd']:.4f}, half width {row['mean_half_width']:.4f}",
                    f"covers population {row['covers_population']:.3f}, learnable {row['covers_learnable']:.3f}",
                    sep="  ",
                    flush=True,
                )
    if not options.quick:
        setting = {"images": IMAGES, "patches": PATCHES, "vocab_size": VOCAB, "bootstrap": options.bootstrap}
        print(record("score_simulations", rows, setting=setting, unequal_sizes=UNEQUAL, limits=LIMITS))


if __name__ == "__main__":
    main()

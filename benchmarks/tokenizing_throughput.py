"""How fast patches get their tokens: the search for the nearest centroid beside the bare matrix product it contains.

    python benchmarks/tokenizing_throughput.py [--threads 2] [--quick]

For several (K, D), on rows with clusters and on rows without: patches a second of `Assigner` with float32 products,
with bfloat16 products and as it chooses; of the bare product of the same blocks in either dtype; their ratios; and of
copying the rows, which is the least that must be moved (what bounds small K and D). Then patches a second end to end,
images to ids, for pixel features and for a ViT of timm with random weights. Everything runs in a process of its own
without settings of OpenBLAS and OpenMP that some machines carry. Medians of `--repeats` (3).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import record

SHAPES = ((50, 48), (200, 48), (1000, 48), (1000, 192), (1000, 384), (4096, 192), (8192, 768))
FROM_K, FROM_D, BAR = 1000, 192, 0.7


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def rows_and_centroids(kind: str, n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around 2k centres, or of no structure, and k centroids after one Lloyd step from random rows."""
    from clustermim.tokenizers.assigning import Assigner

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    if kind == "clusters":
        x += 2.0 * torch.randn(2 * k, d, generator=draw)[torch.randint(2 * k, (n,), generator=draw)]
    start = x[:k].clone()
    ids = Assigner(start, "l2", "float32")(x)
    count = torch.bincount(ids, minlength=k)[:, None]
    return x, torch.where(count > 0, torch.zeros(k, d).index_add_(0, ids, x) / count.clamp_min(1), start)


def search(kind: str, k: int, d: int, work: float, repeats: int) -> dict[str, Any]:
    """One row of the table; `work` is the number of multiplications a run makes."""
    from clustermim.tokenizers.assigning import Assigner

    n = min(max(int(work / (k * d)), 4096, 4 * k), 1 << 20)
    x, c = rows_and_centroids(kind, n, k, d)
    nearest = {name: Assigner(c, "l2", name) for name in ("float32", "bfloat16", "auto")}
    ids = {name: search(x) for name, search in nearest.items()}
    if not (torch.equal(ids["float32"], ids["bfloat16"]) and torch.equal(ids["float32"], ids["auto"])):
        raise AssertionError("the products disagree: ids must be exact")
    seconds = {name: median_seconds(lambda search=search: search(x), repeats) for name, search in nearest.items()}
    row: dict[str, Any] = {"rows": kind, "k": k, "dim": d, "patches": n, "chosen": nearest["auto"]._products}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        blocks, table = torch.split(x.to(dtype), nearest[name].rows), c.to(dtype)
        out = torch.empty(k, nearest[name].rows, dtype=dtype)

        def bare(blocks: Any = blocks, table: torch.Tensor = table, out: torch.Tensor = out) -> None:
            for block in blocks:
                torch.mm(table, block.t(), out=out) if len(block) == out.shape[1] else torch.mm(table, block.t())

        row[f"bare_{name}_per_second"] = n / median_seconds(bare, repeats)
    into = torch.empty_like(x)
    row["copy_per_second"] = n / median_seconds(lambda: into.copy_(x), repeats)
    for name, taken in seconds.items():
        row[f"{name}_per_second"] = n / taken
    for name in ("float32", "bfloat16"):
        row[f"ratio_{name}"] = row[f"{name}_per_second"] / row[f"bare_{name}_per_second"]
    chosen = row["chosen"] or "float32"
    row["ratio"] = row["auto_per_second"] / row[f"bare_{chosen}_per_second"]
    row["ratio_to_float32"] = row["auto_per_second"] / row["bare_float32_per_second"]
    row["share_of_copy"] = row["auto_per_second"] / row["copy_per_second"]
    return row


def end_to_end(features: str, k: int, side: int, patch: int, images: int, repeats: int) -> dict[str, Any]:
    """Patches a second from images in memory to ids."""
    import numpy as np

    from clustermim.data.sources import open_source
    from clustermim.tokenizers.fitting import fit

    pixels = np.random.default_rng(0).random((images, side, side, 3), dtype=np.float32)
    source = open_source(pixels)
    tokenizer = fit(source, patch_size=patch, features=features, k=k, kind="random-centroids")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    seconds = median_seconds(lambda: tokenizer(x), repeats)
    patches = images * (side // patch) ** 2
    name = features.split("@")[0]
    return {"features": name, "k": k, "image_side": side, "patch": patch, "patches_per_second": patches / seconds}


def worker(quick: bool, repeats: int, threads: int) -> dict[str, Any]:
    import timm
    from safetensors.torch import save_file

    torch.set_num_threads(threads)
    work = 2e9 if quick else 2e10
    shapes = ((50, 48), (1000, 192)) if quick else SHAPES
    table = [search(kind, k, d, work, repeats) for k, d in shapes for kind in ("clusters", "noise")]
    whole = [end_to_end("pixel", k, 32, 4, 200 if quick else 2000, repeats) for k in (50, 1000)]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = "vit_tiny_patch16_224" if quick else "vit_small_patch16_224"
        save_file(timm.create_model(model).state_dict(), Path(folder) / "w.safetensors")
        spec = f"backbone:{model}@{folder}/w.safetensors"
        whole += [
            end_to_end(spec, k, 224, 16, 4 if quick else 32, repeats) for k in ((1000,) if quick else (100, 1000))
        ]
    return {"search": table, "end_to_end": whole}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, printed and not recorded")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.quick, options.repeats, options.threads)))
        sys.exit()
    plain = {key: value for key, value in os.environ.items() if key not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    plain |= {"OMP_NUM_THREADS": str(options.threads)}
    plain.pop("OMP_WAIT_POLICY", None)  # as in a plain Python process
    done = subprocess.run(
        [sys.executable, *sys.argv, "--worker"], env=plain, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    met = dict.fromkeys(("ratio_float32", "ratio_bfloat16", "ratio_to_float32"), True)
    for row in found["search"]:
        if row["k"] >= FROM_K and row["dim"] >= FROM_D:
            met = {key: kept and row[key] >= BAR for key, kept in met.items()}
        print(
            f"{row['ratio']:5.2f} of the bare {row['chosen']} product "
            f"({row['ratio_to_float32']:.2f} of the float32 one, "
            f"{row['share_of_copy']:.2f} of a copy): K = {row['k']}, D = {row['dim']}, {row['rows']}: "
            f"{row['auto_per_second'] / 1e6:.3g} M patches/s; float32 {row['float32_per_second'] / 1e6:.3g} "
            f"({row['ratio_float32']:.2f} of {row['bare_float32_per_second'] / 1e6:.3g}), bfloat16 "
            f"{row['bfloat16_per_second'] / 1e6:.3g} ({row['ratio_bfloat16']:.2f} of "
            f"{row['bare_bfloat16_per_second'] / 1e6:.3g})"
        )
    for row in found["end_to_end"]:
        print(f"{row['features']}, K = {row['k']}: {row['patches_per_second']:,.0f} patches/s from images to ids")
    meant = {
        "ratio_float32": "float32 products, of the bare float32 product",
        "ratio_bfloat16": "bfloat16 products, of the bare bfloat16 product",
        "ratio_to_float32": "what is chosen, of the bare product in float32, which the rows are",
    }
    for key, what in meant.items():
        print(f"K >= {FROM_K}, D >= {FROM_D}, at least {BAR}: {what}: {'met' if met[key] else 'NOT met'}")
    if not options.quick:
        rows = [{"what": what, **row} for what in found for row in found[what]]
        print(record("tokenizing_throughput", rows, threads=options.threads, repeats=options.repeats, bar=BAR, met=met))

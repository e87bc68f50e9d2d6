"""A study that takes seconds: sixty images of three classes, two tokenizers, four targets."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clustermim.studies.collecting import Findings, FloorRow, RunRow, TokenRow
from clustermim.studies.doing import Bench
from clustermim.studies.folder import StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Plan
from clustermim.studies.planning import make_plan
from clustermim.studies.recipe import Recipe, parse_recipe
from clustermim.studies.working import work
from clustermim.training.launch import StopRequest

SETTING = ("vit_micro", 1, "visible", 0.75, "random", 2)


def write_images(
    folder: Path, *, count: int = 60, size: int = 8, channels: int = 1, labels: bool = True, light: int = 120
) -> Path:
    """Noise on a row, column or square that is brighter by `light`, by class."""
    generator = np.random.default_rng(0)
    y = np.arange(count) % 3
    x = generator.integers(0, 255 - light, (count, size, size, channels), dtype=np.uint8)
    half = size // 2
    x[y == 0, half] += light
    x[y == 1, :, half] += light
    x[y == 2, :half, :half] += light
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("images.npz" if labels else "unlabelled.npz")
    np.savez(file, **{"x": x, "y": y} if labels else {"x": x})
    return file


def small_recipe(source: Path, **changes: Any) -> dict[str, Any]:
    """Values of a recipe, with some keys replaced."""
    values: dict[str, Any] = {
        "title": "small",
        "data": {"tiny": {"source": str(source), "flip": False, "crop_scale": [0.8, 1.0]}},
        "patch_size": 2,
        "tokenizers": {"pixel": {"k": [4, 8], "max_passes": 2, "n_init": 1}},
        "controls": ["identity"],
        "targets": {"clustermim": {"tokenizer": "*"}, "mae": {"target": "pixel"}},
        "pretrain": {"model": "vit_micro", "epochs": 1, "batch_size": 16, "lr": [1e-3]},
        "score": {"bootstrap": 0, "graph_images": 20, "graph_masks": 2},
        "floors": ["raw-pixels"],
    }
    return copy.deepcopy(values | changes)


def planned(values: Mapping[str, Any]) -> tuple[Recipe, Sources, Plan]:
    """Parsed, opened, planned."""
    recipe = parse_recipe(values)
    sources = Sources(recipe.data)
    return recipe, sources, make_plan(recipe, sources)


def run_here(values: Mapping[str, Any], out: Path) -> tuple[Recipe, Sources, Plan, StudyFolder]:
    """Do every piece in this process."""
    recipe, sources, plan = planned(values)
    folder = StudyFolder(out)
    folder.check(resume=True)
    folder.open(yaml.safe_dump(dict(values)), plan)
    work(Bench(plan=plan, folder=folder, sources=sources, device="cpu"), StopRequest())
    return recipe, sources, plan, folder


def run(name: str, linear: float, tokens: str | None = None) -> RunRow:
    """An encoder of a data set `d` with this accuracy."""
    facts: dict[str, Any] = {"data": "d", "judged_on": "d", "family": name, "setting": SETTING, "mask_ratio": 0.75}
    facts |= {"model": "vit_micro", "epochs": 1, "encoder": "visible", "test_images": 360, "seed": 0}
    return RunRow(name=name, tokens=tokens, scored_as=tokens, accuracy={"linear": linear}, **facts)


def findings(runs: list[RunRow], floors: dict[str, float], alignment: dict[str, float] | None = None) -> Findings:
    """Encoders, floors by name, and tokens by alignment, as a study would have found them."""
    facts: dict[str, Any] = {"data": "d", "family": "t", "kind": "kmeans", "control": False, "k": 5, "patch_size": 2}
    tokens = [
        TokenRow(name=name, round=1, scores={"alignment_crossfit": value}, **facts)
        for name, value in (alignment or {}).items()
    ]
    return Findings(
        title="t",
        tokens=tokens,
        runs=runs,
        floors=[FloorRow(data="d", judged_on="d", name=n, accuracy={"linear": v}) for n, v in floors.items()],
        failures=[],
        protocols=["linear"],
        compare=None,
        notes=[],
        predictions=[],
        seconds=1.0,
    )

"""Every packaged recipe makes a plan, on stand-ins of its data: what only a cluster can run is at least no nonsense."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from study_samples import planned

from clustermim.studies import checking
from clustermim.studies.pieces import Plan
from clustermim.studies.reading import packaged, read_recipe

IMAGES = 150


def stand_in(folder: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A few noise images of the size and channels that the recipe expects."""
    side = entry.get("image_size") or {"cifar10": 32, "fashion-mnist": 28, "digits": 8}.get(name, 64)
    channels = 1 if name in ("fashion-mnist", "digits", "organ") else 3
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (IMAGES, side, side, channels), dtype=np.uint8)
    arrays: dict[str, Any] = {"x": x}
    if "multi_label" in entry:
        lists = {f"image {i}": [f"class{i % 3}", f"class{i % 7}"] for i in range(IMAGES)}
        (folder / f"{name}.json").write_text(json.dumps(lists))
        entry = entry | {"multi_label": str(folder / f"{name}.json")}
    else:
        arrays["y"] = np.arange(IMAGES) % 5
    np.savez(folder / f"{name}.npz", **arrays)
    return entry | {"source": str(folder / f"{name}.npz"), "limit": None}


def plan_of(name: str, size: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    real = checking.make_features

    def without_weights(spec: str, **options: Any) -> Any:
        return None if "backbone:" in spec else real(spec, **options)

    monkeypatch.setattr(checking, "make_features", without_weights)
    values = read_recipe(name, size=size, changes=["pretrain.batch_size=16"])
    values["data"] = {data: stand_in(folder, data, entry) for data, entry in values["data"].items()}
    return planned(values)[2]


def sizes_of(name: str) -> list[str | None]:
    return [None, *(yaml.safe_load(packaged()[name].read_text()).get("sizes") or {})]


CASES = [(name, size) for name in packaged() for size in sizes_of(name)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_packaged_recipe_has_a_plan(
    name: str, size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(name, size, tmp_path, monkeypatch)
    kinds = plan.count()
    assert kinds["pretrain"] and kinds["probe"] and kinds["predict"]
    order = list(plan.pieces)
    for identity, piece in plan.pieces.items():
        assert all(order.index(other) < order.index(identity) for other in piece.waits_for)


@pytest.mark.parametrize("size", [None, "try"])
def test_the_recipe_in_the_docs_has_a_plan(size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    file = tmp_path / "my.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    plan = plan_of(str(file), size, tmp_path, monkeypatch)
    names = {cell.name for cell in plan.cells}
    assert {"clustermim pixel-k50", "clustermim second", "clustermim random-centroids", "beit vqvae"} <= names


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "benchmarks" / "recipes").glob("*.yaml")))
def test_a_recipe_of_the_benchmarks_has_a_plan(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of(str(file), None, tmp_path, monkeypatch).count()["pretrain"]


def test_cifar10_holds_what_the_study_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("cifar10", "gpu", tmp_path, monkeypatch)
    names = {cell.name for cell in plan.cells}
    assert {f"clustermim pixel-k{k}" for k in (10, 50, 200, 1000, 4000)} <= names
    assert {"mae-raw", "mae-norm", "hog-regression", "beit vqvae", "clustermim vqvae", "clustermim second"} <= names
    assert {"clustermim network-k200", "clustermim random-centroids"} <= names
    ratios = {cell.settings["mask_ratio"] for cell in plan.cells if cell.settings.get("tokenizer") == "context-k200"}
    assert ratios == {0.4, 0.6, 0.75, 0.9}
    main = [cell for cell in plan.cells if cell.name in ("clustermim context-k200", "mae-raw", "mae-norm")]
    assert all([run.seed for run in cell.runs] == [0, 1, 2] for cell in main)
    assert all({trial.lr for trial in cell.trials} == {3e-4, 1e-3, 3e-3} for cell in plan.cells)

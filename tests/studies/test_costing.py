"""Guesses of time and space: what they are measured on, and what they grow with."""

from pathlib import Path
from typing import Any

import pytest
from study_samples import planned, small_recipe, write_images

from clustermim.data.views import ViewConfig
from clustermim.studies import costing
from clustermim.studies.costing import Cost, estimate_cost
from clustermim.studies.folder import StudyFolder
from clustermim.tokenizers.vqvae.training import VQVAEConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def costs(values: dict[str, Any], kind: str, folder: Path) -> dict[str, float]:
    """Seconds of the pieces of one kind, by name."""
    _, sources, plan = planned(values)
    cost: Cost = estimate_cost(plan, sources, StudyFolder(folder), device="cpu", threads=1)
    return {piece.name: cost.seconds[i] for i, piece in plan.pieces.items() if piece.kind == kind}


def with_rates(monkeypatch: pytest.MonkeyPatch, training: float, products: float) -> None:
    monkeypatch.setattr(costing, "_measure", lambda *args: training)
    monkeypatch.setattr(costing, "_measure_products", lambda *args: products)


def test_clustering_takes_the_time_of_products_and_training_that_of_training(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(training: float, products: float) -> tuple[float, float]:
        with_rates(monkeypatch, training, products)
        values = small_recipe(source)
        fits, trainings = (costs(values, kind, tmp_path) for kind in ("fit", "pretrain"))
        return sum(fits.values()), sum(trainings.values())

    base, slow_training, slow_products = both(1e9, 1e9), both(1e6, 1e9), both(1e9, 1e6)
    assert slow_training[0] == base[0] and slow_training[1] > 10 * base[1]
    assert slow_products[0] > 10 * base[0] and slow_products[1] == base[1]


def test_time_is_measured_on_the_largest_training_whose_steps_are_quick(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    real = costing.pretrain

    def spy(*args: Any, **given: Any) -> Any:
        measured.append(given["model"])
        return real(*args, **given)

    monkeypatch.setattr(costing, "pretrain", spy)
    values = small_recipe(source, targets={"mae": {"target": "pixel"}})
    values["pretrain"]["model"] = ["vit_micro", "vit_ti", "vit_b"]
    costs(values, "fit", tmp_path)
    monkeypatch.setattr(costing, "_MEASURED_STEP", 1.0)  # no training is quick: the smallest
    costs(values, "fit", tmp_path)
    assert measured == ["vit_ti", "vit_micro"]


def test_a_vqvae_takes_the_time_of_its_epochs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_rates(monkeypatch, 1e6, 1e9)
    values = small_recipe(source, tokenizers={"own": {"kind": "vqvae", "k": 8}})

    def seconds(**settings: Any) -> float:
        values["tokenizers"]["own"] = {"kind": "vqvae", "k": 8, **settings}
        return costs(values, "fit", tmp_path)["tiny own"] - 5.0

    default = VQVAEConfig().epochs_for(60)
    assert seconds() == pytest.approx(seconds(epochs=default))
    assert seconds(epochs=3 * default) == pytest.approx(3 * seconds())


def test_operations_of_a_vqvae_by_hand() -> None:
    """Without blocks and at patch side 1 it is four convolutions, of which two see 3 by 3 neighbours."""
    view = ViewConfig(image_size=(6, 5), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    found = costing._autoencoder_operations(VQVAEConfig(width=4, depth=0, code_dim=2), 1, view)
    weights = 3 * 4 * 9 + 4 * 2 + 2 * 4 * 9 + 4 * 3 * 9  # stem, to codes, from codes, to pixels
    assert found == 3 * 2 * weights * 6 * 5

"""How pieces depend on each other, and what their names depend on."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from study_samples import planned, small_recipe, write_images

from clustermim.studies.ranks import local_place, standing_alone, without_ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_every_piece_stands_behind_those_that_it_waits_for(source: Path) -> None:
    _, _, plan = planned(small_recipe(source))
    order = list(plan.pieces)
    for identity, piece in plan.pieces.items():
        assert all(order.index(other) < order.index(identity) for other in piece.waits_for)


def test_training_waits_for_the_prediction_and_the_prediction_for_every_score(source: Path) -> None:
    _, _, plan = planned(small_recipe(source))
    predict = next(piece for piece in plan.pieces.values() if piece.kind == "predict")
    assert set(predict.after) == {token.score for token in plan.tokens}
    assert all(predict.id in p.after for p in plan.pieces.values() if p.kind == "pretrain")


def test_the_same_cell_under_two_families_is_trained_once(source: Path) -> None:
    targets = {"a": {"target": "pixel"}, "b": {"target": "pixel", "mask_ratio": [0.5, 0.75]}}
    _, _, plan = planned(small_recipe(source, targets=targets))
    assert [cell.name for cell in plan.cells] == ["a", "b-mask0.5"]
    assert "b-mask0.75 is a again" in " ".join(plan.notes)


def test_other_seeds_take_the_learning_rate_that_was_chosen(source: Path) -> None:
    values = small_recipe(source, targets={"a": {"target": "pixel"}})
    values["pretrain"] |= {"lr": [1e-3, 3e-3], "seeds": [0, 1, 2]}
    _, _, plan = planned(values)
    runs = [piece for piece in plan.pieces.values() if piece.kind == "pretrain"]
    assert sorted(str(run.settings["lr"]) for run in runs) == ["0.001", "0.003", "chosen", "chosen"]
    assert all(len(run.any_of) == 2 for run in runs if run.settings["lr"] == "chosen")
    assert plan.count()["probe"] == 3 + 1  # one a seed, one floor


def test_models_and_epochs_are_axes_of_the_whole_grid(source: Path) -> None:
    values = small_recipe(source)
    values["pretrain"] |= {"epochs": [1, 2]}
    _, _, plan = planned(values)
    assert len(plan.cells) == 2 * 3
    assert len({cell.setting for cell in plan.cells}) == 2


def test_other_weights_under_the_same_name_make_other_pieces(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    features = f"backbone:test_vit@{file}?layer=1"
    values = small_recipe(source, tokenizers={"network": {"features": features, "k": 4}}, controls=[])
    values["targets"]["distilled"] = {"target": "feature", "features": features}

    def pieces(value: float) -> dict[str, set[str]]:
        model = timm.create_model("test_vit", num_classes=0)
        save_file({name: torch.full_like(weight, value) for name, weight in model.state_dict().items()}, file)
        _, _, plan = planned(values)
        return {kind: {p.id for p in plan.pieces.values() if p.kind == kind} for kind in ("fit", "pretrain", "probe")}

    one, two, again = pieces(0.1), pieces(0.2), pieces(0.1)
    assert one == again
    assert not one["fit"] & two["fit"]
    assert len(one["pretrain"] & two["pretrain"]) == 1  # that of the pixels


def test_a_judged_data_set_without_labels_is_refused(source: Path, tmp_path: Path) -> None:
    from clustermim.errors import InputError

    bare = write_images(tmp_path, labels=False)
    values = small_recipe(source)
    values["data"] = {"a": {"source": str(source), "judge": ["a", "b"]}, "b": {"source": str(bare)}}
    with pytest.raises(InputError, match="cannot be judged on 'b'"):
        planned(values)


def test_copies_of_a_launcher_are_helpers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "KEPT": "x"}.items():
        monkeypatch.setenv(key, value)
    assert local_place() == 1
    assert "RANK" not in without_ranks() and without_ranks()["KEPT"] == "x"
    with standing_alone():
        assert local_place() is None
    assert local_place() == 1

"""What a recipe may say, and how it is told that it says too much, too little or the opposite."""

from pathlib import Path
from typing import Any

import pytest
from study_samples import planned, small_recipe, write_images

from clustermim.errors import InputError
from clustermim.studies.expanding import expand
from clustermim.studies.reading import packaged, read_recipe
from clustermim.studies.recipe import parse_recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    values = read_recipe(write(tmp_path, "pretrain: {lr: [3e-4, 1e-3, 1.5e-3, 1], epochs: 10}\n"))
    assert values["pretrain"] == {"lr": [3e-4, 1e-3, 1.5e-3, 1], "epochs": 10}
    assert values["title"] == "recipe"


def test_a_key_that_stands_twice_is_an_error_and_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: the key 'a' stands twice"):
        read_recipe(write(tmp_path, "x: 1\na: 1\na: 2\n"))


def test_sizes_and_changes_are_laid_over(tmp_path: Path) -> None:
    file = write(tmp_path, "pretrain: {epochs: 4, lr: 1e-3}\nsizes: {gpu: {pretrain: {epochs: 100}}}\n")
    assert read_recipe(file)["pretrain"] == {"epochs": 4, "lr": 1e-3}
    values = read_recipe(file, size="gpu", changes=["pretrain.lr=[1e-4, 1e-2]", "data.x.source=here"])
    assert values["pretrain"] == {"epochs": 100, "lr": [1e-4, 1e-2]}
    assert values["data"] == {"x": {"source": "here"}}
    assert "sizes" not in values
    with pytest.raises(InputError, match="Did you mean 'gpu'"):
        read_recipe(file, size="gpus")
    with pytest.raises(InputError, match="KEY=VALUE"):
        read_recipe(file, changes=["epochs"])


def test_unknown_recipes_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        read_recipe("digit")
    with pytest.raises(InputError, match="is not there"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="no valid YAML"):
        read_recipe(write(tmp_path, "a: [1\n"))
    with pytest.raises(InputError, match="holds no recipe"):
        read_recipe(write(tmp_path, "- 1\n"))


def test_a_grid_has_every_combination_once() -> None:
    members = expand("a", {"k": [1, 2], "mask_ratio": [0.4, 0.6, 0.9], "fixed": "x"}, where="here")
    assert len({member.name for member in members}) == 6
    assert {(m.settings["k"], m.settings["mask_ratio"]) for m in members} == {
        (k, r) for k in (1, 2) for r in (0.4, 0.6, 0.9)
    }
    assert all(member.settings["fixed"] == "x" for member in members)
    assert members[0].name == "a-k1-mask0.4"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tokenisers": {}}, "unknown key 'tokenisers'. Did you mean 'tokenizers'"),
    ({"pretrain": {"epoch": 3}}, "pretrain: unknown key 'epoch'. Did you mean 'epochs'"),
    ({"pretrain": {"steps": 3}}, "pretrain: unknown key 'steps'"),
    ({"tokenizers": {"pixel": {"K": 3}}}, "tokenizers: pixel: unknown key 'K'"),
    ({"tokenizers": {"pixel": {"k": []}}}, "`k` of 'pixel' is empty"),
    ({"tokenizers": {"pixel": {"k": [4, 4]}}}, "holds a value twice"),
    ({"tokenizers": {"pixel": {"kind": "kmean"}}}, "Did you mean 'kmeans'"),
    ({"targets": {}}, "`targets` is missing or empty"),
    ({"data": {}}, "`data` is missing or empty"),
    ({"targets": {"a": {"tokenizer": "pixle-k4"}}}, "nothing is called 'pixle-k4'. Did you mean 'pixel-k4'"),
    ({"targets": {"a": {"tokenizer": "pixel-k4", "lr": 1e-3}}}, "`lr` must be the same for all targets"),
    ({"targets": {"a": {"tokenizer": "pixel-k4", "epochs": 3}}}, "the comparison is not fair"),
    ({"pretrain": {"lr": [0]}}, "numbers above 0"),
    ({"pretrain": {"lr": []}}, "one or several numbers"),
    ({"pretrain": {"seeds": [0, 0]}}, "holds a value twice"),
    ({"probe": {"protocols": ["knn"]}}, "`linear` must be among the protocols"),
    ({"probe": {"protocols": ["linear", "retrieval"]}}, "cannot be used in a study"),
    ({"controls": ["idenity"]}, "Did you mean 'identity'"),
    ({"score": {"bootstrap": "many"}}, "score: bootstrap must be a whole number"),
    ({"compare": {"ours": "mae", "theirs": ["mae"]}}, "stands on both sides"),
    ({"compare": {"ours": "clustermim *", "theirs": ["mae"]}}, "`ours` must be one target"),
    ({"shown": ["nothing"]}, "shown: nothing is called 'nothing'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_be_meant_is_refused(source: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(small_recipe(source, **changes))
    assert message in str(caught.value)


CONTRADICTORY: list[tuple[dict[str, Any], str]] = [
    ({"targets": {"a": {"target": "pixel", "tokenizer": "pixel-k4"}}}, "is for --target token"),
    ({"targets": {"a": {"target": "token"}}}, "targets: a: "),
    ({"targets": {"a": {"tokenizer": "pixel-k4", "patch_size": 4}}}, "contradicts itself"),
    ({"targets": {"a": {"target": "pixel", "encoder": "full", "decoder_depth": 2}}}, "no decoder"),
    ({"targets": {"a": {"target": "pixel", "mask_ratio": 1.5}}}, "targets: a: "),
    ({"targets": {"a": {"target": "pixel", "predict_ratio": 0.5}}}, "needs --decoder cross"),
    ({"pretrain": {"batch_size": 4096}}, "fewer than one step takes"),
    ({"pretrain": {"model": "vit_mikro", "batch_size": 16}}, "vit_micro"),
    ({"patch_size": 3}, "tokenizers: pixel-k4: "),
    ({"patch_size": None}, "`patch_size` is missing"),
    ({"tokenizers": {"pixel": {"k": 10**6}}}, "k = 1000000: 48 images have 768 patches"),
    ({"tokenizers": {"pixel": {"features": "pixle"}}}, "Did you mean 'pixel'"),
    ({"tokenizers": {"pixel": {"width": 8}}}, "only for kind vqvae"),
    ({"tokenizers": {"a": {"features": "run:{nobody}"}}}, "there is no target 'nobody'"),
    (
        {"tokenizers": {"a": {"features": "run:{b a}"}}, "targets": {"b": {"tokenizer": "a"}}, "controls": []},
        "The recipe is circular",
    ),
    ({"floors": ["raw-pixel"]}, "Did you mean 'raw-pixels'"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTORY, ids=[message[:30] for _, message in CONTRADICTORY])
def test_what_contradicts_itself_is_found_before_any_work(source: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(small_recipe(source, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", sorted(packaged()))
def test_packaged_recipes_hold_known_keys_and_a_header(name: str) -> None:
    text = packaged()[name].read_text()
    assert text.startswith(f"# clustermim study {name}")
    assert "# Time:" in text and "Result:" in text
    for size in (None, *(read_sizes(text))):
        recipe = parse_recipe(read_recipe(name, size=size))
        assert recipe.targets


def read_sizes(text: str) -> list[str]:
    import yaml

    return list(yaml.safe_load(text).get("sizes", {}))

"""The options flatten onto a command line and are read from a recipe."""

from typing import Annotated

import pytest
from cyclopts import App, Parameter
from cyclopts.config import Yaml

from clustermim.data.options import DEFAULTS, DataOptions


def parse(line, recipe=None):
    app = App(result_action="return_value", config=Yaml(recipe) if recipe else None)

    @app.default
    def verb(
        data: str = "digits", *, options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS
    ) -> tuple[str, DataOptions]:
        return data, options

    return app(line, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("line", "data", "expected"),
    [
        ("", "digits", {}),
        ("x --image-size 32", "x", {"image_size": 32}),
        ("--image-size 32 48 --no-flip", "digits", {"image_size": (32, 48), "flip": False}),
        ("x --mean .1 .2 .3 --std 1 1 2 --flip", "x", {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 2), "flip": True}),
        ("--crop-scale 0.5 1 --value-range 0 4095", "digits", {"crop_scale": (0.5, 1), "value_range": (0, 4095)}),
        (
            "--group folder --on-bad-image error --limit 9",
            "digits",
            {"group": "folder", "on_bad_image": "error", "limit": 9},
        ),
    ],
)
def test_command_line(line, data, expected):
    assert parse(line) == (data, DataOptions(**expected))


@pytest.mark.parametrize(("text", "size"), [("32", (32, 32)), ("[32, 48]", (32, 48))])
def test_recipe(tmp_path, text, size):
    (tmp_path / "recipe.yaml").write_text(f"image_size: {text}\nflip: false\n")
    options = parse("", tmp_path / "recipe.yaml")[1]
    assert options == DataOptions(image_size=size, flip=False) and options.size == size
    assert parse("--image-size 8", tmp_path / "recipe.yaml")[1].size == (8, 8)


def test_a_size_that_is_no_number():
    with pytest.raises(Exception, match=r"one or two whole numbers, not 'big'"):
        parse("--image-size big")

"""The commands that do each step of a study alone, for one's own images: written from the options of the study."""

import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clustermim.studies.collecting import Findings
from clustermim.studies.pieces import Cell, Plan, Tokens
from clustermim.studies.planning import PLACEHOLDER
from clustermim.studies.recipe import Recipe
from clustermim.studies.scores import leading
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.tokenizer_fit import fit_tokenizer


def command(verb: str, **options: Any) -> str:
    """The command line that does what a call of the verb's function does; options that are None are left out."""
    words = ["clustermim", *verb.split()]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def step_commands(
    plan: Plan, findings: Findings, recipe: Recipe, *, folder: Path = Path("mine")
) -> list[tuple[str, str]]:
    """What to type, each with a sentence on what it does; they can be typed one after the other.

    The tokenizer is the one that the leading score picks among those that a person would choose among.

    Parameters
    ----------
    plan, findings, recipe
        The study.
    folder
        Where the results go: not where those of the study are, because no verb writes over anything.

    Returns
    -------
    list of (str, str)
        Empty where no tokenizer of a first round was scored.
    """
    picked = _picked(plan, findings)
    if picked is None:
        return []
    entry = recipe.data[picked.data]
    images = {"data": entry.source, **entry.options.given()}
    seed = recipe.seeds[0] or None
    ours = next((cell for cell in plan.cells if (cell.data, cell.tokens) == (picked.data, picked.name)), None)
    best = {row.name: row.validation or 0.0 for row in findings.runs if row.data == picked.data}
    pixels = [cell for cell in plan.cells if cell.data == picked.data and cell.settings["target"] == "pixel"]
    pixel = max(pixels, key=lambda cell: best.get(cell.name, 0.0), default=None)
    tokenizer, token_run, pixel_run = folder / picked.name, folder / "clustermim", folder / "mae"
    told = [
        (
            "Fit the tokenizer that the score picks:",
            command("tokenizer fit", **images, **_changed(fit_tokenizer, picked.settings), out=tokenizer),
        ),
        ("Look at its tokens:", command("tokenizer show", tokenizer=tokenizer, **images, out=folder / "pictures")),
        (
            "Score it, before any training; put other tokenizers beside it:",
            command("tcas", tokenizer=tokenizer, **images, bootstrap=recipe.score.bootstrap or None),
        ),
    ]
    encoders: list[Path | str] = []
    for cell, run, says in (
        (ours, token_run, "Pretrain on its tokens:"),
        (pixel, pixel_run, "Pretrain on pixels, as MAE does, with the same budget:"),
    ):
        if cell is not None:
            settings = {**_changed(pretrain, cell.settings), "lr": _rate(findings, cell, recipe), "seed": seed}
            tokens = tokenizer if cell is ours else None
            told.append((says, command("pretrain", **images, tokenizer=tokens, **settings, out=run)))
            encoders.append(run)
    if findings.floors:
        encoders += ["raw-pixels", f"bag-of-tokens:{tokenizer}"]
    if encoders and any(row.accuracy for row in findings.runs):
        probed = command("probe", encoder=encoders, **images, protocol=list(recipe.protocols))
        told.append(("Judge what was trained" + (", and two floors:" if findings.floors else ":"), probed))
    return told


def _picked(plan: Plan, findings: Findings) -> Tokens | None:
    """The best of the tokenizers that one command can fit: no control, and no encoder of a first round in it."""
    score = leading([t.scores for t in findings.tokens])
    values = {(t.data, t.name): t.scores[score.key] for t in findings.tokens if score.key in t.scores}
    first = next(iter(plan.tokens), None)
    usable = [
        one
        for one in plan.tokens
        if first is not None
        and one.data == first.data
        and not one.control
        and (one.data, one.name) in values
        and not PLACEHOLDER.search(str(one.settings.get("features", "")))
    ]
    sign = 1 if score.higher else -1
    return max(usable, key=lambda one: sign * values[one.data, one.name], default=None)


def _changed(verb: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a verb that are not at their defaults; options without one, or of other names, come first."""
    defaults = {name: one.default for name, one in inspect.signature(verb).parameters.items()}
    hidden = ("named", "tokenizer", "lr", "seeds")
    return {
        key: value
        for key, value in settings.items()
        if key not in hidden and (key not in defaults or defaults[key] != value)
    }


def _rate(findings: Findings, cell: Cell, recipe: Recipe) -> float:
    """The learning rate that was chosen for a cell; the first of the grid where none could be."""
    found = [row.lr for row in findings.runs if (row.data, row.name) == (cell.data, cell.name) and row.lr is not None]
    return found[0] if found else recipe.lrs[0]

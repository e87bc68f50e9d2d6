"""`clustermim demo`: the smallest study, on images that come with scikit-learn."""

from pathlib import Path
from typing import Any

from clustermim.errors import InputError
from clustermim.studies.command import StudyResult, study
from clustermim.studies.reading import read_recipe
from clustermim.training.launch import Device

RECIPE = "demo"


def demo(
    *,
    out: Path = Path("demo"),
    epochs: int | None = None,
    bootstrap: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
    json: Path | None = None,
    device: Device = "auto",
    resume: bool = False,
) -> StudyResult:
    """The whole idea on 1,797 scans of handwritten digits that come with scikit-learn, in about two minutes.

    It is `clustermim study demo`: fits patch vocabularies and controls, scores them, writes down what the scores
    foresee, pretrains ClusterMIM and MAE on the same budget, judges them and the floors, and tells in OUT/report.html.

    Parameters
    ----------
    out
        Folder for everything; must be new or empty.
    epochs
        Passes over the images for each encoder. Default: 8.
    bootstrap
        Resamples of the images for the intervals of the scores; 0 for none. Default: 200.
    seed
        Decides everything that is random. Default: 0.
    limit
        Use only this many images of each split: for a quick look.
    json
        Also write the table's rows to this file.
    device
        cpu, cuda or mps; auto takes the best there is.
    resume
        Continue a demo that was stopped; pieces that are finished are not done again.

    Returns
    -------
    StudyResult
        As of `study`; it prints as tables, and the page's path last.

    Raises
    ------
    InputError
        The folder holds something else, or a demo and there is no --resume.
    Stopped
        On SIGTERM or SIGUSR1: --resume continues.
    """
    for name, value in (("epochs", epochs), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    for name, value in (("bootstrap", bootstrap), ("seed", seed)):
        if value is not None and value < 0:
            raise InputError(f"--{name} must be at least 0, not {value}.")
    changes = recipe_changes(epochs=epochs, bootstrap=bootstrap, seed=seed, limit=limit)
    return study(RECIPE, out=out, set=changes, device=device, resume=resume, json=json)


def recipe_changes(
    *, epochs: int | None = None, bootstrap: int | None = None, seed: int | None = None, limit: int | None = None
) -> list[str]:
    """The options as changes of the recipe, each KEY=VALUE; what is None stays as the recipe has it."""
    recipe = read_recipe(RECIPE)
    changes: dict[str, Any] = {"pretrain.epochs": epochs, "score.bootstrap": bootstrap}
    changes |= {f"data.{name}.limit": limit for name in recipe["data"]}
    if seed is not None:
        named = [f"{group}.{name}" for group in ("tokenizers", "controls") for name in recipe[group]]
        changes |= {f"{place}.seed": seed for place in (*named, "score", "select")}
        changes |= {f"{place}.seeds": [seed] for place in ("pretrain", "compare")}
    return [f"{key}={value}" for key, value in changes.items() if value is not None]

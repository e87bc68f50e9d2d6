"""The commands that do each step of the demo alone, written from the options that the demo itself used."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def command(verb: str, **options: Any) -> str:
    """The command line that does what a call of the verb's function does; options that are None are left out."""
    words = ["clustermim", *verb.split()]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def step_commands(
    *,
    data: str,
    chosen: str,
    fitted: Mapping[str, Any],
    others: Sequence[Path],
    bootstrap: int,
    trained: Mapping[str, Any],
    pixel_target: Mapping[str, Any],
    seed: int,
    folder: Path = Path("mine"),
) -> list[tuple[str, str]]:
    """What to type, each with a sentence on what it does; they can be typed one after the other.

    Parameters
    ----------
    data
        The source.
    chosen, fitted
        Name of the chosen vocabulary, and the options it was fitted with.
    others, bootstrap
        Folders of tokenizers to score beside it, and the resamples.
    trained, pixel_target
        Options that all pretrainings share, and those that make one MAE.
    seed
        Of everything.
    folder
        Where the results go: not where those of the demo are, because no verb writes over anything.
    """
    tokenizer, token_run, pixel_run = folder / chosen, folder / "clustermim", folder / "mae"
    pretrain = {"data": data, **trained, "seed": seed}
    encoders = [token_run, pixel_run, "raw-pixels", f"bag-of-tokens:{tokenizer}"]
    return [
        (
            "Fit the vocabulary that was chosen:",
            command("tokenizer fit", data=data, **fitted, seed=seed, out=tokenizer),
        ),
        ("Look at its tokens:", command("tokenizer show", tokenizer=tokenizer, data=data, out=folder / "pictures")),
        (
            "Score it beside others, before any training:",
            command("tcas", tokenizer=[tokenizer, *others], data=data, bootstrap=bootstrap, seed=seed),
        ),
        (
            "Pretrain ClusterMIM, which predicts the tokens of hidden patches:",
            command("pretrain", target="token", tokenizer=tokenizer, **pretrain, out=token_run),
        ),
        (
            "Pretrain MAE, which predicts their pixels:",
            command("pretrain", **pixel_target, **pretrain, out=pixel_run),
        ),
        (
            "Judge both, and two floors:",
            command("probe", encoder=encoders, data=data, protocol=["knn", "linear"], seed=seed),
        ),
    ]

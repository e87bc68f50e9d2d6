"""Weights that a recipe takes from files, by what is in them: another file under the same name makes other pieces."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from clustermim.features.spelling import parse_spec


def weights_in(settings: Mapping[str, Any]) -> dict[str, str]:
    """The files of weights that a tokenizer or target stands on, each with a digest of its content.

    Parameters
    ----------
    settings
        Of a tokenizer or target; `features` and `init` are looked at. What a study makes itself (in braces) is known
        by the piece that makes it.
    """
    named = [str(settings["init"])] if settings.get("init") is not None else []
    features = settings.get("features")
    if isinstance(features, str) and "{" not in features:
        for part in parse_spec(features)[0]:
            named += [one for one in (part.file, part.argument if part.name == "run" else None) if one is not None]
    return {name: digest for name in named if (digest := _digest(Path(name))) is not None}


def _digest(path: Path) -> str | None:
    """Of a file, or of the encoder in a run directory; None where neither is."""
    file = path / "encoder.safetensors" if path.is_dir() else path
    if not file.is_file():
        return None
    facts = file.stat()
    return _read(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=64)
def _read(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]

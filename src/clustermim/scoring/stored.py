"""Token ids kept in files: what `clustermim tokenize` writes, read back a shard at a time.

A file is an `.npz` with `ids` (images, N), `labels` (images,) (or of patches or several an image, as `score_tokens`
takes them), `index` (images,) and optionally `vocab_size`,
`classes` (names), `groups`, `fingerprint` and `data_fingerprint`; a folder holds several such files, its shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from clustermim.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class StoredIds:
    """Stored ids, opened but not read; `parts` reads them."""

    path: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    groups: np.ndarray | None
    vocab_size: int
    classes: tuple[str, ...] | None

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (m, N), positions in `labels`) of each file."""
        start = 0
        for file in self.files:
            ids = _read(file)["ids"]
            yield ids, np.arange(start, start + len(ids))
            start += len(ids)


def open_ids(path: str | Path) -> StoredIds:
    """Open a file or folder of stored ids and check that it can be scored.

    Raises
    ------
    InputError
        Nothing there, not such a file, no labels, lengths that differ, an image that occurs twice, shards of
        different vocabularies or data.
    """
    path = Path(path)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"There are no stored ids at {path}.{nearest(path.name, beside)}")
    # A name that starts with a dot is a file that is being written, or that a kill left unfinished.
    files = tuple(sorted(path.glob("[!.]*.npz"))) if path.is_dir() else (path,)
    if not files:
        raise InputError(f"The folder {path} holds no .npz file of ids; make some with `clustermim tokenize`.")
    labels, groups, index = [], [], []
    known: set[int] = set()
    names: set[tuple[str, ...] | None] = set()
    prints: set[tuple[str, ...]] = set()
    largest = 0
    for file in files:
        arrays = _read(file)
        ids = arrays["ids"]
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(f"{file}: `ids` must be integers of shape (images, patches); got {ids.dtype} {ids.shape}.")
        if "labels" not in arrays or not arrays["labels"].shape:
            raise InputError(
                f"{file} holds no labels, and TCAS compares tokens with classes. Tokenize a source that has labels, or "
                "add an array `labels` with one class per image."
            )
        for name in ("labels", "index", "groups"):
            if name in arrays and len(arrays[name]) != len(ids):
                raise InputError(f"{file}: {len(ids)} images have ids but `{name}` has {len(arrays[name])} entries.")
        labels.append(arrays["labels"])
        index.append(arrays["index"] if "index" in arrays else np.arange(len(ids)))
        if "groups" in arrays:
            groups.append(arrays["groups"])
        largest = max(largest, int(ids.max(initial=0)))
        if "vocab_size" in arrays:
            known.add(int(arrays["vocab_size"]))
        names.add(tuple(str(c) for c in arrays["classes"]) if "classes" in arrays else None)
        prints.add(tuple(str(arrays.get(name, "")) for name in ("fingerprint", "data_fingerprint")))
    if len(known) > 1 or len(names) > 1 or len(prints) > 1:
        raise InputError(f"The files of {path} come from different tokenizers or data; keep one set to a folder.")
    positions = np.concatenate(index)
    if "index" in _read(files[0]) and len(np.unique(positions)) < len(positions):
        raise InputError(f"{path}: some image occurs twice (its index repeats). Tokenize again into an empty folder.")
    return StoredIds(
        path=path,
        files=files,
        labels=np.concatenate(labels),
        groups=np.concatenate(groups) if len(groups) == len(files) else None,
        vocab_size=known.pop() if known else largest + 1,
        classes=names.pop(),
    )


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as arrays:
            held = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, BadZipFile, EOFError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as an .npz file of ids ({type(error).__name__}).") from error
    if "ids" not in held:
        raise InputError(f"{file} holds no array `ids`; it has {', '.join(sorted(held)) or 'nothing'}.")
    return held

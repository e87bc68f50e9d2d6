"""Images as files: a folder of class folders, a flat folder, either of them with train/ and test/, a zip of any."""

import hashlib
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clustermim.data import readers
from clustermim.data.collection import Collection, clean_labels, reason_of
from clustermim.data.options import DataOptions
from clustermim.data.pixels import BadImage
from clustermim.data.remembering import state_of
from clustermim.errors import InputError

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
_NOT_DATA = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


class FolderStore:
    """Image files under one folder."""

    def __init__(self, root: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.root, self.names, self.sizes = root, names, sizes

    def __len__(self) -> int:
        return len(self.names)

    def load(self, row: int) -> bytes:
        """The bytes of one file."""
        try:
            return (self.root / self.names[row]).read_bytes()
        except OSError as problem:
            raise BadImage(problem.strerror or type(problem).__name__) from None

    def read(self, row: int) -> np.ndarray:
        """Raw pixels (C, H, W)."""
        return readers.decode(self.load(row))

    def glance(self, row: int) -> None:
        """Look at the first and last bytes."""
        readers.glance(self.load(row))

    def label_of(self, row: int) -> str:
        """The path below the root."""
        return self.names[row]

    def state(self) -> str | None:
        """Changes where a file does."""
        return state_of([self.root / name for name in self.names])

    def identify(self, digest: "hashlib._Hash") -> None:
        """Relative paths and sizes."""
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))


class ZipStore(FolderStore):
    """Image files in a zip; each process opens it anew, because a forked file handle shares its position."""

    def __init__(self, path: Path, names: Sequence[str], checksums: Sequence[int], inside: str) -> None:
        super().__init__(path, names, checksums)
        self.inside = inside
        self._lock, self._owner = threading.Lock(), 0
        self._zip: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file and the lock."""
        return {"root": self.root, "names": self.names, "sizes": self.sizes, "inside": self.inside}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With a lock of its own."""
        self.__init__(state["root"], state["names"], state["sizes"], state["inside"])  # type: ignore[misc]

    def state(self) -> str | None:
        """Changes where the zip does."""
        return state_of([self.root])

    def load(self, row: int) -> bytes:
        """The bytes of one member."""
        if self._owner != os.getpid():
            self._lock = threading.Lock()  # the parent's may have been held when this process was forked
            self._owner, self._zip = os.getpid(), zipfile.ZipFile(self.root)
        assert self._zip is not None
        try:
            # Only the reading is serial; decoding runs in parallel.
            with self._lock:
                return self._zip.read(self.inside + self.names[row])
        except Exception as problem:  # zlib, bzip2 and lzma each have errors of their own
            raise BadImage(reason_of(problem)) from None


def from_folder(path: Path, options: DataOptions) -> Collection:
    """A folder of images.

    Raises
    ------
    InputError
        When it is empty, holds no images, or mixes loose images with class folders.
    """
    found: dict[str, int] = {}
    seen: set[str] = set()

    def refuse(problem: OSError) -> None:
        raise InputError(f"{problem.filename} cannot be listed: {problem.strerror}.")

    for folder, subfolders, files in os.walk(path, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(folder))
        # Class folders are often links; a link back up would never end.
        subfolders[:] = [
            name for name in subfolders if not _hidden(name) and os.path.realpath(Path(folder, name)) not in seen
        ]
        for name in files:
            if not _hidden(name):
                file = Path(folder, name)
                found[file.relative_to(path).as_posix()] = file.stat().st_size if file.exists() else 0
    if not found:
        raise InputError(f"The folder {path} is empty: put images into it, best in one folder for each class.")
    names, skipped = _pick_images(sorted(found), str(path))
    names, inside = _enter(names)
    store = FolderStore(path / inside, names, [found[inside + name] for name in names])
    return _collection(str(path), store, names, skipped, options)


def from_zip(path: Path, options: DataOptions) -> Collection:
    """A zip of a folder of images.

    Raises
    ------
    InputError
        When it cannot be opened, needs a password, is empty, or as `from_folder`.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = [
                member
                for member in file.infolist()
                if not member.is_dir() and not any(_hidden(part) for part in PurePosixPath(member.filename).parts)
            ]
    except (OSError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path} cannot be opened as a zip file: {reason_of(problem)}.") from None
    if not members:
        raise InputError(f"The zip file {path} is empty: put images into it, best in one folder for each class.")
    if any(member.flag_bits & 1 for member in members):
        raise InputError(f"The zip file {path} needs a password: unpack it and point --data at the folder.")
    checksums = {member.filename: member.CRC for member in members}
    names, skipped = _pick_images(sorted(checksums), str(path))
    names, inside = _enter(names)
    store = ZipStore(path, names, [checksums[inside + name] for name in names], inside)
    return _collection(str(path), store, names, skipped, options)


def from_image_file(path: Path) -> Collection:
    """One image file, as a source of one image."""
    store = FolderStore(path.parent, [path.name], [path.stat().st_size])
    return Collection(str(path), store, check="decode", unlabelled_because="it is a single image")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NOT_DATA


def _pick_images(names: Sequence[str], where: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Image files by suffix, and the rest with the reason it is left out."""
    images, skipped = [], []
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in readers.IMAGE_SUFFIXES:
            images.append(name)
        else:
            skipped.append((name, f"{suffix} is no image suffix" if suffix else "no suffix"))
    if not images:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise InputError(
            f"{where} holds no images: its {len(names)} file(s) ({listed}) have none of the suffixes "
            f"{' '.join(sorted(readers.IMAGE_SUFFIXES))}."
        )
    return images, skipped


def _enter(names: list[str]) -> tuple[list[str], str]:
    """Go down through folders that hold nothing but one folder, so that `photos/photos/cat/1.png` has a class."""
    inside = ""
    while True:
        tops = {name.partition("/")[0] for name in names}
        # A lone folder with images right inside is kept: its name may be worth telling.
        if len(tops) > 1 or any(name.count("/") < 2 for name in names):
            return names, inside
        top = tops.pop() + "/"
        names, inside = [name.removeprefix(top) for name in names], inside + top


def _collection(
    where: str, store: FolderStore, names: list[str], skipped: list[tuple[str, str]], options: DataOptions
) -> Collection:
    """Read splits and classes off the folder names."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    splits = None
    below = names
    if len(tops) > 1 and tops <= _split_names(tops) and all("/" in name for name in names):
        splits = np.array([SPLIT_FOLDERS[name.partition("/")[0].lower()] for name in names])
        below = [name.partition("/")[2] for name in names]
        if "train" not in splits:
            splits, below = None, names
    classes: list[str | None] = [None] * len(names)
    for split in ["all"] if splits is None else sorted(set(splits)):
        rows = list(range(len(names))) if splits is None else np.flatnonzero(splits == split).tolist()
        loose = [below[row] for row in rows if "/" not in below[row]]
        if loose and len(loose) < len(rows):
            nested = next(below[row] for row in rows if "/" in below[row])
            raise InputError(
                f"{where} mixes loose images ({loose[0]}) with folders of images ({nested}), so it is unclear whether "
                f"folders are classes: move the loose images into folders, or all images into one."
            )
        for row in rows if not loose else []:
            classes[row] = below[row].partition("/")[0]
    because = "its images lie in no class folders"
    if splits is None and len(set(classes)) == 1 and classes[0] is not None:
        because = f"all its images lie in the one folder {classes[0]!r}, a single class"
        classes = [None] * len(names)
    collection = Collection(
        where,
        store,
        given_split=splits,
        skipped=skipped,
        check="decode",
        state=store.state,
        unlabelled_because=because,
    )
    if any(value is not None for value in classes):
        collection.labels, collection.classes = clean_labels(_as_objects(classes), len(names), where)
    collection.group_field = lambda field: _groups(where, names, options)
    return collection


def _split_names(tops: set[str]) -> set[str]:
    return {top for top in tops if top.lower() in SPLIT_FOLDERS}


def _as_objects(values: Sequence[str | None]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _groups(where: str, names: Sequence[str], options: DataOptions) -> np.ndarray:
    """The group of each file: its parent folder, or what a regular expression finds in its path."""
    if options.group == "folder":
        return np.array([PurePosixPath(name).parent.as_posix() for name in names])
    pattern = options.group_pattern()
    values = []
    for name in names:
        match = pattern.search(name)
        if match is None or match.group(1) is None:
            raise InputError(
                f"--group {options.group!r} finds nothing in {name} of {where}: it must match the relative path of "
                f"every image, or be 'folder'."
            )
        values.append(match.group(1))
    return np.array(values)

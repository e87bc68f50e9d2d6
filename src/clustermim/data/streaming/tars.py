"""webdataset shards: `.tar` files whose members of one basename are one sample (an image, and `.cls` with its label).

Read by the standard library's tarfile after the conventions of webdataset, not by that library: its pipelines are
shuffled by generators that cannot be continued in the middle.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clustermim.data.collection import reason_of
from clustermim.data.readers import IMAGE_SUFFIXES
from clustermim.data.streaming.counting import Count, counted
from clustermim.data.streaming.remote import is_remote, open_remote, stated_counts
from clustermim.data.streaming.shards import Sample, ended_early, unreadable
from clustermim.errors import InputError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_KEY = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")
_GZIP_MAGIC = b"\x1f\x8b"


class TarShards:
    """A list of tar files; see `shards.Shards`."""

    def __init__(self, name: str, files: Sequence[str], counts: Sequence[Count], sizes: Sequence[int]) -> None:
        self.name, self.files, self.sizes = name, list(files), list(sizes)
        self.names = [file.rsplit("/", 1)[-1] for file in files]
        self.counts = np.array([number for number, _ in counts], dtype=np.int64)
        self.local = not any(map(is_remote, files))
        self.problems = [(name, why) for name, (_, why) in zip(self.names, counts, strict=True) if why is not None]

    def read(self, shard: int, rows: Iterable[int]) -> Iterator[Sample]:
        """See `Shards.read`."""
        wanted = iter(rows)
        row, number = next(wanted, None), 0
        if row is None:
            return
        name = self.names[shard]
        try:
            with _open(self.files[shard]) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for number, (image, label) in enumerate(_samples(tar, file)):
                    if number < row:
                        continue
                    given = None if label is None else _number(_content(tar, label))
                    yield Sample(row, f"{name}: {image.name}", _content(tar, image), given)
                    row = next(wanted, None)
                    if row is None:
                        return
                number += 1
        except _Cut:
            pass
        except (OSError, tarfile.TarError) as problem:
            raise unreadable(self.files[shard], reason_of(problem)) from None
        assert row is not None  # else it would have ended before
        raise ended_early(self.files[shard], number, row)

    def identify(self, digest: "hashlib._Hash") -> None:
        """Names and sizes of the files, and the images of each."""
        for name, size, count in zip(self.names, self.sizes, self.counts.tolist(), strict=True):
            digest.update(f"{name}\0{size}\0{count}\0".encode(errors="surrogateescape"))


class _Cut(Exception):
    """A tar file ends where it should not, or holds something else from here on."""


def open_tars(pattern: str) -> TarShards:
    """The shards behind `wds:`.

    Parameters
    ----------
    pattern
        Files or addresses, several joined by `::`, with braces (`{000..099}`, `{a,b}`), `*` in files, or a folder.

    Raises
    ------
    InputError
        When there are none, when some of those named are missing, or when nobody says how many images remote ones have.
    """
    name = f"wds:{pattern}"
    files = [file for part in pattern.split("::") for file in _listed(part, name)]
    if any(map(is_remote, files)):
        return TarShards(name, files, [(number, None) for number in stated_counts(files)], [0] * len(files))
    paths = [Path(file) for file in files]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        there = f"{len(missing)} of the {len(paths)} shards of {name} do not exist, {missing[0]} for one"
        raise InputError(f"--data: {there}. {_what_is_there(missing[0].parent)}")
    return TarShards(name, files, counted(paths, "tar", _count), [path.stat().st_size for path in paths])


def expand_braces(pattern: str) -> list[str]:
    """All that a pattern with braces names, in the order of a shell: `a{08..10}` is a08, a09, a10; `{x,y}` x and y."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    between = _RANGE.fullmatch(match[1])
    if between is None:
        parts = match[1].split(",")
    else:
        first, last = int(between[1]), int(between[2])
        padded = any(re.match(r"-?0\d", end) for end in between.groups())
        width = max(map(len, between.groups())) if padded else 0
        step = 1 if last >= first else -1
        parts = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [expanded for part in parts for expanded in expand_braces(before + part + after)]


def _listed(pattern: str, name: str) -> list[str]:
    """The files or addresses that one part of a pattern names."""
    if pattern.startswith("pipe:"):
        raise InputError(
            f"{name}: what a command pipes cannot be continued in the middle. Give files, or addresses such as "
            f"https://, hf:// or s3://."
        )
    if is_remote(pattern):
        return expand_braces(pattern)
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.rglob("*.tar"))
        if not found:
            raise InputError(f"--data {name}: there are no .tar files in {path}.")
        return [str(file) for file in found]
    files: list[str] = []
    for one in expand_braces(str(path)):
        if "*" not in one:
            files.append(one)
            continue
        fixed = Path(*Path(one).parts[: next(n for n, part in enumerate(Path(one).parts) if "*" in part)])
        matching = sorted(fixed.glob(str(Path(one).relative_to(fixed))))
        if not matching:
            raise InputError(f"--data {name}: no file is called {one}. {_what_is_there(fixed)}")
        files += map(str, matching)
    return files


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}."
    names = sorted(file.name for file in folder.glob("*.tar"))
    if not names:
        return f"There are no .tar files in {folder}."
    return f"In {folder} there are {len(names)}, from {names[0]} to {names[-1]}."


def _count(path: Path) -> Count:
    """The images of one file, by its headers alone, and what is wrong with it."""
    number = 0
    try:
        with path.open("rb") as file:
            if file.read(2) == _GZIP_MAGIC:
                return 0, "compressed as a whole, so it cannot be read from the middle: unpack it"
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for _ in _samples(tar, file):
                    number += 1
    except _Cut:
        return number, f"cut short or damaged after {number} images"
    except OSError as problem:
        return number, problem.strerror or reason_of(problem)
    except tarfile.TarError as problem:
        return number, f"no tar file: {reason_of(problem)}"
    return number, None if number else "holds no images"


def _samples(tar: tarfile.TarFile, file: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """The image of each sample that has one, and the member with its label, by headers alone.

    Raises
    ------
    _Cut
        After the last whole sample of a file that does not end as a tar does.
    """
    key: str | None = None
    image: tarfile.TarInfo | None = None
    label: tarfile.TarInfo | None = None
    for member in _members(tar):
        match = _KEY.fullmatch(member.name)
        if match is None or not member.isfile():
            continue
        if match[1] != key:
            if image is not None:
                yield image, label
            key, image, label = match[1], None, None
        extension = match[2].lower()
        if f".{extension}" in IMAGE_SUFFIXES:
            image = image or member
        elif extension == "cls":
            label = member
    if image is not None:
        yield image, label
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # the mark at the end
        raise _Cut


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:  # the last member is not all there
            raise _Cut from None
        if member is None:
            return
        tar.members = []  # type: ignore[attr-defined]  # which would grow with the file
        yield member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None  # a file
    return content.read()


def _number(content: bytes) -> int | None:
    """A label; None for one that is no number, which does no harm where labels are not asked for."""
    try:
        return int(content)
    except ValueError:
        return None


def _open(file: str) -> Any:
    return open_remote(file) if is_remote(file) else Path(file).open("rb")

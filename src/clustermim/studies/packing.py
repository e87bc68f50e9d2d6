"""A study in one small file: results without the weights, for another machine or for keeping.

The file is a .tar.gz with the layout of a study's folder. Of each finished piece it holds the result; of a tokenizer or
an encoder also its weights, if they are light; of a training its settings and a thinned record of the loss.
Checkpoints, logs and pieces that are not finished stay behind. Where a text names the study's folder, the file holds a
mark, which becomes the folder that it is unpacked into.
"""

import io
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from clustermim.errors import InputError
from clustermim.runs import atomic_save, atomic_write, read_metrics
from clustermim.studies.folder import PRODUCTS, RECIPE, StudyFolder

_LOSS_ROWS = 100
"""Rows of a training's record that travel: enough for a curve."""
_DIGITS = 6
_MARK = "__STUDY__"
_OF_STUDY = (RECIPE, "predictions.json", "journal.jsonl")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What went into a file, or came out of one.

    Attributes
    ----------
    file
        The file.
    pieces
        Finished pieces in it.
    new
        Those among them that were put into the folder; all of them when a file is written.
    without
        Tokenizers and encoders whose weights are not in it.
    """

    file: Path
    pieces: int
    new: int
    without: int


def pack(folder: StudyFolder, file: Path, *, heaviest: int) -> Packed:
    """Write everything that was found so far into one file; other processes may be at work in the folder meanwhile.

    Parameters
    ----------
    folder
        Of a study.
    file
        Written whole or not at all.
    heaviest
        Bytes of the largest file of weights that is taken along.

    Raises
    ------
    ResourceError
        The disk is full.
    """
    pieces = sorted(i for i in folder.finished() if (folder.piece(i) / "result.json").is_file())
    without = sum(_too_heavy(folder, identity, heaviest) for identity in pieces)

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w:gz", compresslevel=9) as archive:
            for name in _OF_STUDY:
                if (folder.path / name).exists():
                    _add(archive, name, (folder.path / name).read_bytes(), folder.path)
            for failure in sorted((folder.path / "failures").glob("*.json")):
                _add(archive, f"failures/{failure.name}", failure.read_bytes(), folder.path)
            for identity in pieces:
                for name, content in _contents(folder, identity, heaviest):
                    _add(archive, f"pieces/{identity}/{name}", content, folder.path)

    atomic_save(file, write)
    return Packed(file=file, pieces=len(pieces), new=len(pieces), without=without)


def _kind(identity: str) -> str:
    return identity.partition("-")[0]


def _too_heavy(folder: StudyFolder, identity: str, heaviest: int) -> bool:
    """Whether the product of a piece stays behind, or was left behind before."""
    product = PRODUCTS.get(_kind(identity))
    if product is None:
        return False
    file = folder.piece(identity) / product
    return not file.exists() or file.stat().st_size > heaviest


def _contents(folder: StudyFolder, identity: str, heaviest: int) -> Iterator[tuple[str, bytes]]:
    """The files of a piece that travel."""
    place, kind = folder.piece(identity), _kind(identity)
    yield "result.json", (place / "result.json").read_bytes()
    light = kind in PRODUCTS and not _too_heavy(folder, identity, heaviest)
    if kind == "fit" and light:
        for file in sorted((place / "tokenizer").iterdir()):
            if file.is_file() and file.name not in ("lock", "metrics.jsonl"):
                yield f"tokenizer/{file.name}", file.read_bytes()
    if kind == "pretrain":
        for name in ("config.yaml", "manifest.json"):
            if (place / "run" / name).exists():
                yield f"run/{name}", (place / "run" / name).read_bytes()
        if rows := _thinned(list(read_metrics(place / "run"))):
            yield "run/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
        if light:
            yield PRODUCTS[kind], (place / PRODUCTS[kind]).read_bytes()


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the last and rows evenly between, with as many digits as a curve needs."""
    count = min(len(rows), _LOSS_ROWS)
    places = [round(i * (len(rows) - 1) / max(1, count - 1)) for i in range(count)]
    return [{key: _rounded(value) for key, value in rows[place].items()} for place in places]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _renamed(name: str, content: bytes, old: str, new: str) -> bytes:
    """A text of JSON or YAML with another name for a folder, alone or at the front of a path."""
    if name.endswith(".yaml"):  # parsed, because a long path may stand there on two lines
        return yaml.safe_dump(
            _renamed_in(yaml.safe_load(content), old, new), sort_keys=False, allow_unicode=True
        ).encode()
    if not name.endswith((".json", ".jsonl")):
        return content
    text = content.decode()
    for form in {old, json.dumps(old)[1:-1]}:
        text = re.sub(re.escape(form) + r"""(?=[/\\"'\s]|$)""", lambda _: json.dumps(new)[1:-1], text)
    return text.encode()


def _renamed_in(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed_in(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed_in(one, old, new) for one in value]
    return re.sub(re.escape(old) + r"(?=[/\\\s]|$)", lambda _: new, value) if isinstance(value, str) else value


def _add(archive: tarfile.TarFile, name: str, content: bytes, path: Path) -> None:
    for place in {str(path.absolute()), str(path.resolve())}:
        content = _renamed(name, content, place, _MARK)
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def unpack(file: Path, folder: StudyFolder) -> Packed:
    """Put the pieces of a file into a folder; what is there already stays as it is.

    Parameters
    ----------
    file
        As `pack` wrote it.
    folder
        New, empty, or of a study: pieces are named by all that their results depend on, so those of any study fit.

    Raises
    ------
    InputError
        The file is damaged or of another kind; the folder is then as it was.
    ResourceError
        The disk is full.
    """
    here = str(folder.path.absolute())
    try:
        contents = {name: _renamed(name, content, _MARK, here) for name, content in _read(file).items()}
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise InputError(f"{file} is damaged ({' '.join(str(problem).split())}). Copy it again.") from None
    pieces: dict[str, dict[str, bytes]] = {}
    for name, content in contents.items():
        if name.startswith("pieces/"):
            _, identity, inside = name.split("/", 2)
            pieces.setdefault(identity, {})[inside] = content
    folder.make()
    for name in (RECIPE, "predictions.json"):
        if name in contents and not (folder.path / name).exists():
            atomic_write(folder.path / name, contents[name])
    new = 0
    for identity, files in pieces.items():
        if _put(folder, identity, files):
            new += 1
    finished = folder.finished()
    for name, content in contents.items():
        if name.startswith("failures/") and PurePosixPath(name).stem not in finished:
            atomic_write(folder.path / name, content)
    _join_journals(folder, contents.get("journal.jsonl", b""))
    return Packed(file=file, pieces=len(pieces), new=new, without=_without(pieces))


def _without(pieces: Mapping[str, Mapping[str, bytes]]) -> int:
    return sum(
        _kind(identity) in PRODUCTS and PRODUCTS[_kind(identity)] not in files for identity, files in pieces.items()
    )


def _read(file: Path) -> dict[str, bytes]:
    """Every member by name; nothing but plain files in the places of a study is taken."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file. Give one that `clustermim study-pack` wrote.")
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                if member.isdir():
                    continue
                _check_member(member, file)
                opened = archive.extractfile(member)
                assert opened is not None
                contents[member.name] = opened.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise InputError(f"{file} is damaged, or no .tar.gz ({problem}). Copy it again.") from None
    finished = {name.split("/")[1] for name in contents if name.startswith("pieces/")}
    if RECIPE not in contents or any(f"pieces/{identity}/result.json" not in contents for identity in finished):
        raise InputError(f"{file} holds no study. Give one that `clustermim study-pack` wrote.")
    return contents


def _check_member(member: tarfile.TarInfo, file: Path) -> None:
    parts = PurePosixPath(member.name).parts
    known = member.name in _OF_STUDY or (
        (parts[0] == "failures" and len(parts) == 2) or (parts[0] == "pieces" and len(parts) > 2)
    )
    if not member.isfile() or not known or ".." in parts or "\\" in member.name:
        raise InputError(f"{file} holds {member.name!r}, which is no part of a study. Nothing was taken out of it.")


def _put(folder: StudyFolder, identity: str, files: Mapping[str, bytes]) -> bool:
    """Put a piece in its place, unless it is there, or is there without the weights that this one has."""
    place, product = folder.piece(identity), PRODUCTS.get(_kind(identity))
    if place.exists() and (product not in files or (place / str(product)).exists()):
        return False
    staging = Path(tempfile.mkdtemp(dir=folder.path / "work", prefix=".unpack-"))
    try:
        staging.chmod(0o755)
        for name, content in files.items():
            atomic_write(staging / name, content)
        folder.put(staging, identity)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _join_journals(folder: StudyFolder, lines: bytes) -> None:
    """Lines that the folder's own journal lacks are put behind its own."""
    file = folder.path / "journal.jsonl"
    own = file.read_bytes().splitlines() if file.exists() else []
    more = [line for line in lines.splitlines() if line not in set(own)]
    if more:
        with file.open("ab") as opened:
            opened.write(b"".join(line + b"\n" for line in more))

"""`clustermim study-pack` and `study-unpack`: what a study found travels, its weights stay where they were made."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from clustermim.errors import InputError
from clustermim.studies.folder import RECIPE, StudyFolder
from clustermim.studies.packing import Packed, pack, unpack


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What was packed or unpacked; `told` says it in words."""

    packed: Packed
    folder: Path
    told: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        p = self.packed
        size = p.file.stat().st_size
        return [{"file": str(p.file), "bytes": size, "pieces": p.pieces, "new": p.new, "without_weights": p.without}]

    def __rich__(self) -> Group:
        """A few lines for the terminal."""
        return Group(*(Text(line) for line in self.told))


def pack_study(folder: Path, *, out: Path, heaviest: int = 1024) -> PackResult:
    """Take home what a study has found so far, and leave the weights there: one small .tar.gz.

    It holds the results of all finished pieces, light tokenizers, and a thinned record of each training's loss: enough
    for table, page and answers, and for `study --resume` on another machine, where what is finished counts as finished.
    Encoders, checkpoints and logs stay behind. A piece that is not finished there may need one of them, such as the
    encoder that it is to judge: then that one piece is made again, and --dry-run says so.

    The study may be running meanwhile; nothing in its folder is changed. The images are not needed.

    Parameters
    ----------
    folder
        Of the study: its --out.
    out
        The file to write.
    heaviest
        KiB of the largest file of weights that is taken along. K-means tokenizers of a few thousand tokens are below
        the default; 0 leaves all of them behind; with 1000000 encoders travel too, and nothing is made again.

    Returns
    -------
    PackResult
        `rows()` gives one flat record; it prints as a few lines.

    Raises
    ------
    InputError
        The folder holds no study.
    ResourceError
        The disk is full.
    """
    if heaviest < 0:
        raise InputError(f"--heaviest must be at least 0, not {heaviest}.")
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} holds no study: there is no {RECIPE}. Give the --out of `clustermim study`.")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder. Name the file to write, such as {out / 'study.tar.gz'}.")
    packed = pack(StudyFolder(folder), out, heaviest=heaviest * 1024)
    told = [f"{out}: {packed.pieces} finished pieces, {out.stat().st_size / 1024:,.0f} KiB."]
    if packed.without:
        told.append(f"Left behind: weights of {packed.without} tokenizers and encoders, above {heaviest:,} KiB each.")
    told.append(f"On another machine: clustermim study-unpack {out.name} --out DIR")
    return PackResult(packed=packed, folder=folder, told=tuple(told))


def unpack_study(file: Path, *, out: Path) -> PackResult:
    """Put what `study-pack` wrote into a study's folder; go on with `study RECIPE --out OUT --resume`.

    RECIPE is that of before with its options, or OUT/study.yaml, which holds them with the paths of images as given.
    What the folder has already stays as it is, so that the parts of a study that two machines did come together.

    Parameters
    ----------
    file
        As `study-pack` wrote it.
    out
        The folder: new, empty, or of a study.

    Returns
    -------
    PackResult
        `rows()` gives one flat record; it prints as a few lines.

    Raises
    ------
    InputError
        The file is damaged or no study; the folder holds something else. Nothing was touched.
    ResourceError
        The disk is full.
    """
    folder = StudyFolder(out)
    folder.check(resume=True)
    packed = unpack(file, folder)
    told = [f"{out}: {packed.new} of {packed.pieces} finished pieces were new there."]
    if packed.without:
        told.append(
            f"{packed.without} tokenizers and encoders came without their weights, and are made again if something "
            "unfinished needs them."
        )
    told.append(f"Next: clustermim study {shlex.quote(str(out / RECIPE))} --out {shlex.quote(str(out))} --resume")
    return PackResult(packed=packed, folder=out, told=tuple(told))

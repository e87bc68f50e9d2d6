"""Tiny webdataset shards, and parquet files, of pictures that can be told apart."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int) -> np.ndarray:
    """(8, 8) uint8 noise that depends on the number."""
    return np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)


def png(number: int) -> bytes:
    """That picture as a file."""
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of these members, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, *, labelled: bool = True) -> dict[str, bytes]:
    """The members of one sample, the label being the number modulo 3."""
    members = {f"{number:05d}.png": png(number), f"{number:05d}.json": b"{}"}
    return members | ({f"{number:05d}.cls": str(number % 3).encode()} if labelled else {})


def write_shards(folder: Path, sizes: tuple[int, ...], *, labelled: bool = True) -> str:
    """`train-000.tar` and so on with so many pictures each, numbered through; gives back the pattern of them all."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        members: dict[str, bytes] = {}
        for _ in range(size):
            members |= sample(number, labelled=labelled)
            number += 1
        write_tar(folder / f"train-{shard:03d}.tar", members)
    return f"wds:{folder}/train-{{000..{len(sizes) - 1:03d}}}.tar"


def write_parquet(folder: Path, sizes: tuple[int, ...], *, group: int = 4) -> str:
    """The same pictures in parquet files of row groups of `group` rows; gives back how they are streamed."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        rows = range(number, number + size)
        table = pyarrow.table(
            {"image": [{"bytes": png(row), "path": None} for row in rows], "label": [row % 3 for row in rows]}
        )
        pyarrow.parquet.write_table(table, folder / f"train-{shard:03d}.parquet", row_group_size=group)
        number += size
    return f"hf-stream:{folder}"

"""`clustermim tokenize`: images to ids, in one file or in a folder of shards."""

import json as jsonlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from clustermim.data.loaders import Batch, make_loader
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source, require_labels
from clustermim.errors import InputError
from clustermim.runs import RunDirectory, atomic_save, atomic_write
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.launch import Device, resolve_device


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What was written, and how the vocabulary is used."""

    out: Path
    files: int
    images: int
    patches: int
    vocab_size: int
    used_tokens: int
    perplexity: float
    fingerprint: str
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        return [{**self.__dict__, "out": str(self.out)}]

    def __rich__(self) -> Table:
        """The record as a table of names and values."""
        table = Table("", "tokens", title=None)
        for key, value in self.rows()[0].items():
            table.add_row(key.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else str(value))
        return table


def tokenize(
    tokenizer: Annotated[Any, Parameter()],
    data: Annotated[Any, Parameter()] = "digits",
    *,
    out: Path,
    shard_size: int = 10_000,
    batch_size: int = 256,
    device: Device = "auto",
    workers: int | None = None,
    json: Path | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> TokenizeResult:
    """Write the token ids of every image of a source.

    Each .npz holds `ids` (images, N; patches in row-major order), `index` (each image's place in the source), `labels`
    where there are any, `fingerprint` (of the tokenizer), and `vocab_size`, `grid`, `data_fingerprint`, `classes` and
    `groups` for whoever reads it. `clustermim tcas --ids` takes it.

    Parameters
    ----------
    tokenizer
        Folder of a fitted tokenizer, or hf:owner/name.
    data
        Images: digits, a folder, .zip, .npz, .tif or parquet; in Python also an array or a Dataset. The train split,
        unless #test or #all says otherwise. Image size and channels are the tokenizer's.
    out
        A file that ends in .npz, or a new or empty folder for shards.
    shard_size
        Images a shard, where `out` is a folder.
    batch_size
        Images tokenized at once.
    device
        cpu, cuda or mps; auto takes the best there is.
    workers
        Processes that read images. Default: none where the images fit in memory, else one a core.
    json
        Also write the table to this file.
    options
        How the images are read.

    Returns
    -------
    TokenizeResult
        Where the ids are, and how many tokens are used.

    Raises
    ------
    InputError
        The tokenizer or the data cannot be used or do not fit each other, or there is something at `out` already.
    """
    started = time.monotonic()
    if shard_size < 1:
        raise InputError(f"--shard-size must be at least 1, not {shard_size}.")
    out = Path(out)
    single = out.suffix == ".npz"
    if single and out.exists():
        raise InputError(f"--out {out} is there already; nothing was touched. Choose another name, or remove it first.")
    where = resolve_device(device)
    loaded = load_tokenizer(tokenizer)
    source = open_source(data, loaded.fill_options(options))
    if message := source.skipped_message():
        Console(stderr=True).print(message, markup=False, highlight=False)
    loaded.check_matches(source.view)
    if "labels" in loaded.requires:
        require_labels(source, f"A tokenizer of kind {loaded.kind!r}")
    loader = make_loader(source, batch_size=batch_size, train=False, device=where, workers=workers)
    encoder = loaded.to(where)
    common = _common(loaded, source)
    counts = np.zeros(loaded.vocab_size, dtype=np.int64)
    files = 0

    def write(folder: Path | None) -> None:
        nonlocal files
        with PassProgress("images") as bar:
            batches = _encoded(encoder, loader.epoch(), counts)
            size = len(source) if folder is None else shard_size
            for ids, index in _shards(bar.track(batches, "tokenizing", len(source)), size):
                content = {"ids": ids, "index": index, **_of_images(source, index), **common}
                file = out if folder is None else folder / f"shard-{files:05d}.npz"
                atomic_save(file, _saver(content))
                files += 1

    if single:
        write(None)
    else:
        name = str(tokenizer) if isinstance(tokenizer, str | Path) else loaded.kind
        config = {"tokenizer": name, "data": source.name, "shard_size": shard_size, "batch_size": batch_size}
        with RunDirectory(out, "tokenize", config) as run:
            write(run.path)
            run.finish({"tokenizer": loaded.fingerprint(), "data_fingerprint": source.fingerprint(), "shards": files})
    share = counts[counts > 0] / counts.sum()
    result = TokenizeResult(
        out=out,
        files=files,
        images=len(source),
        patches=int(counts.sum()),
        vocab_size=loaded.vocab_size,
        used_tokens=int((counts > 0).sum()),
        perplexity=float(np.exp(-(share * np.log(share)).sum())),
        fingerprint=loaded.fingerprint(),
        seconds=time.monotonic() - started,
    )
    if json is not None:
        atomic_write(json, jsonlib.dumps(result.rows(), indent=1))
    return result


class _Encoded(tuple[np.ndarray, np.ndarray]):
    """Ids and index of a batch; its length is the number of images, for the progress bar."""

    def __len__(self) -> int:
        return len(self[0])


def _encoded(tokenizer: Tokenizer, batches: Iterator[Batch], counts: np.ndarray) -> Iterator[_Encoded]:
    """Tokenize batch by batch and count the tokens. int32 where K allows: half the size."""
    dtype = np.int32 if tokenizer.vocab_size <= np.iinfo(np.int32).max else np.int64
    for batch in batches:
        ids = tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
        used, times = torch.unique(ids, return_counts=True)
        counts[used.cpu().numpy()] += times.cpu().numpy()
        yield _Encoded((ids.cpu().numpy().astype(dtype), batch.index.cpu().numpy()))


def _shards(parts: Iterator[_Encoded], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut the stream into shards of `size` images, the last one shorter."""
    ids: list[np.ndarray] = []
    index: list[np.ndarray] = []
    held = 0
    for part in parts:
        ids.append(part[0])
        index.append(part[1])
        held += len(part)
        while held >= size:
            all_ids, all_index = np.concatenate(ids), np.concatenate(index)
            yield all_ids[:size], all_index[:size]
            ids, index, held = [all_ids[size:]], [all_index[size:]], held - size
    if held:
        yield np.concatenate(ids), np.concatenate(index)


def _common(tokenizer: Tokenizer, source: ImageSource) -> dict[str, np.ndarray]:
    """What is the same in each shard."""
    facts = {
        "fingerprint": np.array(tokenizer.fingerprint()),
        "data_fingerprint": np.array(source.fingerprint()),
        "vocab_size": np.array(tokenizer.vocab_size),
        "grid": np.array(tokenizer.grid),
    }
    if source.classes is not None:
        facts["classes"] = np.array(source.classes)
    return facts


def _of_images(source: ImageSource, index: np.ndarray) -> dict[str, np.ndarray]:
    """Labels and groups of these images, where the source has them."""
    held = {"labels": source.labels, "groups": source.groups}
    return {name: np.asarray(values)[index] for name, values in held.items() if values is not None}


def _saver(content: dict[str, np.ndarray]) -> Callable[[Path], None]:
    def save(file: Path) -> None:
        np.savez(file, allow_pickle=False, **content)

    return save

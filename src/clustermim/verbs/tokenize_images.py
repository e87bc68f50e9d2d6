"""`clustermim tokenize`: images to ids, in one file or in a folder of shards that a kill cannot tear."""

import json as jsonlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from clustermim.data.loaders import Loader, make_loader
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source, require_labels
from clustermim.errors import InputError, Stopped
from clustermim.runs import RunDirectory, atomic_save, atomic_write
from clustermim.tokenizers.id_types import id_type
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.launch import Device, StopRequest, listen_for_stop, resolve_device
from clustermim.training.trouble import resumable

_KIND = "tokenize"
# Where the tokenizer and the data lie may change; what they are is told by their fingerprints.
_VOLATILE = ("tokenizer", "data", "batch_size", "workers", "device")


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What was written, and how the vocabulary is used."""

    out: Path
    files: int
    kept_files: int
    """Files that an earlier, broken-off command had already written whole."""
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
    resume: bool = False,
    shard_size: int = 10_000,
    probes: int | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    workers: int | None = None,
    json: Path | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> TokenizeResult:
    """Write the token ids of every image of a source.

    Each .npz holds `ids` (images, N; patches in row-major order; the smallest integers that hold K), `index` (each
    image's place in the source), `labels` where there are any, `fingerprint` (of the tokenizer), and `vocab_size`,
    `grid`, `data_fingerprint`, `classes` and `groups` for whoever reads it. `clustermim tcas --ids` takes it.

    Parameters
    ----------
    tokenizer
        Folder of a fitted tokenizer, or hf:owner/name.
    data
        Images: digits, a folder, .zip, .npz, .tif or parquet; in Python also an array or a Dataset. The train split,
        unless #test or #all says otherwise. Image size and channels are the tokenizer's.
    out
        A new or empty folder for shards, or a file that ends in .npz. Only a folder keeps what is done when the command
        is killed.
    resume
        Start, go on where a command was broken off (whole shards are kept), or accept what is finished.
    shard_size
        Images a shard, where `out` is a folder.
    probes
        For a tokenizer on two levels: cells searched for each patch. More are slower and nearer to a full search; the
        fingerprint changes with them. Default: as it was fitted.
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
        The tokenizer or the data cannot be used or do not fit each other, there is something at `out` already, or
        `out` was begun with another tokenizer, other data or another shard size.
    Stopped
        By SIGTERM or SIGUSR1; the shards that are whole are kept.
    """
    started = time.monotonic()
    if shard_size < 1:
        raise InputError(f"--shard-size must be at least 1, not {shard_size}.")
    out = Path(out)
    single = out.suffix == ".npz"
    if single and out.exists() and not resume:
        raise InputError(f"--out {out} is there already; nothing was touched. Choose another name, or remove it first.")
    where = resolve_device(device)
    loaded = load_tokenizer(tokenizer)
    if probes is not None:
        loaded = loaded.with_probes(probes)
    source = open_source(data, loaded.fill_options(options))
    if message := source.skipped_message():
        Console(stderr=True).print(message, markup=False, highlight=False)
    loaded.check_matches(source.view)
    if "labels" in loaded.requires:
        require_labels(source, f"A tokenizer of kind {loaded.kind!r}")
    loader = make_loader(source, batch_size=batch_size, train=False, device=where, workers=workers)
    common = _common(loaded, source)
    if single:
        writing = _Writing(loaded.to(where), source, loader, common, [out], len(source), sharded=False)
        writing.run()
    else:
        files = [out / f"shard-{number:05d}.npz" for number in range(-(-len(source) // shard_size))]
        name = str(tokenizer) if isinstance(tokenizer, str | Path) else loaded.kind
        given: dict[str, Any] = {"tokenizer": name, "data": source.name, "shard_size": shard_size}
        given |= {"batch_size": batch_size, "device": device, "workers": workers} | options.given()
        config = {key: value for key, value in given.items() if value is not None}
        prints = {"tokenizer": str(common["fingerprint"]), "data_fingerprint": str(common["data_fingerprint"])}
        with RunDirectory(out, _KIND, config, resume=resume, volatile=_VOLATILE) as run:
            _check_same(run, prints)
            if not run.finished:
                run.write_manifest(prints)
            for torn in out.glob(".partial-*.npz"):  # what a kill left; nobody else writes here while we hold the lock
                torn.unlink(missing_ok=True)
            writing = _Writing(loaded.to(where), source, loader, common, files, shard_size, sharded=True)
            writing.run()
            if not run.finished:
                run.finish({"shards": len(files)})
    result = writing.result(out, loaded, time.monotonic() - started)
    if json is not None:
        atomic_write(json, jsonlib.dumps(result.rows(), indent=1))
    return result


def _check_same(run: RunDirectory, prints: dict[str, str]) -> None:
    """Refuse to go on with another tokenizer or other data than the folder was begun with."""
    names = {"tokenizer": "another tokenizer", "data_fingerprint": "other data"}
    for key, value in prints.items():
        if run.manifest.get(key, value) != value:
            raise InputError(
                f"--resume: {run.path} was begun with {names[key]} (fingerprint {run.manifest[key][:16]}, now "
                f"{value[:16]}); its ids would not mean the same. Nothing was touched; choose another --out."
            )


class _Writing:
    """Images to files of ids: those files that are whole are kept, the others are made, each in one step."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: ImageSource,
        loader: Loader,
        common: dict[str, np.ndarray],
        files: Sequence[Path],
        size: int,
        *,
        sharded: bool,
    ) -> None:
        self.tokenizer, self.source, self.loader, self.common = tokenizer, source, loader, common
        self.files, self.size, self.sharded = files, size, sharded
        self.dtype = id_type(tokenizer.vocab_size)
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.kept = 0

    def run(self) -> None:
        """Make what is missing.

        Raises
        ------
        InputError
            A file that is there is of another tokenizer or other data.
        Stopped
            By a signal; files are whole or not there.
        """
        missing = [number for number, file in enumerate(self.files) if not (file.exists() and self._keep(number))]
        left = sum(stop - start for start, stop in map(self._range, missing))
        with resumable(), PassProgress("images") as bar, listen_for_stop() as stop:
            what = f"tokenizing, {self.kept} shards kept" if self.kept else "tokenizing"
            done: list[_Encoded] = []
            for part in bar.track(self._encoded(missing), what, left):
                done.append(part)
                if part.last:
                    self._save(part.file, done)
                    done = []
                if stop.reason and not (part.last and part.file == missing[-1]):
                    self._stopped(stop)

    def _save(self, number: int, parts: Sequence["_Encoded"]) -> None:
        ids, index = np.concatenate([p.ids for p in parts]), np.concatenate([p.index for p in parts])
        content = {"ids": ids, "index": index, **_of_images(self.source, index), **self.common}
        atomic_save(self.files[number], _saver(content))
        self._count(ids)

    def _stopped(self, stop: StopRequest) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        whole = sum(file.exists() for file in self.files)
        raise Stopped(
            f"Tokenizing was stopped {stop.reason} with {whole} of {len(self.files)} file(s) whole. Repeat the command "
            "with --resume to make the rest."
        )

    def _range(self, number: int) -> tuple[int, int]:
        """The images of a file: from, to (exclusive)."""
        return number * self.size, min((number + 1) * self.size, len(self.source))

    def _keep(self, number: int) -> bool:
        """Whether a file that is there is whole and ours; a damaged one is made again."""
        file = self.files[number]
        try:
            with np.load(file, allow_pickle=False) as arrays:
                ids, index = arrays["ids"], arrays["index"]
                prints = {name: str(arrays[name]) for name in ("fingerprint", "data_fingerprint")}
        except (OSError, ValueError, KeyError, BadZipFile, EOFError):
            return self._damaged(file)
        for name, what in (("fingerprint", "another tokenizer"), ("data_fingerprint", "other data")):
            if prints[name] != str(self.common[name]):
                raise InputError(
                    f"{file} holds the ids of {what} (fingerprint {prints[name][:16]}, now "
                    f"{str(self.common[name])[:16]}). Nothing was touched; choose another --out."
                )
        start, stop = self._range(number)
        if ids.dtype != self.dtype or not np.array_equal(index, np.arange(start, stop)) or len(ids) != len(index):
            return self._damaged(file)
        self._count(ids)
        self.kept += 1
        return True

    def _damaged(self, file: Path) -> bool:
        """A torn shard is made again; a single file that is not ours may not be touched."""
        if not self.sharded:
            raise InputError(f"--out {file} is there already and holds no ids of ours; nothing was touched.")
        return False

    def _count(self, ids: np.ndarray) -> None:
        self.counts += np.bincount(ids.ravel(), minlength=len(self.counts))

    def _encoded(self, missing: Sequence[int]) -> Iterator["_Encoded"]:
        """The ids of the images of the missing files, in order; images of kept files are not even read."""
        for first, last in _runs(missing):
            begin, end = self._range(first)[0], self._range(last)[1]
            for batch in self.loader.epoch(start=begin // self.loader.batch_size):
                index = batch.index.cpu().numpy()
                ids = self.tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
                found = ids.cpu().numpy().astype(self.dtype)
                file = index // self.size
                for number in np.unique(file[(index >= begin) & (index < end)]).tolist():
                    mine = file == number
                    whole = int(index[mine][-1]) + 1 == self._range(number)[1]
                    yield _Encoded(ids=found[mine], index=index[mine], file=number, last=whole)
                if int(index[-1]) + 1 >= end:
                    break

    def result(self, out: Path, tokenizer: Tokenizer, seconds: float) -> TokenizeResult:
        """What there is now, whoever wrote it."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return TokenizeResult(
            out=out,
            files=len(self.files),
            kept_files=self.kept,
            images=len(self.source),
            patches=int(self.counts.sum()),
            vocab_size=tokenizer.vocab_size,
            used_tokens=int((self.counts > 0).sum()),
            perplexity=float(np.exp(-(share * np.log(share)).sum())),
            fingerprint=str(self.common["fingerprint"]),
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """Ids of consecutive images that go into one file; its length is the number of images, for the progress bar."""

    ids: np.ndarray
    index: np.ndarray
    file: int
    last: bool
    """Whether the file is complete with it."""

    def __len__(self) -> int:
        return len(self.index)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


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

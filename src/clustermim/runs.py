"""A run directory: what a verb makes, written so that a kill at any moment loses nothing.

Files appear whole or not at all (temporary file, fsync, rename). `config.yaml` repeats the run, `manifest.json` says
what made it, `metrics.jsonl` grows by a row a log step, and a lease lock keeps two processes out of one directory.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from clustermim.errors import InputError, ResourceError
from clustermim.lease import Lease

_OURS = frozenset({"config.yaml", "manifest.json", "metrics.jsonl", "lock"})
DIVERGED = "diverged"
"""Status of a run that ended by a loss that was not finite."""

_PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "scikit-learn", "safetensors")


def atomic_save(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary file beside `path`, then put it in place in one step.

    Parameters
    ----------
    path
        Where the file shall stand; its folder is made if need be.
    writer
        Called with the temporary path; must leave a complete file there.

    Raises
    ------
    ResourceError
        The disk is full, read-only or gone. What stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name keeps its suffix, because several writers choose their format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except Exception as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        raise unwritable(path, reason) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # a disk that has just become read-only keeps it
                temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def unwritable(path: str | Path, reason: object) -> ResourceError:
    """The error for a file that the system would not take."""
    return ResourceError(
        f"{path} could not be written: {reason}. Free some space, or make the folder writable again; what was there "
        "before is untouched."
    )


def _system_reason(error: BaseException) -> str | None:
    """What the operating system said, where it is behind an error; None where it is not.

    Writers wrap it: torch's archive writer fails again while it closes what it could not finish, and safetensors has
    an error of its own whose text alone tells.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found.strerror or str(found)
        found = found.__cause__ or found.__context__
    match = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(match[1])) if match else None


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` whole or not at all; text as UTF-8. Raises ResourceError as `atomic_save` does."""
    content = data.encode() if isinstance(data, str) else data
    atomic_save(path, lambda temporary: _write_bytes(temporary, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems cannot sync a folder, and then there is nothing to do."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise ResourceError(
                f"{folder} could not be brought to the disk: {error.strerror or error}. Free some space, or make the "
                "folder writable again; what stands there is whole, but a power cut might take it back."
            ) from error


_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
"""What systems say that cannot sync a folder; anything else is a disk in trouble."""


def environment_facts() -> dict[str, Any]:
    """What a reader needs to repeat a figure: versions, hardware, and the git revision of the working folder if any."""
    versions = {"clustermim": _version("clustermim"), "python": platform.python_version()}
    versions |= {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    return {"versions": versions, "hardware": _hardware(), "git": _git_revision()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                facts["processor"] = line.split(":", 1)[1].strip()
                break
    import torch  # here, because this module must be importable without it

    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the run directory `path`.

    Raises
    ------
    InputError
        There is no such directory, or it holds no readable `manifest.json`.
    """
    file = Path(path) / "manifest.json"
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a run directory: there is no such folder. Check the path.")
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a run directory: it holds no manifest.json. Give the --out of an earlier run."
        ) from None
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}). Give another run, or make this one again.") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{file} is not a manifest: it holds a {type(manifest).__name__}, not an object.")
    return manifest


class RunDirectory:
    """A directory that one verb fills; a context manager that holds its lock.

    Parameters
    ----------
    path
        The directory; made when entered.
    kind
        What fills it, for example ``"pretrain"``; a directory of another kind is foreign.
    config
        Everything that determines the result; written to `config.yaml`.
    resume
        Start, continue, or accept as finished, whichever applies.
    volatile
        Keys of `config` that may differ between a run and its resumption (device, workers, ...).
    mendable
        Keys that may differ where the run ended by a loss that was not finite (see `note_divergence`): repeating it
        unchanged would only repeat that. The manifest then tells what was changed.

    Raises
    ------
    InputError
        On entering: the directory is finished (and `resume` is off), foreign, in use, or was made with another config.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        volatile: Collection[str] = (),
        mendable: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self.config = _plain(dict(config))
        self.resume = resume
        self.volatile, self.mendable = frozenset(volatile), frozenset(mendable)
        self.finished = False
        self.resuming = False
        self._manifest: dict[str, Any] = {}
        self._lock: Lease | None = None

    def __enter__(self) -> "RunDirectory":
        """Check the directory, take its lock, write `config.yaml` and a first manifest."""
        try:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.path} cannot be made: {error.strerror or error}. Choose a folder you can write to."
            ) from None
        self._lock = Lease(self.path / "lock")
        try:
            self._lock.acquire()
        except OSError as error:
            raise unwritable(self._lock.path, error.strerror or error) from error
        try:
            self._open()
            self._sweep()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file. Choose a folder that is empty or not there yet.")
        if not self.path.is_dir():
            return
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".partial-")}
        if names - {"lock"} and "config.yaml" not in names:
            raise InputError(
                f"--out {self.path} is not empty and holds no run of ours (found {sorted(names)[0]!r}). "
                "Nothing was touched; choose another folder."
            )

    def _open(self) -> None:
        config_file, manifest_file = self.path / "config.yaml", self.path / "manifest.json"
        if not config_file.exists():
            self.write_config()
            self.write_manifest({})
            return
        self._manifest = read_manifest(self.path) if manifest_file.exists() else {}
        made_by = self._manifest.get("kind", self.kind)
        if made_by != self.kind:
            raise InputError(
                f"--out {self.path} holds a run of `{made_by}`, not of `{self.kind}`. Choose another folder."
            )
        self.finished = self._manifest.get("status") == "finished"
        if not self.resume:
            state = "finished" if self.finished else "unfinished"
            hint = "choose another folder" if self.finished else "add --resume to continue it, or choose another folder"
            raise InputError(f"--out {self.path} holds a {state} run; {hint}. Nothing was touched.")
        self._compare(config_file)
        self.resuming = True
        if not self._manifest:
            self.write_manifest({})

    def _sweep(self) -> None:
        """Remove what a killed process was writing; files of the lock are somebody's who is just trying to get it."""
        for leftover in self.path.glob(".partial-*"):
            if not leftover.name.startswith(".partial-lock"):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    def _compare(self, file: Path) -> None:
        """Refuse to continue a run under another config: the result would be neither of the two."""
        try:
            before = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise InputError(f"{file} is damaged ({error}). Choose another --out.") from None
        before = before if isinstance(before, dict) else {}
        keys = sorted((set(before) | set(self.config)) - self.volatile)
        changed = [key for key in keys if before.get(key) != self.config.get(key)]
        if changed and self._manifest.get("status") == DIVERGED and set(changed) <= self.mendable:
            self._mend({key: {"before": before.get(key), "after": self.config.get(key)} for key in changed})
        elif changed:
            told = "; ".join(f"{key}: {before.get(key)!r} then, {self.config.get(key)!r} now" for key in changed[:5])
            raise InputError(
                f"--resume: {self.path} was started with other settings ({told}). "
                "Repeat the first command with --resume, or choose another --out."
            )

    def _mend(self, changes: dict[str, Any]) -> None:
        """Note changed settings before they count: killed in between, the run still takes either."""
        told = [*self._manifest.get("changes", []), {"day": _now(), **changes}]
        self.write_manifest({"changes": told})
        self.write_config()

    def note_divergence(self) -> None:
        """Say in the manifest that a loss was not finite, so that a resumption may change what is mendable."""
        self.write_manifest({"status": DIVERGED})

    def write_config(self) -> None:
        """Write `config.yaml`; feeding it back with --config repeats the run."""
        atomic_write(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `manifest.json`, beside kind, status, versions, hardware and git revision."""
        base = {"kind": self.kind, "status": "running", "started": _now()} | environment_facts()
        self._manifest = base | self._manifest | _plain(dict(facts))
        atomic_write(self.path / "manifest.json", json.dumps(self._manifest, indent=1))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as last read or written."""
        return dict(self._manifest)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to `metrics.jsonl`. A line is written by one call, so a kill tears at most the last one."""
        if self._lock is not None:
            self._lock.confirm()
        line = json.dumps(_plain(dict(row))) + "\n"
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(line)
        except OSError as error:
            raise unwritable(self.path / "metrics.jsonl", error.strerror or error) from error

    def settle(self) -> None:
        """Bring the rows of metrics to the disk, where a power cut spares them too.

        Raises
        ------
        ResourceError
            They cannot be written, or the directory is gone or in other hands.
        """
        if self._lock is not None:
            self._lock.confirm()
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path / "metrics.jsonl", error.strerror or error) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a torn last line is left out."""
        yield from read_metrics(self.path)

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`, so that a resumed run writes each row once."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Mark the run finished: the last thing a verb does, after everything else is in place."""
        self.write_manifest({**(facts or {}), "status": "finished", "ended": _now()})
        self.finished = True


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a run directory's `metrics.jsonl`, oldest first; a torn last line is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        yield row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """The value as YAML and JSON know it: paths become strings, tuples lists, NumPy and torch scalars numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)

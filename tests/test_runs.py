import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clustermim.errors import InputError, ResourceError
from clustermim.runs import RunDirectory, atomic_save, atomic_write, read_manifest, read_metrics

CONFIG = {"data": "digits", "k": 50, "workers": 2}


def test_a_run_goes_from_start_to_finish(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", "pretrain", CONFIG) as run:
        assert not run.finished and not run.resuming
        run.append_metrics({"step": 1, "loss": 2.5})
        run.finish({"model": {"name": "vit"}})
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "finished" and manifest["kind"] == "pretrain"
    assert manifest["model"] == {"name": "vit"}
    assert {"torch", "timm", "python", "clustermim"} <= set(manifest["versions"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == CONFIG
    assert not (tmp_path / "run" / "lock").exists()


def test_resume_continues_then_accepts_the_finished(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True) as run:
        assert not run.resuming
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True) as run:
        assert run.resuming and not run.finished
        run.finish()
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True) as run:
        assert run.finished


def test_without_resume_a_run_is_left_alone(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG):
        pass
    with pytest.raises(InputError, match="unfinished run; add --resume"), RunDirectory(tmp_path, "pretrain", CONFIG):
        pass
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True) as run:
        run.finish()
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="finished run"), RunDirectory(tmp_path, "pretrain", CONFIG):
        pass
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with (
            pytest.raises(InputError, match=r"thesis\.tex"),
            RunDirectory(tmp_path, "pretrain", CONFIG, resume=resume),
        ):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "tokenizer", CONFIG):
        pass
    with (
        pytest.raises(InputError, match="holds a run of `tokenizer`"),
        RunDirectory(tmp_path, "pretrain", CONFIG, resume=True),
    ):
        pass


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file"), RunDirectory(file, "pretrain", CONFIG):
        pass


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG):
        pass
    other = CONFIG | {"k": 60, "workers": 8}
    with (
        pytest.raises(InputError, match="k: 50 then, 60 now") as caught,
        RunDirectory(tmp_path, "pretrain", other, resume=True, volatile={"workers"}),
    ):
        pass
    assert "workers" not in str(caught.value)


def test_two_at_once_are_refused_and_the_first_keeps_its_lock(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG):
        with (
            pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
            RunDirectory(tmp_path, "pretrain", CONFIG, resume=True),
        ):
            pass
        assert (tmp_path / "lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom clustermim.runs import RunDirectory\n"
        f"RunDirectory({str(tmp_path)!r}, 'pretrain', {CONFIG!r}).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / "lock").exists()
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True) as run:
        assert run.resuming


def test_a_recycled_process_number_does_not_hold_the_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": "1"}))
    with RunDirectory(tmp_path, "pretrain", CONFIG):
        pass


@pytest.mark.parametrize(("age", "held"), [(5.0, True), (1000.0, False)])
def test_another_hosts_lock_counts_while_it_beats(tmp_path: Path, age: float, held: bool) -> None:
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}))
    os.utime(lock, (time.time() - age, time.time() - age))
    if held:
        with pytest.raises(InputError, match="on elsewhere"), RunDirectory(tmp_path, "pretrain", CONFIG):
            pass
    else:
        with RunDirectory(tmp_path, "pretrain", CONFIG):
            pass


def test_metrics_survive_a_torn_line_and_truncate(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG) as run:
        for step in range(1, 6):
            run.append_metrics({"step": step})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
        run.truncate_metrics(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    atomic_write(target, b"old")

    def writer(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="No space left"):
        atomic_save(target, writer)
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_told_where_the_disk_is_in_trouble(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.fsync

    def broken(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        whole(handle)

    monkeypatch.setattr(os, "fsync", broken)
    if code in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
        atomic_write(tmp_path / "a", "new")
    else:
        with pytest.raises(ResourceError, match=os.strerror(code)):
            atomic_write(tmp_path / "a", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_manifest(tmp_path)


def test_a_directory_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", "pretrain", CONFIG) as run:
        (tmp_path / "run").rename(tmp_path / "away")
        for write in (lambda: run.append_metrics({"step": 1}), run.settle):
            with pytest.raises(ResourceError, match="bring the folder back"):
                write()
        assert not (tmp_path / "run").exists()


def test_rubbish_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "pretrain", CONFIG):
        (tmp_path / ".partial-abc.safetensors").write_bytes(b"half")
    with RunDirectory(tmp_path, "pretrain", CONFIG, resume=True):
        assert not (tmp_path / ".partial-abc.safetensors").exists()


def test_after_a_diverged_loss_what_is_mendable_may_change_and_is_noted(tmp_path: Path) -> None:
    other = CONFIG | {"k": 25}
    with RunDirectory(tmp_path, "pretrain", CONFIG) as run:
        run.note_divergence()
    for changed, mendable in ((other, ()), (other | {"data": "else"}, ("k",))):
        with (
            pytest.raises(InputError, match="other settings"),
            RunDirectory(tmp_path, "pretrain", changed, resume=True, mendable=mendable),
        ):
            pass
    with RunDirectory(tmp_path, "pretrain", other, resume=True, mendable=("k",)) as run:
        run.write_manifest({"status": "running"})
    assert read_manifest(tmp_path)["changes"][0]["k"] == {"before": 50, "after": 25}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == other
    # Only a run that diverged may be mended, and only once.
    with pytest.raises(InputError), RunDirectory(tmp_path, "pretrain", CONFIG, resume=True, mendable=("k",)):
        pass


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clustermim.lease.tempfile.mkstemp", full)
    with pytest.raises(ResourceError, match="lock could not be written: No space left"):
        RunDirectory(tmp_path, "pretrain", CONFIG).__enter__()

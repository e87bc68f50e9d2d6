"""Whatever stops a run, the command line ends with the code that the design fixes and the command to type next."""

import errno

import pytest

from clustermim import cli
from clustermim.errors import Interrupted, NonFiniteLossError, ResourceError, Stopped


def test_options_are_set_anew_wherever_they_stood():
    words = ["pretrain", "--accumulate", "2", "--data", "my photos", "--mean", "0.5", "0.4", "--norm-pix"]
    assert cli.repeated(words, {"accumulate": 4, "resume": True}) == [
        *("pretrain", "--data", "my photos", "--mean", "0.5", "0.4", "--norm-pix", "--accumulate", "4", "--resume")
    ]
    assert cli.repeated(["x", "--checkpoint-every=5", "--resume"], {"resume": True, "checkpoint_every": 7}) == [
        *("x", "--resume", "--checkpoint-every", "7")
    ]
    assert cli.repeated(["x", "--no-resume", "--lr", "1"], {"resume": True}) == ["x", "--lr", "1", "--resume"]


@pytest.mark.parametrize(
    ("error", "code", "ending"),
    [
        (Stopped("Stopped.", again={"resume": True}), 75, "--resume"),
        (NonFiniteLossError("nan", again={"lr": "5e-4", "resume": True}), 3, "--lr 5e-4 --resume"),
        (ResourceError("memory", again={"accumulate": 2, "resume": True}), 4, "--accumulate 2 --resume"),
        (Interrupted(), 130, "--resume"),
        (OSError(errno.ENOSPC, "No space left on device", "a/file"), 4, None),
        (OSError(errno.EROFS, "Read-only file system"), 4, None),
        (KeyboardInterrupt(), 130, None),
        (MemoryError(), 4, None),
    ],
)
def test_codes_and_the_next_command(error, code, ending, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("clustermim.verbs.pretrain_encoder.make_fabric", fail)
    assert cli.run(["pretrain", "--data", "my photos", "--out", "runs/a", "--lr", "1e-3"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if ending is None:
        assert "Next:" not in said
        return
    kept = "" if "--lr" in ending else " --lr 1e-3"
    assert said.splitlines()[-1] == f"Next: clustermim pretrain --data 'my photos' --out runs/a{kept} {ending}"


def test_a_process_that_the_first_one_started_leaves_the_exit_code_to_it(monkeypatch, capsys):
    error = Stopped("Stopped.", again={"resume": True})
    error.shared = True

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("clustermim.verbs.pretrain_encoder.make_fabric", fail)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert cli.run(["pretrain", "--out", "a"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["pretrain", "--out", "a"]) == 75

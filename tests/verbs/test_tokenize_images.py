"""`tokenize`: ids in a file and in shards, the same as the tokenizer gives, whatever broke in between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clustermim.verbs.tokenize_images as verb
from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError, Stopped
from clustermim.scoring.stored import open_ids
from clustermim.tokenizers.id_types import id_type
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.verbs.tokenize_images import tokenize
from clustermim.verbs.tokenizer_fit import fit_tokenizer

OPTIONS = DataOptions(limit=150)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fit_tokenizer("digits", k=12, options=OPTIONS)


def test_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = tokenize(tokenizer, "digits", out=tmp_path / "ids.npz", json=tmp_path / "r.json", options=OPTIONS)
    held = np.load(tmp_path / "ids.npz")
    source = open_source("digits", OPTIONS)
    x = torch.stack([source[i][0] for i in range(len(source))])
    assert np.array_equal(held["ids"], tokenizer.encode(x).numpy())
    assert np.array_equal(held["labels"], source.labels) and np.array_equal(held["index"], np.arange(len(source)))
    assert str(held["fingerprint"]) == tokenizer.fingerprint() == result.fingerprint
    assert int(held["vocab_size"]) == 12 and held["grid"].tolist() == [4, 4] and len(held["classes"]) == 10
    assert result.images == len(source) and result.patches == held["ids"].size
    assert json.loads((tmp_path / "r.json").read_text()) == result.rows()
    assert result.used_tokens == len(np.unique(held["ids"])) and 1 < result.perplexity <= 12


def test_shards_hold_what_the_file_holds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize(tokenizer, "digits", out=tmp_path / "ids.npz", options=OPTIONS)
    result = tokenize(tokenizer, "digits", out=tmp_path / "ids", shard_size=40, batch_size=7, options=OPTIONS)
    whole = np.load(tmp_path / "ids.npz")
    files = sorted((tmp_path / "ids").glob("*.npz"))
    shards = [np.load(file) for file in files]
    assert [len(shard["ids"]) for shard in shards] == [40, 40, 40, 30] and result.files == 4
    for name in ("ids", "labels", "index"):
        assert np.array_equal(np.concatenate([shard[name] for shard in shards]), whole[name])
    assert all(str(shard["fingerprint"]) == tokenizer.fingerprint() for shard in shards)


def test_image_size_and_channels_are_the_tokenizer_s(tokenizer: Tokenizer, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (9, 16, 20, 3), dtype=np.uint8)
    tokenize(tokenizer, x, out=tmp_path / "ids.npz")
    held = np.load(tmp_path / "ids.npz")
    assert held["ids"].shape == (9, 16) and "labels" not in held.files
    with pytest.raises(InputError, match="--image-size 8 8"):
        tokenize(tokenizer, x, out=tmp_path / "no.npz", options=DataOptions(image_size=16))


def test_controls_get_index_and_labels(tmp_path: Path) -> None:
    for kind in ("identity", "oracle"):
        made = fit_tokenizer("digits", kind=kind, options=OPTIONS)  # type: ignore[arg-type]
        tokenize(made, "digits", out=tmp_path / f"{kind}.npz", options=OPTIONS)
    assert len(np.unique(np.load(tmp_path / "identity.npz")["ids"])) == 150 * 16
    oracle = np.load(tmp_path / "oracle.npz")
    assert np.array_equal(oracle["ids"], np.repeat(oracle["labels"][:, None], 16, 1))
    with pytest.raises(InputError, match="label"):
        tokenize(made, np.zeros((4, 8, 8)), out=tmp_path / "none.npz")


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_tokenizer("digits", k=5, out=tmp_path / "t", options=OPTIONS)
    command = ["tokenize", "--tokenizer", str(tmp_path / "t"), "--limit", "50", "--out", str(tmp_path / "ids.npz")]
    assert run([*command, "--data", "digits#test"]) == 0
    before = (tmp_path / "ids.npz").read_bytes()
    assert run(command) == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "ids.npz").read_bytes() == before
    assert run(["tokenize", "--tokenizer", str(tmp_path / "tt"), "--out", str(tmp_path / "x.npz")]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    assert run([*command[:-1], str(tmp_path / "mine")]) == 2 and "thesis.tex" in capsys.readouterr().err


def contents(folder: Path) -> list[dict[str, list[object]]]:
    found = []
    for file in sorted(folder.glob("shard-*.npz")):
        with np.load(file) as arrays:
            found.append({name: arrays[name].tolist() for name in arrays.files})
    return found


# Dies by SIGKILL in the middle of the fourth file: its temporary file is half written.
KILLED = """
import os, signal, sys
import clustermim.verbs.tokenize_images as verb
from clustermim.cli import run
real, left = verb.atomic_save, [3]
def killing(path, writer):
    left[0] -= 1
    def torn(file):
        writer(file)
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, writer if left[0] >= 0 else torn)
verb.atomic_save = killing
run(sys.argv[1:])
"""


def test_what_was_whole_before_a_kill_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    command = ["tokenize", "--tokenizer", str(tmp_path / "t"), "--limit", "150", "--shard-size", "20"]
    command += ["--batch-size", "7", "--out"]
    assert run([*command, str(tmp_path / "whole")]) == 0
    out = tmp_path / "ids"
    killed = subprocess.run([sys.executable, "-c", KILLED, *command, str(out)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("shard-*.npz")}
    assert len(before) == 3 and list(out.glob(".partial-*.npz"))
    tcas = ["tcas", "--ids", str(out)]
    assert run(tcas) == 0  # the torn file is no obstacle to reading the whole ones
    assert run([*command, str(out)]) == 2  # not without --resume
    assert run([*command, str(out), "--resume"]) == 0
    after = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("shard-*.npz")}
    assert {name: after[name] for name in before} == before
    assert contents(out) == contents(tmp_path / "whole") and len(after) == 8
    assert not list(out.glob(".partial-*.npz"))
    assert run([*command, str(out), "--resume"]) == 0  # finished: nothing to do
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("shard-*.npz")} == after


def test_gaps_and_damaged_shards_are_made_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def write(**more: object) -> verb.TokenizeResult:
        return tokenize(tokenizer, "digits", out=tmp_path / "ids", shard_size=20, options=OPTIONS, **more)  # type: ignore[arg-type]

    first = write()
    whole = contents(tmp_path / "ids")
    files = sorted((tmp_path / "ids").glob("shard-*.npz"))
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:200])
    files[7].write_bytes(b"")
    again = write(resume=True, batch_size=13)
    assert contents(tmp_path / "ids") == whole
    assert (first.kept_files, again.kept_files) == (0, 5)
    for name in ("images", "patches", "used_tokens", "perplexity", "fingerprint"):
        assert getattr(again, name) == getattr(first, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_politely(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    real, left = verb.atomic_save, [2]

    def then_signalled(path: Path, writer: object) -> None:
        real(path, writer)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(verb, "atomic_save", then_signalled)
    with pytest.raises(Stopped if number == signal.SIGTERM else KeyboardInterrupt) as told:
        tokenize(tokenizer, "digits", out=tmp_path / "ids", shard_size=20, batch_size=20, options=OPTIONS)
    if number == signal.SIGTERM:
        assert "2 of 8" in str(told.value) and "--resume" in str(told.value)
    result = tokenize(tokenizer, "digits", out=tmp_path / "ids", shard_size=20, resume=True, options=OPTIONS)
    assert (result.kept_files, result.files, result.images) == (2, 8, 150)


def test_another_tokenizer_or_other_data_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = fit_tokenizer("digits", k=12, seed=5, options=OPTIONS)
    ids, one = tmp_path / "ids", tmp_path / "ids.npz"
    for out in (ids, one):
        tokenize(tokenizer, "digits", out=out, shard_size=40, options=OPTIONS)
    before = {file: file.read_bytes() for file in [one, *ids.iterdir()]}
    for out in (ids, one):
        with pytest.raises(InputError, match="another tokenizer"):
            tokenize(other, "digits", out=out, shard_size=40, resume=True, options=OPTIONS)
        with pytest.raises(InputError, match=r"other data|limit: 150 then"):
            tokenize(tokenizer, "digits", out=out, shard_size=40, resume=True, options=DataOptions(limit=120))
        with pytest.raises(InputError, match="other data"):
            tokenize(tokenizer, "digits#test", out=out, shard_size=40, resume=True, options=OPTIONS)
    with pytest.raises(InputError, match="shard_size: 40 then, 50 now"):
        tokenize(tokenizer, "digits", out=ids, shard_size=50, resume=True, options=OPTIONS)
    # Even where the manifest was lost, the shards say whose they are.
    manifest = ids / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in content.items() if k != "tokenizer"} | {"status": "running"}))
    before.pop(manifest)
    with pytest.raises(InputError, match="another tokenizer"):
        tokenize(other, "digits", out=ids, shard_size=40, resume=True, options=OPTIONS)
    (tmp_path / "mine.npz").write_bytes(b"years of work")
    with pytest.raises(InputError, match="nothing was touched"):
        tokenize(tokenizer, "digits", out=tmp_path / "mine.npz", resume=True, options=OPTIONS)
    assert (tmp_path / "mine.npz").read_bytes() == b"years of work"
    assert {file: file.read_bytes() for file in before} == before
    assert tokenize(tokenizer, "digits", out=one, resume=True, options=OPTIONS).kept_files == 1


def test_ids_take_the_smallest_integers_that_hold_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {2: "uint8", 256: "uint8", 257: "uint16", 65_536: "uint16", 65_537: "int32", 2**31: "int32"}
    assert {k: str(id_type(k)) for k in sizes} == sizes and str(id_type(2**31 + 1)) == "int64"
    tokenize(tokenizer, "digits", out=tmp_path / "a.npz", options=OPTIONS)
    assert np.load(tmp_path / "a.npz")["ids"].dtype == np.uint8
    wide = fit_tokenizer("digits", k=300, patch_size=2, options=OPTIONS)
    tokenize(wide, "digits", out=tmp_path / "b", options=OPTIONS)
    stored = open_ids(tmp_path / "b")
    ids = next(iter(stored.parts()))[0]
    source = open_source("digits", OPTIONS)
    x = torch.stack([source[i][0] for i in range(len(source))])
    assert ids.dtype == np.uint16 and np.array_equal(ids, wide.encode(x).numpy())

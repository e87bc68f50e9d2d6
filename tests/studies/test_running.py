"""A study that is killed, shared, or has a cell that fails: the same table, no piece twice, the reason kept."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_samples import planned, run_here, small_recipe, write_images

from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError, Stopped
from clustermim.studies.collecting import collect
from clustermim.studies.command import study
from clustermim.studies.doing import Bench
from clustermim.studies.folder import StudyFolder
from clustermim.studies.states import states_of
from clustermim.studies.working import work
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.training.launch import StopRequest, listen_for_stop
from clustermim.verbs.prediction_views import look_at_predictions
from invoking import Invoke


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of a study, without what was measured by a clock or speaks of folders."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if "seconds" not in key and key != "run"} for row in rows]


def two_rates(source: Path) -> dict[str, Any]:
    values = small_recipe(source, targets={"clustermim": {"tokenizer": "pixel-k4"}, "mae": {"target": "pixel"}})
    values["pretrain"]["lr"] = [1e-3, 3e-3]
    return values


def begun(folder: StudyFolder) -> list[str]:
    return [row["piece"] for row in folder.journal() if row["event"] == "begin"]


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return run_here(two_rates(source), tmp_path_factory.mktemp("study") / "s")


def test_every_piece_is_done_once_and_predictions_come_first(done: tuple[Any, ...]) -> None:
    _, _, plan, folder = done
    assert set(states_of(plan, folder).values()) == {"done"}
    assert sorted(begun(folder)) == sorted(plan.pieces)
    events = [(row["event"], plan.pieces[row["piece"]].kind) for row in folder.journal()]
    assert events.index(("end", "predict")) < events.index(("begin", "pretrain"))
    written = json.loads((folder.path / "predictions.json").read_text())
    assert written[0]["of_these_pretrainings_had_begun"] == 0
    ranked = written[0]["rankings"]["alignment_crossfit"]
    assert sorted(name for place in ranked for name in place) == sorted(cell.name for cell in plan.cells)


def test_a_finished_study_does_nothing_more(done: tuple[Any, ...]) -> None:
    _, sources, plan, folder = done
    before = len(folder.journal())
    work(Bench(plan=plan, folder=folder, sources=sources, device="cpu"), StopRequest())
    assert len(folder.journal()) == before


def test_the_learning_rate_is_the_best_on_validation_images(done: tuple[Any, ...]) -> None:
    recipe, _, plan, folder = done
    for row in collect(plan, folder, recipe).runs:
        cell = next(cell for cell in plan.cells if cell.name == row.name)
        reached = {
            trial.lr: max(folder.result(trial.select["tiny"])["validation"]["linear"].values()) for trial in cell.trials
        }
        assert row.lr is not None and reached[row.lr] == max(reached.values()) == row.validation


def test_a_recipe_that_grows_repeats_nothing(source: Path, done: tuple[Any, ...]) -> None:
    _, _, before, _ = done
    values = two_rates(source)
    values["tokenizers"]["context"] = {"features": "pixel?context=4", "k": 4}
    _, _, after = planned(values)
    kept = [piece.id for piece in before.pieces.values() if piece.kind != "predict"]
    assert set(kept) < set(after.pieces)


def test_other_images_are_another_study(tmp_path: Path, done: tuple[Any, ...]) -> None:
    _, _, before, _ = done
    _, _, other = planned(two_rates(write_images(tmp_path, count=66)))
    assert not {p.id for p in before.pieces.values() if p.kind != "predict"} & set(other.pieces)


def test_a_failing_cell_is_reported_and_the_rest_completes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustermim.studies import doing

    real = doing.pretrain
    changed = two_rates(source)
    changed["targets"]["clustermim"]["tokenizer"] = "*"

    def failing(*args: Any, **options: Any) -> Any:
        if options["target"] == "pixel" and options["lr"] > 2e-3:
            raise RuntimeError("the flux capacitor\nis empty")
        if "pixel-k8" in str(options.get("out")):
            raise RuntimeError("no plutonium")
        return real(*args, **options)

    monkeypatch.setattr(doing, "pretrain", failing)
    recipe, _, plan, folder = run_here(changed, tmp_path / "s")
    found = collect(plan, folder, recipe)
    reasons = {row.name: row.reason for row in found.runs}
    assert "no plutonium" in reasons["clustermim pixel-k8"]
    # One learning rate of `mae` failed; the other one is judged.
    mae = next(row for row in found.runs if row.name == "mae")
    assert mae.lr == 1e-3 and mae.accuracy and not mae.reason
    assert [row.name for row in found.runs if row.accuracy] == ["clustermim pixel-k4", "mae"]
    assert sorted(one["reason"] for one in found.failures) == [
        "RuntimeError: no plutonium",
        "RuntimeError: no plutonium",
        "RuntimeError: the flux capacitor is empty",
    ]
    assert "Traceback" in "".join(file.read_text() for file in (folder.path / "work").glob("*/log.txt"))

    # With the cause gone, what failed is tried again, and what was chosen without it is chosen anew.
    monkeypatch.setattr(doing, "pretrain", real)
    assert folder.forget_failures(plan) == 3
    again = run_here(changed, tmp_path / "s")
    assert not collect(again[2], again[3], again[0]).failures
    twice = [piece for piece in begun(folder) if begun(folder).count(piece) > 1]
    assert {plan.pieces[piece].kind for piece in twice} <= {"pretrain", "probe", "select"}
    assert not any("pixel-k4" in piece for piece in twice)


def test_images_without_labels_are_scored_and_trained_but_not_judged(tmp_path: Path) -> None:
    source = write_images(tmp_path, labels=False)
    recipe, _, plan, folder = run_here(small_recipe(source, controls=["identity", "oracle"]), tmp_path / "s")
    found = collect(plan, folder, recipe)
    assert "has no labels" in " ".join(found.notes)
    assert set(states_of(plan, folder).values()) == {"done"}
    assert {piece.kind for piece in plan.pieces.values()} == {"fit", "score", "predict", "pretrain"}
    assert all("view_agreement" in token.scores and "alignment" not in token.scores for token in found.tokens)
    assert all(row.lr is not None and row.run is not None and not row.accuracy for row in found.runs)


def test_second_round_tokens_wait_for_their_encoder_and_a_study_that_was_moved_is_whole(
    source: Path, tmp_path: Path
) -> None:
    tokenizers = {"pixel": {"k": 4}, "second": {"features": "pixel+run:{clustermim pixel}?layer=2|pca=4", "k": 4}}
    values = small_recipe(source, tokenizers=tokenizers, controls=[], floors=["bag-of-tokens:second"])
    here, there = tmp_path / "here", tmp_path / "elsewhere" / "there"
    _, _, plan, folder = run_here(values, here)
    assert set(states_of(plan, folder).values()) == {"done"}
    second = next(token for token in plan.tokens if token.name == "second")
    fit = second.fit
    assert second.round == 2
    order = [row["piece"] for row in folder.journal() if row["event"] == "end"]
    assert max(order.index(i) for i in plan.pieces[fit].any_of) < order.index(fit)
    assert len(json.loads((here / "predictions.json").read_text())) == 2
    fingerprint = load_tokenizer(here / "pieces" / fit / "tokenizer").fingerprint()
    there.parent.mkdir()
    here.rename(there)

    # Nothing in the folder of a second-round tokenizer speaks of the place where it was made.
    files = [file for file in (there / "pieces" / fit).rglob("*") if file.is_file()]
    assert [file.name for file in files if str(here).encode() in file.read_bytes()] == []
    tokenizer = load_tokenizer(there / "pieces" / fit / "tokenizer")
    assert tokenizer.fingerprint() == fingerprint
    named = tokenizer.facts["spec"].partition("run:")[2].partition("?")[0]
    assert (there / "pieces" / fit / "tokenizer" / named / "encoder.safetensors").is_file()

    recipe, sources, plan, folder = run_here(values, there)
    assert len([row for row in folder.journal() if row["event"] == "begin"]) == len(plan.pieces)
    found = next(row.run for row in collect(plan, folder, recipe).runs if row.name == "clustermim second")
    assert found is not None
    run = folder.piece(found) / "run"
    shown = look_at_predictions(run, open_encoder(run), sources.train("tiny"), [0, 1])
    assert not shown.missing and shown.tokenizer is not None and shown.tokenizer.fingerprint() == fingerprint


@pytest.mark.slow
def test_every_kind_of_cell_comes_to_an_end(source: Path, tmp_path: Path) -> None:
    values = small_recipe(
        source,
        tokenizers={"pixel": {"k": 4}, "vqvae": {"kind": "vqvae", "k": 8, "epochs": 1, "width": 8, "batch_size": 16}},
        controls={"identity": {}, "random-centroids": {"k": 4}},
        targets={
            "clustermim": {"tokenizer": ["*", "random-centroids"], "mask_ratio": [0.5, 0.75]},
            "beit": {"tokenizer": "vqvae", "encoder": "full", "mask_kind": "block", "mask_ratio": 0.5},
            "hog": {"target": "feature", "features": "hog"},
            "mae-raw": {"target": "pixel", "norm_pix": False, "mask_ratio": [0.5, 0.75]},
        },
        pretrain={"model": "vit_micro", "epochs": 1, "batch_size": 16, "lr": [1e-3]},
        compare={"ours": "clustermim pixel-mask0.75", "theirs": ["mae-raw-*"], "also": ["beit *"], "seeds": [0, 1]},
        finetune={"targets": ["hog"], "epochs": 1, "batch_size": 16},
        floors=["raw-pixels", "random", "bag-of-tokens:pixel"],
    )
    recipe, _, plan, folder = run_here(values, tmp_path / "s")
    assert set(states_of(plan, folder).values()) == {"done"}
    found = collect(plan, folder, recipe)
    assert all(row.accuracy for row in found.runs)
    assert next(row for row in found.runs if row.name == "hog").accuracy.keys() == {"knn", "linear", "finetune"}
    assert sum(row.name == "beit vqvae" for row in found.runs) == 2
    assert len(found.floors) == 3


def test_a_folder_that_is_not_ours_is_left_alone(fails: Invoke, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert "holds no study" in fails("study", file, "--out", foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.yaml").write_text("")
    assert "Add --resume" in fails("study", file, "--out", tmp_path / "old")
    assert "unknown key 'epoch'" in fails("study", file, "--out", tmp_path / "n", "--set", "pretrain.epoch=1")
    assert not (tmp_path / "n").exists()


def test_no_space_for_the_plan_is_told_before_it_is_begun(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustermim.studies import costing

    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(costing.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(costing, "_measure", lambda *args: 1e10)
    with pytest.raises(InputError, match=r"the plan needs about 0\.\d GiB, and 0\.0 GiB are free"):
        study(str(file), out=tmp_path / "s", jobs=1, device="cpu")
    assert not (tmp_path / "s").exists()


def test_a_precision_that_the_processor_lacks_is_told_before_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustermim.studies import costing
    from clustermim.training import launch

    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    monkeypatch.setattr(launch, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(costing, "_measure", lambda *args: 1e10)
    low: dict[str, Any] = {"set": ("pretrain.precision=bf16-mixed",), "device": "cpu"}
    with pytest.raises(InputError, match=r"no fast products in bfloat16.*--set pretrain\.precision=32-true"):
        study(str(file), out=tmp_path / "s", **low)
    assert not (tmp_path / "s").exists()
    assert study(str(file), out=tmp_path / "s", dry_run=True, **low).plan.cells  # which may be for another machine


@pytest.mark.parametrize(("able", "measured"), [(True, "bf16-mixed"), (False, "auto")])
def test_time_is_measured_in_the_precision_of_the_training(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool, measured: str
) -> None:
    from clustermim.studies import costing
    from clustermim.training import launch

    asked = []
    real = costing.pretrain

    def spy(*args: Any, **given: Any) -> Any:
        asked.append(given.get("precision", "auto"))
        return real(*args, **given | {"precision": "32-true"})

    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    monkeypatch.setattr(launch, "multiplies_bfloat16", lambda: able)
    monkeypatch.setattr(costing, "pretrain", spy)
    study(str(file), out=tmp_path / "s", dry_run=True, device="cpu", set=("pretrain.precision=bf16-mixed",))
    assert asked == [measured]


def test_a_dry_run_shows_the_plan_and_writes_nothing(works: Invoke, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    told = works("study", file, "--out", tmp_path / "s", "--dry-run", "--device", "cpu")
    assert "nothing was written" in told and "encoders pretrained" in told and "--jobs" in told
    assert not (tmp_path / "s").exists()


def test_a_worker_that_waits_for_its_starter_can_fork() -> None:
    code = """
import multiprocessing, time
from clustermim.studies.worker import end_with_the_starter
end_with_the_starter()
time.sleep(0.2)  # the thread waits for standard input by now
forked = multiprocessing.get_context("fork").Process(target=print)
forked.start()
forked.join(20)
print(forked.exitcode, flush=True)
time.sleep(20)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.read(3).strip() == "0"
            process.stdin.close()
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


def test_a_stop_between_pieces_is_polite(source: Path, tmp_path: Path) -> None:
    values = small_recipe(source)
    _, sources, plan = planned(values)
    folder = StudyFolder(tmp_path / "s")
    folder.open("", plan)
    with pytest.raises(Stopped):
        work(Bench(plan=plan, folder=folder, sources=sources, device="cpu"), StopRequest(0.0))
    assert set(states_of(plan, folder).values()) <= {"ready", "waiting"}


def test_a_piece_without_checkpoint_is_broken_off_and_repeated(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustermim.studies import doing

    values = small_recipe(source, targets={"mae": {"target": "pixel"}}, controls=[], tokenizers={"pixel": {"k": 4}})
    _, sources, plan = planned(values)
    folder = StudyFolder(tmp_path / "s")
    folder.open("", plan)
    real, judged = doing.judge, []

    def slow(*args: Any, **options: Any) -> Any:
        judged.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return real(*args, **options)

    monkeypatch.setattr(doing, "judge", slow)
    began = time.monotonic()
    bench = Bench(plan=plan, folder=folder, sources=sources, device="cpu")
    with listen_for_stop() as stop, pytest.raises(Stopped):
        work(bench, stop)
    assert time.monotonic() - began < 30
    states = states_of(plan, folder)
    broken = [row["piece"] for row in folder.journal() if row["event"] == "stopped"]
    assert len(judged) == len(broken) == 1 and states[broken[0]] == "ready"
    monkeypatch.setattr(doing, "judge", real)
    work(bench, StopRequest())
    assert set(states_of(plan, folder).values()) == {"done"}
    assert [begun(folder).count(piece) for piece in plan.pieces] == [1 + (p == broken[0]) for p in plan.pieces]
    assert folder.record(broken[0])["seconds"] < 30  # of the attempt that counts


def start(file: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "clustermim", "study", str(file), "--out", str(out), "--resume", "--jobs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, "--device", "cpu", *more], start_new_session=True, env=environment, stdout=-1, stderr=-1
    )


def wait_for(folder: StudyFolder, events: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while len(folder.journal()) < events and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_three_times_and_resumed_gives_the_same_table(source: Path, tmp_path: Path) -> None:
    values = small_recipe(source)
    values["pretrain"] |= {"epochs": 12, "checkpoint_every": "2"}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    unbroken = start(file, tmp_path / "whole")
    assert unbroken.wait(300) == 0
    out = tmp_path / "broken"
    folder = StudyFolder(out)
    for events in (3, 21, 30):
        process = start(file, out)
        wait_for(folder, events, process)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = start(file, out)
    assert last.wait(300) == 0
    assert table(out) == table(tmp_path / "whole")
    ends = [row["piece"] for row in folder.journal() if row["event"] == "end"]
    assert len(ends) == len(set(ends))


@pytest.mark.slow
def test_two_processes_share_a_study_and_do_no_piece_twice(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(small_recipe(source)))
    both = [start(file, tmp_path / "s") for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    folder = StudyFolder(tmp_path / "s")
    rows = folder.journal()
    pieces = begun(folder)
    assert len(pieces) == len(set(pieces))
    assert len({row["pid"] for row in rows}) == 2
    assert all(row["event"] in ("begin", "end") for row in rows)


@pytest.mark.slow
def test_sigterm_stops_with_75_and_the_next_call_goes_on(source: Path, tmp_path: Path) -> None:
    values = small_recipe(source)
    values["pretrain"]["epochs"] = 2000
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    process = start(file, tmp_path / "s")
    folder = StudyFolder(tmp_path / "s")
    while not any(re.match("pretrain", piece) for piece in begun(folder)):
        wait_for(folder, len(folder.journal()) + 1, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    told = process.stderr.read().decode() if process.stderr else ""
    assert "Next: clustermim study" in told and "--resume" in told
    assert not list((tmp_path / "s" / "locks").glob("*.lock"))
    assert list((tmp_path / "s" / "work").glob("pretrain-*/run/checkpoints/*"))

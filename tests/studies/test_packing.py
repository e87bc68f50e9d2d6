"""A study that travels without its weights: the same table elsewhere, and nothing made again but what is read."""

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_samples import planned, run_here, small_recipe, write_images

from clustermim.errors import InputError
from clustermim.studies.collecting import collect
from clustermim.studies.folder import StudyFolder
from clustermim.studies.packing_commands import pack_study, unpack_study
from clustermim.studies.pieces import Plan
from clustermim.studies.states import states_of, why
from clustermim.studies.writing import write_findings
from invoking import Invoke


def recipe_of(source: Path) -> dict[str, Any]:
    tokenizers = {"pixel": {"k": 4}, "second": {"features": "run:{clustermim pixel}?layer=2", "k": 4}}
    values = small_recipe(source, tokenizers=tokenizers, controls=[], floors=["bag-of-tokens:pixel"], shown=["pixel"])
    values["pretrain"] |= {"lr": [1e-3, 3e-3], "log_every": 1}
    return values


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Plan, StudyFolder]:
    values = recipe_of(source)
    _, _, plan, folder = run_here(values, tmp_path_factory.mktemp("study") / "s")
    assert set(states_of(plan, folder).values()) == {"done"}
    return values, plan, folder


Made = tuple[dict[str, Any], Plan, StudyFolder]


def elsewhere(folder: StudyFolder, to: Path, *, missing: Sequence[str] = (), heaviest: int = 1024) -> StudyFolder:
    """The study on another machine; there the pieces `missing` had not been finished when it was packed."""
    here = to / "here"
    shutil.copytree(folder.path, here)
    for identity in missing:
        shutil.rmtree(here / "pieces" / identity)
    pack_study(here, out=to / "study.tar.gz", heaviest=heaviest)
    shutil.rmtree(here)
    unpack_study(to / "study.tar.gz", out=to / "there")
    return StudyFolder(to / "there")


def texts_of(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.suffix in (".json", ".jsonl", ".yaml")]
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("name", ["plain", "with spaces and \u00e9"])
def test_no_text_in_the_file_names_the_machine_s_folders(name: str, made: Made, tmp_path: Path) -> None:
    here, twin = tmp_path / name, tmp_path / f"{name}-twin"
    shutil.copytree(made[2].path, here)
    run = next(here.glob("pieces/pretrain-*pixel*/run"))
    settings = {"tokenizer": str(here / "pieces" / "t"), "data": str(twin)}
    (run / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))
    (run / "manifest.json").write_text(json.dumps({"out": str(here), "other": str(twin)}))
    pack_study(here, out=tmp_path / "study.tar.gz")
    with tarfile.open(tmp_path / "study.tar.gz") as archive:
        content = archive.extractfile(f"{run.relative_to(here)}/manifest.json")
        assert content is not None
        assert json.loads(content.read()) == {"out": "__STUDY__", "other": str(twin)}  # a longer name is another folder
    there = tmp_path / "there" / "s"
    unpack_study(tmp_path / "study.tar.gz", out=there)
    found = texts_of(there)
    assert not any("__STUDY__" in text for text in found.values())
    config = yaml.safe_load((there / run.relative_to(here) / "config.yaml").read_text())
    assert config == {"tokenizer": str(there / "pieces" / "t"), "data": str(twin)}


def begun_after(folder: StudyFolder, lines: int) -> list[str]:
    return [row["piece"] for row in folder.journal()[lines:] if row["event"] == "begin"]


def continued(values: dict[str, Any], folder: StudyFolder) -> list[str]:
    """Go on there; which pieces were begun."""
    lines = len(folder.journal())
    run_here(values, folder.path)
    return begun_after(folder, lines)


def chosen(plan: Plan, folder: StudyFolder, name: str) -> tuple[str, str, str]:
    """The chosen training of a cell, the other one, and the probe."""
    cell = next(cell for cell in plan.cells if cell.name == name)
    probe = cell.runs[0].probe["tiny"]
    run = folder.result(probe)["run"]
    return run, next(trial.pretrain for trial in cell.trials if trial.pretrain != run), probe


def rows(values: dict[str, Any], folder: StudyFolder) -> list[dict[str, Any]]:
    recipe, _, plan = planned(values)
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in collect(plan, folder, recipe).rows()
    ]


def test_elsewhere_it_is_the_same_study_and_no_piece_is_made_again(made: Made, tmp_path: Path) -> None:
    values, _, folder = made
    there = elsewhere(folder, tmp_path)
    assert (tmp_path / "study.tar.gz").stat().st_size < 100_000
    assert not list(there.path.rglob("encoder.safetensors"))
    assert continued(values, there) == []
    recipe, sources, plan = planned(values)
    assert collect(plan, there, recipe) == collect(plan, folder, recipe)
    write_findings(collect(plan, there, recipe), plan, there, sources, recipe, command="clustermim study x")
    page = (there.path / "report.html").read_text()
    assert "Training loss of each target" in page and "No pictures of" not in page
    assert json.loads((there.path / "predictions.json").read_text())
    # It can travel on from there.
    again = elsewhere(there, tmp_path / "on")
    assert collect(plan, again, recipe) == collect(plan, folder, recipe)


def test_a_probe_that_is_missing_needs_the_chosen_encoder_and_no_other(made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    run, _, probe = chosen(plan, folder, "mae")
    there = elsewhere(folder, tmp_path, missing=[probe])
    states = states_of(plan, there)
    assert {i: s for i, s in states.items() if s != "done"} == {run: "ready", probe: "waiting"}
    assert continued(values, there) == [run, probe]
    assert rows(values, there) == rows(values, folder)  # the same machine: the same encoder
    assert continued(values, there) == []


def test_what_is_chosen_later_is_made_again_only_if_it_is_chosen(made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    run, other, probe = chosen(plan, folder, "mae")
    select = {p.needs[0]: i for i, p in plan.pieces.items() if p.kind == "select"}
    # The other training was not compared yet: it is made again for that; the chosen one because it is chosen then.
    there = elsewhere(folder, tmp_path / "a", missing=[probe, select[other]])
    states = states_of(plan, there)
    assert (states[other], states[run]) == ("ready", "done")
    assert continued(values, there) == [other, select[other], run, probe]
    # The one that turns out to be chosen has its encoder by then: the other is left alone.
    there = elsewhere(folder, tmp_path / "b", missing=[probe, select[run]])
    assert continued(values, there) == [run, select[run], probe]
    assert rows(values, there) == rows(values, folder)


def test_the_plan_says_what_is_made_again(works: Invoke, made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    run, other, probe = chosen(plan, folder, "mae")
    select = {p.needs[0]: i for i, p in plan.pieces.items() if p.kind == "select"}
    there = elsewhere(folder, tmp_path, missing=[probe, select[other]])
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    told = works("study", file, "--out", there.path, "--dry-run", "--device", "cpu")
    assert "made again: 1, because what is not finished reads their tokenizer or encoder, which is not here" in told
    assert plan.pieces[other].name in told and plan.pieces[run].name not in told
    assert "Trainings without their encoder: 1 more" in told


def test_second_round_tokens_are_made_again_with_their_encoder_if_a_training_needs_them(
    made: Made, tmp_path: Path
) -> None:
    values, plan, folder = made
    second = next(token for token in plan.tokens if token.name == "second")
    run, _, _ = chosen(plan, folder, "clustermim pixel")
    later = [i for i, p in plan.pieces.items() if "second" in p.name and p.kind in ("pretrain", "select", "probe")]
    there = elsewhere(folder, tmp_path, missing=later)
    assert not there.whole(plan.pieces[second.fit])
    assert states_of(plan, there)[second.fit] == "waiting"  # for its encoder
    begun = continued(values, there)
    assert begun[:2] == [run, second.fit] and sorted(begun[2:]) == sorted(later)
    assert rows(values, there) == rows(values, folder)


def test_with_heavy_files_nothing_is_made_again(made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    _, _, probe = chosen(plan, folder, "mae")
    there = elsewhere(folder, tmp_path, missing=[probe], heaviest=10**6)
    assert all(there.whole(piece) for piece in plan.pieces.values())
    assert continued(values, there) == [probe]


def test_what_cannot_be_made_again_gives_up_only_what_reads_it(made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    run, _, probe = chosen(plan, folder, "mae")
    there = elsewhere(folder, tmp_path, missing=[probe])
    there.fail(run, RuntimeError("no plutonium"))
    states = states_of(plan, there)
    assert {i: s for i, s in states.items() if s != "done"} == {run: "failed", probe: "given up"}
    assert "no plutonium" in why(plan, there, states, probe)
    assert there.forget_failures(plan) == 1
    assert continued(values, there) == [run, probe]


def test_parts_that_two_machines_did_come_together(made: Made, tmp_path: Path) -> None:
    values, plan, folder = made
    (_, _, one), (_, _, two) = (chosen(plan, folder, name) for name in ("mae", "clustermim pixel"))
    first = elsewhere(folder, tmp_path / "a", missing=[one])
    before = {i: (first.piece(i) / "result.json").stat().st_mtime_ns for i in first.finished()}
    elsewhere(folder, tmp_path / "b", missing=[two], heaviest=10**6)
    result = unpack_study(tmp_path / "b" / "study.tar.gz", out=first.path)
    encoders = [i for i, p in plan.pieces.items() if p.kind == "pretrain"]
    heavy = [*encoders, next(token.fit for token in plan.tokens if token.round == 2)]
    assert result.packed.new == 1 + len(heavy)  # the probe, and the weights that were not here
    kept = set(before) - set(heavy)
    assert all((first.piece(i) / "result.json").stat().st_mtime_ns == before[i] for i in kept)
    assert continued(values, first) == []
    assert rows(values, first) == rows(values, folder)


def test_what_is_no_study_is_refused_and_nothing_touched(fails: Invoke, made: Made, tmp_path: Path) -> None:
    _, _, folder = made
    good = tmp_path / "good.tar.gz"
    pack_study(folder.path, out=good)
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert "is damaged" in fails("study-unpack", torn, "--out", tmp_path / "n")
    assert "no such file" in fails("study-unpack", tmp_path / "gone.tar.gz", "--out", tmp_path / "n")
    with tarfile.open(torn, "w:gz") as archive:
        member = tarfile.TarInfo("study.yaml")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"a: ["))
    assert "is damaged" in fails("study-unpack", torn, "--out", tmp_path / "n")
    for name in ("../escaped", "pieces/../../escaped", "/tmp/escaped", "thesis.txt"):
        evil = tmp_path / "evil.tar.gz"
        with tarfile.open(evil, "w:gz") as archive:
            for inside in ("study.yaml", name):
                member = tarfile.TarInfo(inside)
                member.size = 1
                archive.addfile(member, io.BytesIO(b"x"))
        assert "is no part of a study" in fails("study-unpack", evil, "--out", tmp_path / "n")
    assert not (tmp_path / "n").exists() and not (tmp_path / "escaped").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "holds no study" in fails("study-unpack", good, "--out", mine)
    assert "holds no study" in fails("study-pack", mine, "--out", tmp_path / "x.tar.gz")
    assert "is a folder" in fails("study-pack", folder.path, "--out", mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="--heaviest must be at least 0"):
        pack_study(folder.path, out=good, heaviest=-1)


def test_the_name_of_a_piece_depends_on_the_images_and_not_on_where_they_lie(made: Made, tmp_path: Path) -> None:
    _, plan, _ = made
    moved = write_images(tmp_path / "deep" / "down")
    assert planned(recipe_of(moved))[2].pieces.keys() == plan.pieces.keys()

"""How a piece of each kind is done: by the functions of the verbs, in this process."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clustermim.errors import InputError
from clustermim.features.patches import make_features
from clustermim.runs import atomic_write
from clustermim.studies.choosing import choose_trial, first_round_run, judged_run, places, select_for
from clustermim.studies.folder import StudyFolder
from clustermim.studies.judging import judge, open_judged, validate
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Piece, Plan
from clustermim.studies.planning import PLACEHOLDER
from clustermim.studies.scores import SCORES, ranking
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.finetune_encoder import finetune
from clustermim.verbs.graph_spectrum import graph
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.score import tcas
from clustermim.verbs.tokenizer_fit import fit_tokenizer


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and with what pieces are done."""

    plan: Plan
    folder: StudyFolder
    sources: Sources
    device: Device = "auto"
    workers: int | None = None
    minutes_left: Callable[[], float | None] = lambda: None
    """Until the work has to stop; None for no limit."""

    @property
    def where(self) -> str:
        """The device as PyTorch calls it."""
        return resolve_device(self.device)


def do_piece(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    """Do one piece, or the rest of it.

    Parameters
    ----------
    piece
        All that it waits for is settled.
    bench
        The study, the images, the device.
    work
        Its own folder, as an earlier attempt left it.

    Returns
    -------
    dict
        What it found: plain values.

    Raises
    ------
    ClusterMIMError
        As the verbs do.
    """
    return _DOES[piece.kind](piece, bench, work)


def _fit(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    settings = {key: value for key, value in piece.settings.items() if key != "images"}
    learned = {one.name for one in fields(VQVAEConfig)}
    if settings.get("kind") == "vqvae":
        settings["vqvae"] = VQVAEConfig.picked(settings, max_minutes=bench.minutes_left())
    settings = {key: value for key, value in settings.items() if key not in learned}
    train, out, features = bench.sources.train(piece.data), work / "tokenizer", settings.get("features")
    if isinstance(features, str) and PLACEHOLDER.search(features):

        def encoder_of(target: str) -> Path:
            return bench.folder.piece(first_round_run(target, piece, bench.plan, bench.folder)) / "run"

        # Seen from the tokenizer's folder, an encoder has one name on every machine, wherever the study is moved.
        named = PLACEHOLDER.sub(lambda match: quote(os.path.relpath(encoder_of(match[1]), out), safe="/"), features)
        settings["features"] = make_features(named, patch_size=settings["patch_size"], view=train.view, base=out)
    tokenizer = fit_tokenizer(
        train,
        out=out,
        resume=True,
        device=bench.device,
        workers=bench.workers,
        options=bench.sources.entries[piece.data].options,
        **settings,
    )
    return {key: value for key, value in tokenizer.rows()[0].items() if isinstance(value, str | int | float | bool)}


def _score(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    how, data = piece.settings, piece.data
    tokenizer = load_tokenizer(bench.folder.piece(piece.needs[0]) / "tokenizer")
    train = bench.sources.train(data)
    labelled = train.labels is not None or how["multi_label"] is not None
    common: dict[str, Any] = {"seed": how["seed"], "device": bench.device, "workers": bench.workers}
    if not labelled and not how["label_free"]:
        raise InputError(f"{data} has no labels and `score: label_free` is off, so these tokens cannot be scored.")
    rows = tcas(
        [tokenizer],
        train,
        bootstrap=how["bootstrap"],
        label_free=how["label_free"],
        multi_label=how["multi_label"],
        options=bench.sources.options_for(data, how["images"]),
        **common,
    ).rows()
    found = {key: value for key, value in rows[0].items() if key not in ("tokenizer", "data")}
    if how["graph_images"]:
        options = bench.sources.options_for(data, how["graph_images"])
        report = graph([tokenizer], train, masks=how["graph_masks"], options=options, **common).rows()[-1]
        found |= {
            f"graph_{key}": report[key]
            for key in ("sum_squared", "labelling_error", "bound", "spectral_gap", "visible")
        }
    return found


def _predict(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    """Write down how each score ranks what is to be trained."""
    plan, folder = bench.plan, bench.folder
    scored = {}
    for one in plan.tokens:
        if one.data == piece.data and folder.piece(one.score).exists():
            scored[one.name] = folder.result(one.score)
    rankings = {}
    for score in SCORES:
        values = {
            cell: float(scored[tokens][score.key])
            for cell, tokens in piece.settings["cells"].items()
            if tokens in scored and scored[tokens].get(score.key) is not None
        }
        if len(values) > 1:
            rankings[score.key] = ranking(values, score)
    trained = [other for other in plan.pieces.values() if other.kind == "pretrain" and piece.id in other.after]
    begun = sum(folder.piece(other.id).exists() or folder.work(other.id).exists() for other in trained)
    return {
        "data": piece.data,
        "round": piece.settings["round"],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "says": "places from best to worst by each score; targets of one place have equal scores; pixels and features "
        "count as `identity` tokens",
        "of_these_pretrainings_had_begun": begun,
        "rankings": rankings,
    }


def _pretrain(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    settings = {key: value for key, value in piece.settings.items() if key not in ("images", "grid")}
    if settings["lr"] == "chosen":
        settings["lr"] = choose_trial(bench.plan, bench.folder, piece.any_of).lr
    if settings["target"] == "token":
        settings["tokenizer"] = bench.folder.piece(piece.needs[0]) / "tokenizer"
    run = work / "run"
    result = pretrain(
        bench.sources.train(piece.data),
        out=run,
        resume=True,
        device=bench.device,
        workers=bench.workers,
        max_minutes=bench.minutes_left(),
        options=bench.sources.entries[piece.data].options,
        **settings,
    )
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    figures = {key: value for key, value in result.figures.items() if isinstance(value, int | float)}
    return figures | {"lr": settings["lr"]}


def _select(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    how = piece.settings
    part = bench.sources.part(piece.data, how["limit"])
    encoder = open_judged(str(bench.folder.piece(piece.needs[0]) / "run"), part, bench.where)
    return {
        "validation": validate(encoder, part, how["protocols"], seed=how["seed"], device=bench.where),
        "images": len(part),
    }


def _probe(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    how, sources = piece.settings, bench.sources
    test = sources.test(piece.data)
    train = sources.train(piece.data)
    facts: dict[str, Any] = {}
    if "encoder" in how:
        spec = how["encoder"]
        if spec.startswith("bag-of-tokens:"):
            spec = f"bag-of-tokens:{bench.folder.piece(piece.needs[0]) / 'tokenizer'}"
        encoder = open_judged(spec, train, bench.where)
        facts["validation"] = validate(encoder, train, how["protocols"], seed=how["seed"], device=bench.where)
        chosen = places(facts)
    else:
        run, facts = _judged(piece, bench)
        chosen = places(bench.folder.result(select_for(bench.plan, piece, run)))
        encoder = open_judged(str(bench.folder.piece(run) / "run"), train, bench.where)
    rows = judge(encoder, train, test, chosen, seed=how["seed"], device=bench.where)
    return {**facts, "rows": rows}


def _judged(piece: Piece, bench: Bench) -> tuple[str, dict[str, Any]]:
    run = judged_run(piece, bench.plan, bench.folder)
    return run, {"run": run, "lr": bench.folder.result(run)["lr"]}


def _finetune(piece: Piece, bench: Bench, work: Path) -> dict[str, Any]:
    settings = {key: value for key, value in piece.settings.items() if key != "images"}
    run, facts = _judged(piece, bench)
    entry = bench.sources.entries[piece.data]
    out = work / "finetune"
    records = finetune(
        bench.folder.piece(run) / "run",
        entry.source,
        out=out,
        resume=True,
        device=bench.device,
        workers=bench.workers,
        max_minutes=bench.minutes_left(),
        options=entry.options,
        **settings,
    ).rows()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return facts | {"rows": [row for row in records if row["weights"] == "last"]}


_DOES: Mapping[str, Callable[[Piece, Bench, Path], dict[str, Any]]] = {
    "fit": _fit,
    "score": _score,
    "predict": _predict,
    "pretrain": _pretrain,
    "select": _select,
    "probe": _probe,
    "finetune": _finetune,
}


def write_predictions(plan: Plan, folder: StudyFolder) -> None:
    """Gather the predictions of all data sets and rounds in `predictions.json`."""
    found = [folder.result(p.id) for p in plan.pieces.values() if p.kind == "predict" and folder.piece(p.id).exists()]
    if found:
        atomic_write(folder.path / "predictions.json", json.dumps(found, indent=1) + "\n")

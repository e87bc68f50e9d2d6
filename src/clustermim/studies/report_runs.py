"""The part of a study's page that tells of every encoder, and how its training went."""

from typing import Any

from clustermim.render.figures import Curve, loss_curves
from clustermim.render.page import Column, Section
from clustermim.runs import read_metrics
from clustermim.studies.collecting import Findings, RunRow
from clustermim.studies.folder import StudyFolder
from clustermim.studies.tables import protocol_title
from clustermim.studies.telling import where

_MOST_CURVES = 12


def add_runs(section: Section, findings: Findings, folder: StudyFolder) -> None:
    """A table with a row for each encoder, and the losses of their trainings."""
    several = len(findings.judgements) > 1
    rows = []
    for r in findings.runs:
        row: dict[str, Any] = {
            "name": r.name,
            "where": where(r.data, r.judged_on),
            "seed": r.seed,
            "lr": None if r.lr is None else f"{r.lr:g}",
        }
        for protocol in findings.protocols:
            row[protocol] = 100 * r.accuracy[protocol] if protocol in r.accuracy else None
            low, high = r.intervals.get(protocol, (None, None))
            row[f"{protocol}_low"], row[f"{protocol}_high"] = (None if e is None else 100 * e for e in (low, high))
        row["validation"] = None if r.validation is None else 100 * r.validation
        row |= {"mask": r.mask_ratio, "model": r.model, "epochs": r.epochs, "minutes": (r.seconds or 0) / 60 or None}
        rows.append(row | {"place": r.places.get("linear"), "reason": r.reason or None})
    section.table(
        [
            Column(key="name", title="target", kind="text"),
            *([Column(key="where", title="judged on", kind="text")] if several else []),
            Column(key="seed", title="seed", digits=0),
            *(
                Column(key=p, title=f"{protocol_title(p)}, %", digits=1, low=f"{p}_low", high=f"{p}_high", best="max")
                for p in findings.protocols
            ),
            Column(key="validation", title="validation, %", digits=1),
            Column(key="lr", title="learning rate", kind="text"),
            Column(key="place", title="layer.pool", kind="text"),
            Column(key="mask", title="mask", digits=2),
            Column(key="model", title="model", kind="text"),
            Column(key="epochs", title="epochs", digits=0),
            Column(key="minutes", title="minutes", digits=1),
            Column(key="reason", title="missing because", kind="text", optional=True),
        ],
        rows,
        caption="One row an encoder. Intervals are over test images; validation is the linear accuracy by which "
        "learning rate and layer were chosen, on training images held back.",
        filterable=True,
    )
    curves = [curve for row in _one_a_target(findings) if (curve := _loss(row, folder)) is not None]
    if curves:
        some = "" if len(curves) <= _MOST_CURVES else f" The first {_MOST_CURVES} targets."
        section.chart(
            loss_curves(curves[:_MOST_CURVES]),
            description="Training loss of each target over epochs.",
            caption="Training loss of each target with its first seed, averaged over every few steps. Losses of "
            f"different targets have different units and cannot be compared with each other.{some}",
            folded="How the trainings went",
        )


def _one_a_target(findings: Findings) -> list[RunRow]:
    """The first seed of each target that was trained."""
    found: dict[tuple[str, str], RunRow] = {}
    for row in findings.runs:
        if row.run is not None:
            found.setdefault((row.data, row.name), row)
    return list(found.values())


def _loss(row: RunRow, folder: StudyFolder) -> Curve | None:
    """Loss over epochs, as the run logged it."""
    assert row.run is not None
    steps = [step for step in read_metrics(folder.piece(row.run) / "run") if "loss" in step and "epoch" in step]
    unit = "cross-entropy, nats" if row.tokens is not None else "squared error"
    if len(steps) < 2:
        return None
    return Curve(name=row.name, x=[step["epoch"] for step in steps], y=[step["loss"] for step in steps], unit=unit)

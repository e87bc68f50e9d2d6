"""`clustermim demo`: the whole idea on embedded images: fit, score, foresee, pretrain, judge; one table, one page.

It only strings the verbs together: each step is a call that also stands, as a command, on the page it makes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from json import dumps, loads
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_splits
from clustermim.errors import InputError
from clustermim.render.figures import Curve
from clustermim.runs import RunDirectory, atomic_write, environment_facts, read_metrics
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.demo_commands import step_commands
from clustermim.verbs.demo_findings import PROTOCOLS, Judged, predicted_order
from clustermim.verbs.demo_page import Scored, Story, build_page, rich_table
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.probe_encoders import probe
from clustermim.verbs.score import TcasResult, tcas
from clustermim.verbs.token_views import look_at_tokens
from clustermim.verbs.tokenizer_fit import fit_tokenizer

DATA = "digits"
TRAINING: Mapping[str, Any] = {"model": "vit_micro", "patch_size": 2, "batch_size": 64, "lr": 1e-3}
"""The same for every encoder: only the target differs. The learning rate is the token target's default."""

VOCABULARIES: Mapping[str, Mapping[str, Any]] = {
    "pixel-10": {"features": "pixel", "k": 10},
    "pixel-50": {"features": "pixel", "k": 50},
    "pixel-200": {"features": "pixel", "k": 200},
    "standardised-50": {"features": "pixel?standardise=true", "k": 50},
    "context-50": {"features": "pixel?context=4", "k": 50},
    "context-200": {"features": "pixel?context=4", "k": 200},
}
"""What a user would try: K-means on pixels in three sizes, on standardised patches, on patches with context."""

SIMPLE = "pixel-50"
"""The vocabulary that shows what a token is; also the paper's choice for pixels."""

CONTROLS: Mapping[str, Mapping[str, Any]] = {
    "random-centroids": {"kind": "random-centroids", "k": 50},
    "position": {"kind": "position"},
    "random": {"kind": "random", "k": 50},
    "identity": {"kind": "identity"},
    "oracle": {"kind": "oracle"},
}
"""Tokens whose scores are known beforehand; they bracket every result."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One encoder to be trained."""

    name: str
    folder: str
    target: Mapping[str, Any]
    """Options of `pretrain` that say what to predict."""
    tokens: str
    """The tokens whose score foresees it; for pixels `identity`, one token for each patch."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found and where it lies."""

    report: Path
    """The page."""
    chosen: str
    """The vocabulary of the highest cross-fitted alignment."""
    scored: Sequence[Scored] = field(repr=False)
    judged: Sequence[Judged] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each tokenizer, then one for each encoder."""
        tokens: list[dict[str, Any]] = [{"row": "tokenizer", **vars(s)} for s in self.scored]
        order = predicted_order(self.judged)
        for j in self.judged:
            place = order.index(j.name) + 1 if j.name in order else None
            plain = {key: value for key, value in vars(j).items() if key != "accuracy"}
            tokens.append({"row": "encoder", **plain, "foreseen": place, **j.accuracy})
        return tokens

    def __rich__(self) -> Group:
        """The table, then the page's path, last."""
        return Group(
            rich_table(self.scored, self.judged, self.chosen),
            Text("\nEverything is told, with pictures, in"),
            Text(str(self.report), no_wrap=True, overflow="ignore"),
        )


def demo(
    *,
    out: Path = Path("demo"),
    epochs: int = 8,
    bootstrap: int = 500,
    seed: int = 0,
    limit: int | None = None,
    json: Path | None = None,
    device: Device = "auto",
    resume: bool = False,
) -> DemoResult:
    """The whole idea on 1,797 scans of handwritten digits that come with scikit-learn, in about two minutes.

    Fits patch vocabularies and controls, scores them, writes down what the scores foresee, pretrains ClusterMIM and MAE
    on the same budget, judges them and the floors, and writes OUT/report.html.

    Parameters
    ----------
    out
        Folder for everything; must be new or empty.
    epochs
        Passes over the images for each encoder.
    bootstrap
        Resamples of the images for the intervals of the scores; 0 for none.
    seed
        Decides everything that is random.
    limit
        Use only this many images of each split: for a quick look.
    json
        Also write the table's rows to this file.
    device
        cpu, cuda or mps; auto takes the best there is.
    resume
        Continue a demo that was stopped; steps that are finished are not done again.

    Raises
    ------
    InputError
        The folder holds something else, or a finished demo and there is no --resume.
    """
    for name, value in (("epochs", epochs), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    resolve_device(device)
    config = {"epochs": epochs, "bootstrap": bootstrap, "seed": seed, "limit": limit, "device": device}
    with RunDirectory(out, "demo", config, resume=resume, volatile=("device",)) as run:
        if run.finished:
            result = read_result(run.path)
        else:
            steps = _Demo(run.path, epochs, bootstrap, seed, DataOptions(limit=limit), device)
            steps.resumed = run.resuming
            result = steps.run_all()
            run.finish({"seconds": steps.seconds})
    if json is not None:
        write_json(json, result.rows())
    return result


class _Demo:
    """The steps in their order; each leaves its files, so that a resumed demo finds them."""

    def __init__(self, out: Path, epochs: int, bootstrap: int, seed: int, options: DataOptions, device: Device) -> None:
        self.out, self.epochs, self.bootstrap, self.seed = out, epochs, bootstrap, seed
        self.options, self.device = options, device
        self.resumed = False
        self.seconds: dict[str, float] = {}
        self.console = Console(stderr=True)
        self.train, test = open_splits(DATA, options)
        self.test_images = len(test)

    def run_all(self) -> DemoResult:
        """Fit, score, foresee, pretrain, judge, tell."""
        with self._step("fitting tokenizers"):
            self._fit()
        with self._step("scoring tokens"):
            scored = self._score()
        chosen, rival = choose(scored)
        arms = make_arms(chosen, rival, self.out / "tokenizers")
        self._foresee(scored, arms)
        for arm in arms:
            with self._step(f"pretraining {arm.name}"):
                options = {**arm.target, **TRAINING, **self._common}
                pretrain(DATA, out=self._run(arm), epochs=self.epochs, resume=True, log_every=5, **options)
        with self._step("judging encoders"):
            judged = self._judge(arms, chosen, scored)
        result = DemoResult(report=self.out / "report.html", chosen=chosen, scored=scored, judged=judged)
        with self._step("drawing the page"):
            atomic_write(result.report, build_page(self._story(result, arms)).html())
        write_json(self.out / "results.json", {"chosen": chosen, "rows": result.rows()})
        return result

    @property
    def _common(self) -> dict[str, Any]:
        return {"seed": self.seed, "device": self.device, "options": self.options}

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        self.console.print(f"[{sum(self.seconds.values()):5.1f} s] {what}", markup=False, highlight=False)
        began = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - began

    def _tokenizer(self, name: str) -> Path:
        return self.out / "tokenizers" / name

    def _run(self, arm: Arm) -> Path:
        return self.out / "runs" / arm.folder

    def _fit(self) -> None:
        for name, settings in {**VOCABULARIES, **CONTROLS}.items():
            options = {"patch_size": TRAINING["patch_size"], **settings, **self._common}
            fit_tokenizer(DATA, out=self._tokenizer(name), resume=True, **options)

    def _score(self) -> list[Scored]:
        names = [*VOCABULARIES, *CONTROLS]
        result: TcasResult = tcas(
            [self._tokenizer(name) for name in names],
            DATA,
            bootstrap=self.bootstrap,
            json=self.out / "scores.json",
            **self._common,
        )
        return [scored_from(row, control=row["tokenizer"] in CONTROLS) for row in result.rows()]

    def _foresee(self, scored: Sequence[Scored], arms: Sequence[Arm]) -> None:
        """Write down, before any training, how the scores rank what is to be trained."""
        path = self.out / "predictions.json"
        if path.exists():
            return
        alignment = {s.name: s.alignment_crossfit for s in scored}
        ranked = sorted(arms, key=lambda arm: -alignment[arm.tokens])
        write_json(
            path,
            {
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "by": "cross-fitted alignment of the tokens that are predicted; predicting pixels counts as `identity`",
                "ranking": [
                    {"place": i + 1, "encoder": arm.name, "tokens": arm.tokens, "alignment": alignment[arm.tokens]}
                    for i, arm in enumerate(ranked)
                ],
            },
        )

    def _judge(self, arms: Sequence[Arm], chosen: str, scored: Sequence[Scored]) -> list[Judged]:
        floors = {
            "raw-pixels": "raw-pixels",
            f"random:{TRAINING['model']}": f"random:{TRAINING['model']}?patch_size={TRAINING['patch_size']}",
            f"bag-of-tokens:{chosen}": f"bag-of-tokens:{self._tokenizer(chosen)}",
        }
        encoders = [*(str(self._run(arm)) for arm in arms), *floors.values()]
        rows = probe(encoders, DATA, json=self.out / "probe.json", **self._common).rows()
        found = {
            name: [row for row in rows if row["encoder"] == name] for name in dict.fromkeys(r["encoder"] for r in rows)
        }
        accuracies = [best_by_validation(group) for group in found.values()]
        alignment = {s.name: s.alignment_crossfit for s in scored}
        judged = [
            Judged(
                name=arm.name,
                floor=False,
                accuracy=accuracy,
                masked=arm.target["target"],
                alignment=alignment[arm.tokens],
                tokens=arm.tokens,
            )
            for arm, accuracy in zip(arms, accuracies, strict=False)
        ]
        return judged + [
            Judged(name=name, floor=True, accuracy=accuracy)
            for name, accuracy in zip(floors, accuracies[len(arms) :], strict=True)
        ]

    def _story(self, result: DemoResult, arms: Sequence[Arm]) -> Story:
        views = {
            name: look_at_tokens(load_tokenizer(self._tokenizer(name)), self.train, examples=10)
            for name in (SIMPLE, result.chosen)
        }
        facts = environment_facts()
        return Story(
            scored=result.scored,
            judged=result.judged,
            chosen=result.chosen,
            curves=[loss_curve(arm, self._run(arm)) for arm in arms],
            simple=views[SIMPLE],
            simple_name=SIMPLE,
            view=views[result.chosen],
            commands=step_commands(
                data=DATA,
                chosen=result.chosen,
                fitted={**VOCABULARIES[result.chosen], "patch_size": TRAINING["patch_size"]},
                others=[self._tokenizer(name) for name in ("pixel-10", "random-centroids")],
                bootstrap=self.bootstrap,
                trained={**TRAINING, "epochs": self.epochs},
                pixel_target=arms[-1].target,
                seed=self.seed,
            ),
            facts={
                "data": f"{DATA}: {len(self.train):,} training and {self.test_images:,} test images of 8 × 8 pixels",
                "time" + (" since it was resumed" if self.resumed else ""): f"{sum(self.seconds.values()):.0f} s: "
                + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()),
                "seed": str(self.seed),
                "hardware": ", ".join(f"{key} {value}" for key, value in facts["hardware"].items()),
                "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
                "source": f"git {facts['git']}" if facts["git"] else "installed package",
            },
            train_images=len(self.train),
            test_images=self.test_images,
            epochs=self.epochs,
        )


def choose(scored: Sequence[Scored]) -> tuple[str, str]:
    """The vocabularies of the highest and of the lowest cross-fitted alignment; controls do not stand for election."""
    ranked = sorted((s for s in scored if not s.control), key=lambda s: -s.alignment_crossfit)
    return ranked[0].name, ranked[-1].name


def make_arms(chosen: str, rival: str, tokenizers: Path) -> list[Arm]:
    """What is trained: on tokens of the best and of the worst vocabulary by score, and on pixels, as MAE is."""
    arms = [
        Arm(
            name=f"ClusterMIM, {name}",
            folder=f"clustermim-{name}",
            target={"target": "token", "tokenizer": tokenizers / name},
            tokens=name,
        )
        for name in dict.fromkeys((chosen, rival))
    ]
    for name, folder, norm_pix in (("MAE, raw pixels", "mae-raw", False), ("MAE, norm-pix", "mae-norm-pix", True)):
        target = {"target": "pixel", "norm_pix": norm_pix}
        arms.append(Arm(name=name, folder=folder, target=target, tokens="identity"))
    return arms


def scored_from(row: Mapping[str, Any], *, control: bool) -> Scored:
    """A row of `tcas` as the page shows it."""
    crossfit = {key: float(row[key]) for key in ("alignment_crossfit", "labelling_error_crossfit", "tcas_crossfit")}
    return Scored(
        name=row["tokenizer"],
        control=control,
        vocab_size=row["vocab_size"],
        used_tokens=row["used_tokens"],
        alignment=row["alignment"],
        alignment_low=row.get("alignment_crossfit_low"),
        alignment_high=row.get("alignment_crossfit_high"),
        nmi=row["nmi"],
        perplexity=row["perplexity"],
        **crossfit,
    )


def best_by_validation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Test accuracy by protocol, of the pool (class token or patch mean) that was best on validation images."""
    protocols = dict.fromkeys(row["protocol"] for row in rows)
    of = {protocol: [row for row in rows if row["protocol"] == protocol] for protocol in protocols}
    return {protocol: max(found, key=lambda row: row["val_top1"])["top1"] for protocol, found in of.items()}


def loss_curve(arm: Arm, folder: Path) -> Curve:
    """Loss over epochs, as the run logged it."""
    rows = list(read_metrics(folder))
    unit = "cross-entropy, nats" if arm.target["target"] == "token" else "mean squared error"
    return Curve(name=arm.name, x=[row["epoch"] for row in rows], y=[row["loss"] for row in rows], unit=unit)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    atomic_write(path, dumps(value, indent=1) + "\n")


def read_result(folder: Path) -> DemoResult:
    """What a finished demo found."""
    stored = loads((folder / "results.json").read_text())
    scored, judged = [], []
    for row in stored["rows"]:
        kind = row.pop("row")
        if kind == "tokenizer":
            scored.append(Scored(**row))
        else:
            row.pop("foreseen")
            accuracy = {name: row.pop(name) for name in PROTOCOLS if name in row}
            judged.append(Judged(accuracy=accuracy, **row))
    return DemoResult(report=folder / "report.html", chosen=stored["chosen"], scored=scored, judged=judged)

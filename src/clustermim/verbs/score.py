"""`clustermim tcas`: score tokenizers with labelled images, before any training."""

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from lightning_fabric import Fabric
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clustermim.data.loaders import make_loader
from clustermim.data.mask_images import IGNORED
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.runs import atomic_write
from clustermim.scoring.advice import advise, best_of, with_interval
from clustermim.scoring.agreement import Agreement
from clustermim.scoring.comparing import Comparison, compare_all
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import plan_images
from clustermim.scoring.learning import CurvePoint, curve_advice, learning_curve
from clustermim.scoring.stored import open_ids
from clustermim.scoring.stream import CountedStream, count_ids, count_stream
from clustermim.scoring.tcas import TokenScore, check_options, score_counts
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.launch import Device, exact_fabric
from clustermim.verbs.score_label_free import agreement_table, agreement_without_labels
from clustermim.verbs.score_labels import Labelled, check_labels, label_images
from clustermim.verbs.score_page import score_page

CONTROLS = frozenset({"identity", "random", "random-centroids", "position", "oracle"})


@dataclass(frozen=True, kw_only=True)
class TcasResult:
    """Scores by name of tokenizer, in the order given."""

    scores: Mapping[str, TokenScore]
    kinds: Mapping[str, str]
    """Kind of each tokenizer; `ids` for stored ids."""
    data: str
    """What was scored on."""
    class_names: Sequence[str] | None
    """Name of each label."""
    curves: Mapping[str, Sequence[CurvePoint]] = field(default_factory=dict)
    """Alignment against the number of labelled images, where it was asked for; controls have none."""

    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Label-free agreement of the tokens, where it was asked for; the only figures of images without labels."""

    @property
    def controls(self) -> frozenset[str]:
        """Names that are there for comparison."""
        return frozenset(name for name, kind in self.kinds.items() if kind in CONTROLS)

    @cached_property
    def comparisons(self) -> Mapping[str, Mapping[str, Comparison]]:
        """Each tokenizer against each other one, paired image by image; empty without a bootstrap."""
        return compare_all(self.scores)

    @property
    def best(self) -> str | None:
        """The tokenizer that the others are compared with."""
        return best_of(self.scores, self.controls) if self.scores else None

    @property
    def advice(self) -> list[str]:
        """Sentences that say what to make of the scores."""
        return advise(self.scores, self.controls) + (curve_advice(self.curves) if self.curves else [])

    @property
    def notes(self) -> list[str]:
        """What the reader must be told, each once."""
        return list(dict.fromkeys(note for score in self.scores.values() for note in score.notes))

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a tokenizer: every figure with its interval; then one a point of its learning curve."""
        known: dict[str, dict[str, Any]] = {
            name: {"tokenizer": name, "kind": kind, "data": self.data} for name, kind in self.kinds.items()
        }
        agreed = {name: one.to_dict() for name, one in self.agreements.items()}
        for name in self.comparisons:
            if self.best is not None and name != self.best:
                known[name] |= {"best": self.best} | _lag(self.comparisons[name][self.best])
        scored = {name: score.to_dict() | {"notes": " ".join(score.notes)} for name, score in self.scores.items()}
        return [
            *(one | scored.get(name, {}) | agreed.get(name, {}) for name, one in known.items()),
            *(known[name] | point.to_dict() for name, curve in self.curves.items() for point in curve),
        ]

    def html(self) -> str:
        """The scores as a self-contained page."""
        return score_page(
            self.scores,
            data=self.data,
            controls=self.controls,
            advice=self.advice,
            notes=self.notes,
            class_names=self.class_names,
            curves=self.curves,
            best=self.best,
            comparisons=self.comparisons,
        )

    def __rich__(self) -> Group:
        """A table, alignment first, and the advice."""
        if not self.scores:
            return agreement_table(self.agreements, self.data)
        some = next(iter(self.scores.values()))
        crossfit = some.alignment_crossfit is not None
        end = "_crossfit" if crossfit else ""
        how = f"cross-fitted in {some.folds} folds" if crossfit else "plug-in"
        table = Table(
            title=f"Tokens against {some.num_classes} classes of {some.images:,} images of {self.data} ({how})",
            caption="TCAS has three readings here: walk, rows (grows with K) and cosine. Plug-in flatters large "
            "vocabularies. [..]: 95 % interval, freed of bias that resampling shows; a figure outside it is biased.",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("tokenizer", no_wrap=True)
        for title in (
            "K",
            "used",
            "alignment ↑",
            "labelling error ↓",
            "TCAS walk ↓",
            "TCAS rows ↓",
            "TCAS cosine ↓",
            *(["alignment, plug-in"] if crossfit else []),
            "NMI ↑",
            "perplexity",
            *(["P(best is better)"] if self.comparisons and len(self.scores) > 1 else []),
        ):
            table.add_column(title, justify="right", no_wrap=title.startswith("alignment"))
        for name, score in self.scores.items():
            table.add_row(
                name,
                f"{score.vocab_size:,}",
                f"{score.used_tokens:,}",
                with_interval(score, f"alignment{end}"),
                *(
                    _short(getattr(score, f"{figure}{end}"))
                    for figure in ("labelling_error", "tcas", "tcas_rows", "tcas_cosine")
                ),
                *([_short(score.alignment)] if crossfit else []),
                _short(score.nmi),
                f"{score.perplexity:,.1f}",
                *([self._chance(name)] if self.comparisons and len(self.scores) > 1 else []),
                style="dim" if name in self.controls else None,
            )
        lines = [Text(line) for line in self.advice] + [Text(f"Note: {note}", style="yellow") for note in self.notes]
        agreed = [agreement_table(self.agreements, self.data)] if self.agreements else []
        return Group(table, *([self._curve_table()] if self.curves else []), *lines, *agreed)

    def _chance(self, name: str) -> str:
        return "-" if name == self.best else f"{1 - self.comparisons[name][str(self.best)].probability:.2f}"

    def _curve_table(self) -> Table:
        table = Table(
            title="Alignment (cross-fitted) from fewer labelled images: mean, and range over the draws",
            title_justify="left",
        )
        table.add_column("labelled images", justify="right")
        for name in self.curves:
            table.add_column(name, justify="right")
        for points in zip(*self.curves.values(), strict=True):
            cells = (
                f"{p.alignment_crossfit:.3f} [{p.alignment_crossfit_min:.3f}, {p.alignment_crossfit_max:.3f}]"
                for p in points
            )
            table.add_row(f"{points[0].images:,}", *cells)
        return table


def tcas(
    tokenizer: Annotated[Any, Parameter(name="--tokenizer", consume_multiple=True, negative="")] = (),
    data: Annotated[Any, Parameter()] = None,
    *,
    ids: Path | None = None,
    masks: Annotated[Any, Parameter()] = None,
    ignore_index: int = IGNORED,
    multi_label: Annotated[Any, Parameter()] = None,
    bootstrap: int = 200,
    curve: bool = False,
    label_free: bool = False,
    crossfit: bool = True,
    seed: int = 0,
    json: Path | None = None,
    html: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    devices: int = 1,
    workers: int | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> TcasResult:
    """Score tokenizers with labelled images, before any training.

    Every figure says how well tokens line up with classes; alignment leads: 0 for tokens independent of class, 1 for
    tokens that belong to one class each. All tokenizers are scored in one pass over the images.

    Parameters
    ----------
    tokenizer
        Folders of fitted tokenizers and controls, or hf:owner/name.
    data
        Labelled images: digits (the default), a folder, .zip, .npz, .tif or parquet; in Python also (images, labels)
        or a Dataset. The train split, unless #test or #all says otherwise. Image size and channels are the tokenizers'.
    ids
        Stored token ids (a file or folder of `clustermim tokenize`) instead of tokenizers and images.
    masks
        A class for each patch instead of one for the image, the commonest of its pixels: folder of mask images called
        as the images are, or .npz with `masks` (n, H, W).
    ignore_index
        Value of mask pixels without a class; a patch is left out where they are the commonest.
    multi_label
        Several classes an image: .json (image -> list of classes, or COCO's), .csv (columns image and class, or
        OpenImages') or .parquet; each patch then counts in each class of its image.
    bootstrap
        Resamples of the images for 95 % intervals; 0 for none.
    curve
        Also score growing subsets of the images, to see how many labelled images are enough.
    label_free
        Experimental: also say how tokens agree between two views of an image and between its patches. Images without
        labels get this alone.
    crossfit
        Judge tokens on images they were not counted on.
    seed
        Seed of the folds and resamples.
    json
        Write the table's rows to this file.
    html
        Write a page with tables of tokens and classes to this file.
    batch_size
        Images tokenized at a time.
    device
        Where tokens are computed.
    devices
        How many of them, a process each, which share the images out among them; under torchrun or SLURM their count is
        taken from there. The scores are those of one process.
    workers
        Processes that read images; default: as the source needs.
    options
        How the images are read.

    Returns
    -------
    TcasResult
        `scores`, a `TokenScore` for each tokenizer by name, and `advice`; with `label_free` also `agreements`, alone
        where the images have no labels.

    Raises
    ------
    InputError
        No labels, a single class, a tokenizer that does not fit the images, unreadable ids, an image without a mask or
        that the class lists do not name.
    """
    check_options(bootstrap, seed)
    if isinstance(tokenizer, str | Path | Tokenizer):
        tokenizer = [tokenizer]
    for target in (json, html):
        if target is not None and target.is_dir():
            raise InputError(f"{target} is a folder; name a file to write to.")
    if label_free and ids is not None:
        raise InputError("--label-free looks at two views of each image: give --tokenizer and --data, not --ids.")
    check_labels(masks, ignore_index, multi_label, ids)
    fabric = exact_fabric(device, devices)
    fabric.launch()
    first = fabric.is_global_zero
    plan_options: dict[str, Any] = {"crossfit": crossfit, "seed": seed}
    per_image = bootstrap > 0 or curve
    agreements: dict[str, Agreement] = {}
    if ids is not None:
        if len(tokenizer) or data is not None:
            raise InputError("Give either --ids, or --tokenizer with --data; stored ids bring their own labels.")
        stored = open_ids(ids)
        name, origin = stored.path.stem, str(ids)
        class_names: Sequence[str] | None = stored.classes
        plan = plan_images(stored.labels, groups=stored.groups, **plan_options)
        counts = count_ids(stored.parts(), plan, stored.vocab_size, per_image=per_image)
        scores, kinds = {name: score_counts(counts, bootstrap=bootstrap, seed=seed)}, {name: "ids"}
        counted: Mapping[str, TokenCounts] = {name: counts}
    else:
        if not len(tokenizer):
            raise InputError("There is nothing to score: give --tokenizer DIR [DIR ...], or --ids FILE.")
        tokenizers = name_tokenizers([(spec, load_tokenizer(spec)) for spec in tokenizer])
        # What the options leave open is what the first tokenizer was made for; the others must agree.
        filled = next(iter(tokenizers.values())).fill_options(options)
        source = open_source("digits" if data is None else data, filled)
        kinds = {name: one.kind for name, one in tokenizers.items()}
        for one in tokenizers.values():
            one.check_matches(source.view)
            one.to(fabric.device)
        if message := source.skipped_message() if first else None:
            Console(stderr=True).print(message, markup=False, highlight=False)
        if label_free:
            agreements = agreement_without_labels(
                tokenizers, source, seed=seed, batch_size=batch_size, device=fabric.device, workers=workers
            )
            if source.labels is None and masks is None and multi_label is None and html is None:
                alone = TcasResult(scores={}, kinds=kinds, data=source.name, class_names=None, agreements=agreements)
                if first:
                    _write_rows(json, alone)
                return alone
        labelled = label_images(source, tokenizers, masks, ignore_index, multi_label)
        stream = _count(fabric, tokenizers, labelled, batch_size, workers, per_image, plan_options)
        origin, class_names, counted = source.name, labelled.names, stream.counts
        scores = stream.scores(bootstrap=bootstrap, seed=seed)
    curves = {}
    if curve:
        fitted = [name for name in counted if kinds[name] not in CONTROLS] or list(counted)
        curves = {name: learning_curve(counted[name], seed=seed) for name in fitted}
    result = TcasResult(
        scores=scores, kinds=kinds, data=origin, class_names=class_names, curves=curves, agreements=agreements
    )
    if first:
        _write_rows(json, result)
        if html is not None:
            atomic_write(html, result.html())
    return result


def _lag(comparison: Comparison) -> dict[str, float]:
    """How a tokenizer compares with the best, as keys of its record."""
    return {
        "minus_best": comparison.difference,
        "minus_best_low": comparison.low,
        "minus_best_high": comparison.high,
        "probability_best_is_better": 1 - comparison.probability,
    }


def _write_rows(file: Path | None, result: TcasResult) -> None:
    if file is not None:
        atomic_write(file, json_text.dumps(result.rows(), indent=2) + "\n")


def _count(
    fabric: Fabric,
    tokenizers: Mapping[str, Tokenizer],
    labelled: Labelled,
    batch_size: int,
    workers: int | None,
    per_image: bool,
    plan_options: Mapping[str, Any],
) -> CountedStream:
    """Pass over the images once, each process over its own part of them."""
    source = labelled.source
    plan = plan_images(labelled.labels, groups=source.groups, **plan_options)
    if labelled.note is not None:
        plan = replace(plan, notes=(*plan.notes, labelled.note))
    loader = make_loader(
        source,
        batch_size=batch_size,
        train=False,
        device=fabric.device,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    console = Console(stderr=True)
    with Progress(
        TextColumn("tokenizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and fabric.is_global_zero),
    ) as progress:
        task = progress.add_task("", total=len(source))

        def advance(images: int) -> None:
            progress.advance(task, images * fabric.world_size)

        return count_stream(tokenizers, loader.epoch(), plan, per_image=per_image, on_batch=advance)


def name_tokenizers(loaded: Sequence[tuple[Any, Tokenizer]]) -> dict[str, Tokenizer]:
    """Short names: the folder's own, the whole path where two folders share it, a number where that repeats too."""
    paths = [str(spec) if isinstance(spec, str | Path) else "" for spec, _ in loaded]
    tails = [
        Path(path).name if path else f"{one.kind}-{one.vocab_size}"
        for path, (_, one) in zip(paths, loaded, strict=True)
    ]
    named: dict[str, Tokenizer] = {}
    for path, tail, (_, one) in zip(paths, tails, loaded, strict=True):
        stem = tail if tails.count(tail) == 1 or not path else path
        name = next(n for n in [stem, *(f"{stem} ({i})" for i in range(2, len(loaded) + 2))] if n not in named)
        named[name] = one
    return named


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.0f}"

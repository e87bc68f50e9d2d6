"""`clustermim graph`: the augmentation graph of masked images, and what tokens make of it."""

import json as json_text
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from clustermim.data.loaders import make_loader
from clustermim.data.masks import random_masks
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.errors import InputError
from clustermim.render.page import Column, Page
from clustermim.render.score_figures import graph_chart, spectrum_chart
from clustermim.runs import atomic_write
from clustermim.scoring.graph import GraphReport, augmentation_spectrum, mask_graph
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.graph_drawing import IMAGES, Drawing, cut_drawings, toy_graphs
from clustermim.verbs.score import name_tokenizers

PLAIN = "no tokens"
"""Name of the graph in which every hidden patch is a node of its own, as for MAE."""
TOY = "the toy model"
READING = (
    "Each mask of an image is a visible view, each hidden patch a hidden view; a tokenizer merges hidden patches of "
    "one token. λ are the eigenvalues of the graph between visible views that share hidden ones. Tokens connect "
    "images, which lowers Σλ², and connect classes, which raises the labelling error α. c1·Σλ² + c2·α bounds "
    "downstream error up to constants that nobody knows: docs/theory.md says what may be read from it."
)
TOY_READING = (
    "Two classes have n visible and n hidden views each and share m of either. Identity tokens merge nothing; "
    "class-wise ones merge the hidden views of a class and half of those shared; cross-class ones half of both "
    "classes. λ₂ is (1 − m/n)², (1 − m/n)³ and 0: docs/theory.md."
)


@dataclass(frozen=True, kw_only=True)
class GraphResult:
    """A report for the plain graph and for each tokenizer."""

    reports: Mapping[str, GraphReport]
    data: str
    c1: float
    c2: float
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    """What is small enough to be drawn: the toy model, or the views of a few images."""

    @property
    def reading(self) -> str:
        """What the figures mean."""
        return TOY_READING if self.data.startswith(TOY) else READING

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a graph; `bound` is c1·Σλ² + c2·α."""
        return [
            {"tokens": name, "data": self.data}
            | report.to_dict()
            | {"bound": report.bound(self.c1, self.c2), "c1": self.c1, "c2": self.c2}
            for name, report in self.reports.items()
        ]

    def html(self) -> str:
        """The reports as a self-contained page."""
        page = Page(f"Augmentation graph of {self.data}", lead=[self.reading])
        if self.drawings:
            part = page.section("Graph")
            part.chart(
                graph_chart(self.drawings),
                description="Visible views and hidden nodes of each graph, joined by lines",
                caption="Circles: visible views. Squares: hidden views, merged where they have one token. Colours: "
                "classes; the greyer, the more a node mixes them."
                + ("" if self.data.startswith(TOY) else f" Of the graph, the views of {IMAGES} images."),
            )
        part = page.section("Spectrum")
        part.chart(
            spectrum_chart({name: report.eigenvalues[:50].tolist() for name, report in self.reports.items()}),
            description="The largest eigenvalues of each graph, in falling order",
            caption="The 50 largest eigenvalues. As many are 1 as the graph has parts that nothing connects.",
        )
        part.table(
            [
                Column(key="tokens", title="Tokens", kind="text"),
                Column(key="hidden", title="Hidden nodes", digits=0),
                Column(key="components", title="Parts", digits=0),
                Column(key="second_eigenvalue", title="λ₂", digits=4),
                Column(key="spectral_gap", title="Gap", digits=4),
                Column(key="sum_squared", title="Σλ²", digits=3, best="min"),
                Column(key="labelling_error", title="α", digits=4, best="min"),
                Column(key="intra_class", title="Edge in a class", digits=7),
                Column(key="inter_class", title="Edge between classes", digits=7),
                Column(key="bound", title=f"{self.c1:g}·Σλ² + {self.c2:g}·α", digits=3, best="min"),
            ],
            self.rows(),
            caption="Edges are means over pairs of distinct visible views.",
        )
        return page.html()

    def __rich__(self) -> Group:
        """A table, and how to read it."""
        some = next(iter(self.reports.values()))
        table = Table(title=f"Augmentation graph of {self.data}: {some.visible:,} visible views", title_justify="left")
        table.add_column("tokens", no_wrap=True)
        titles = ("hidden nodes", "parts", "λ₂", "gap", "Σλ²", "α", "intra / inter class")
        for title in (*titles, f"{self.c1:g}·Σλ² + {self.c2:g}·α"):
            table.add_column(title, justify="right")
        for row in self.rows():
            intra, inter = row["intra_class"], row["inter_class"]
            table.add_row(
                row["tokens"],
                f"{row['hidden']:,}",
                f"{row['components']:,}",
                *(_short(row[key]) for key in ("second_eigenvalue", "spectral_gap", "sum_squared", "labelling_error")),
                "-" if intra is None or not inter else f"{intra / inter:.2f}",
                _short(row["bound"]),
            )
        return Group(table, Text(self.reading))


def graph(
    tokenizer: Annotated[Any, Parameter(name="--tokenizer", consume_multiple=True, negative="")] = (),
    data: Annotated[Any, Parameter()] = None,
    *,
    toy: Annotated[tuple[int, int] | None, Parameter(negative="")] = None,
    mask_ratio: float = 0.75,
    masks: int = 4,
    patch_size: int | None = None,
    c1: float = 1.0,
    c2: float | None = None,
    seed: int = 0,
    json: Path | None = None,
    html: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    workers: int | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> GraphResult:
    """Spectrum and labelling error of the augmentation graph of masked images (or a toy), with tokens and without.

    Parameters
    ----------
    tokenizer
        Folders of fitted tokenizers and controls, or hf:owner/name; none for the plain graph alone.
    data
        Images, labelled or not: digits (the default), a folder, .zip, .npz, .tif or parquet; `--limit` 500 or so gives
        a quick look.
    toy
        Instead of images the toy model of docs/theory.md under its three tokenizers: n views of each class, m of them
        shared, both even.
    mask_ratio
        Share of patches hidden.
    masks
        Masks drawn of each image, each a visible view.
    patch_size
        Patch side in pixels. Default: the tokenizers'.
    c1
        Weight of Σλ².
    c2
        Weight of α. Default: twice c1.
    seed
        Seed of the masks.
    json
        Write the table's rows to this file.
    html
        Write a page with the spectrum to this file.
    batch_size
        Images tokenized at a time.
    device
        Where tokens are computed.
    workers
        Processes that read images; default: as the source needs.
    options
        How the images are read.

    Returns
    -------
    GraphResult
        `reports`, a `GraphReport` for each graph by name.

    Raises
    ------
    InputError
        Tokenizers of different patch sizes or that do not fit the images, a mask ratio that hides nothing or all.
    """
    if isinstance(tokenizer, str | Path | Tokenizer):
        tokenizer = [tokenizer]
    if masks < 1:
        raise InputError(f"--masks must be at least 1, not {masks}.")
    for name, weight in (("c1", c1), ("c2", c2)):
        if weight is not None and not 0 <= weight < float("inf"):
            raise InputError(f"--{name} must be a number of at least 0, not {weight}.")
    if toy is not None:
        if len(tokenizer) or data is not None:
            raise InputError("--toy is a graph of its own, with its own tokens: leave out --tokenizer and --data.")
        reports, drawings = toy_graphs(*toy)
        name = f"{TOY}, n = {toy[0]}, m = {toy[1]}"
    else:
        reports, drawings, name = _of_images(
            tokenizer, data, mask_ratio, masks, patch_size, seed, batch_size, device, workers, options
        )
    result = GraphResult(reports=reports, data=name, c1=c1, c2=2 * c1 if c2 is None else c2, drawings=drawings)
    if json is not None:
        atomic_write(json, json_text.dumps(result.rows(), indent=2) + "\n")
    if html is not None:
        atomic_write(html, result.html())
    return result


def _of_images(
    tokenizer: Any,
    data: Any,
    mask_ratio: float,
    masks: int,
    patch_size: int | None,
    seed: int,
    batch_size: int,
    device: Device,
    workers: int | None,
    options: DataOptions,
) -> tuple[dict[str, GraphReport], dict[str, Drawing], str]:
    """Reports, drawings and the name of the data."""
    where = resolve_device(device)
    tokenizers = name_tokenizers([(spec, load_tokenizer(spec)) for spec in tokenizer])
    filled = next(iter(tokenizers.values())).fill_options(options) if tokenizers else options
    source = open_source("digits" if data is None else data, filled)
    if message := source.skipped_message():
        Console(stderr=True).print(message, markup=False, highlight=False)
    side = _patch_side(tokenizers, patch_size)
    source.view.check_patch_size(side)
    for one in tokenizers.values():
        one.check_matches(source.view, side)
        if "labels" in one.requires and source.labels is None:
            raise InputError(f"A tokenizer of kind {one.kind!r} needs labels, and {source.name} has none.")
    patches = (source.view.image_size[0] // side) * (source.view.image_size[1] // side)
    index = torch.arange(len(source))
    hidden = torch.cat([random_masks(seed, epoch, index, patches, mask_ratio) for epoch in range(masks)]).numpy()
    image = np.tile(np.arange(len(source)), masks)
    weights = mask_graph(hidden, image, len(source))
    labels = None if source.labels is None else np.unique(source.labels, return_inverse=True)[1][image]
    tokens = {PLAIN: None} | _tokens(tokenizers, source, batch_size, where, workers)
    reports = {name: augmentation_spectrum(weights, tokens=ids, labels=labels) for name, ids in tokens.items()}
    return reports, cut_drawings(weights, tokens, image, labels), source.name


def _patch_side(tokenizers: Mapping[str, Tokenizer], patch_size: int | None) -> int:
    sides = {one.patch_size for one in tokenizers.values()} | ({patch_size} if patch_size is not None else set())
    if len(sides) > 1:
        raise InputError(
            f"The graph needs one patch size, but there are {' and '.join(str(side) for side in sorted(sides))}: leave "
            "out --patch-size, or use tokenizers of one patch size."
        )
    if not sides:
        raise InputError("Without a tokenizer the graph needs --patch-size: the side of a patch in pixels.")
    return sides.pop()


def _tokens(
    tokenizers: Mapping[str, Tokenizer], source: ImageSource, batch_size: int, device: str, workers: int | None
) -> dict[str, np.ndarray]:
    """Token of each hidden view, image after image, by tokenizer."""
    if not tokenizers:
        return {}
    loader = make_loader(source, batch_size=batch_size, train=False, device=device, workers=workers)
    found: dict[str, list[np.ndarray]] = {name: [] for name in tokenizers}
    for batch in loader.epoch():
        for name, one in tokenizers.items():
            ids = one.to(device).encode(batch.images, index=batch.index, labels=batch.labels)
            found[name].append(ids.cpu().numpy().ravel())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"

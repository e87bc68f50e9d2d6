"""`clustermim show`: what an encoder sees, as pictures: features, neighbours, attention, predictions, a scatter."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from matplotlib.figure import Figure
from rich.table import Table

from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.encoders.contract import Encoder
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.evaluation.evaluating import view_for
from clustermim.mim.prediction_sheet import HEIGHT, prediction_sheet
from clustermim.render.encoder_pictures import (
    attention_picture,
    component_maps,
    heat_picture,
    principal_components,
    scatter_chart,
)
from clustermim.render.figures import figure_png
from clustermim.render.page import Page
from clustermim.render.sheets import Group, Tile, picture_sheet, png, side_by_side
from clustermim.runs import RunDirectory, atomic_write
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.encoder_views import EncoderView, choose_examples, limited, look_at_encoder, picture_of
from clustermim.verbs.prediction_views import Predictions, look_at_predictions
from clustermim.verbs.token_views import look_at_tokens

_ENOUGH = 2000
"""Images that are looked at unless `--limit` says otherwise: enough to find neighbours in."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Tiles under one heading, on the page and on a sheet of their own."""

    file: str
    title: str
    note: str
    tiles: list[Tile] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ShownEncoder:
    """What was made."""

    page: Path
    files: list[Path]
    missing: list[str]
    """What could not be shown, and why."""

    def rows(self) -> list[dict[str, Any]]:
        """One record a file."""
        return [{"file": str(path)} for path in [self.page, *self.files]]

    def __rich__(self) -> Table:
        """The files, and what is missing."""
        table = Table(show_header=False, box=None)
        for path in [self.page, *self.files]:
            table.add_row(path.stem.replace("_", " "), str(path))
        for reason in self.missing:
            table.add_row("not shown", reason)
        return table


def show(
    run: Annotated[Any, Parameter()],
    *,
    data: Annotated[Any, Parameter()] = "digits",
    out: Path,
    examples: int = 12,
    nearest: int = 6,
    device: Device = "auto",
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> ShownEncoder:
    """Show what an encoder sees: sheets of pictures and one page that holds them all.

    Principal components of patch features as colours, attention of the class token, nearest neighbours, a scatter of
    the images, and, for a run with a decoder, what it predicts of hidden patches: tokens or pixels.

    Parameters
    ----------
    run
        Run directory, or any other encoder: timm:NAME[@FILE], hf:NAME, mae:FILE.
    data
        Images to look at; up to 2,000 of them unless --limit says otherwise.
    out
        Folder for the pictures; must be new or empty.
    examples
        How many images are shown.
    nearest
        How many neighbours each of them gets.
    device
        cpu, cuda or mps; auto takes the best there is.
    options
        How the images are read.

    Returns
    -------
    ShownEncoder
        Paths of the page and the sheets, and what could not be shown.

    Raises
    ------
    InputError
        The encoder or the data cannot be used, do not fit each other, or the folder holds something else.
    """
    for name, value in (("examples", examples), ("nearest", nearest)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    source = open_source(data, limited(options, _ENOUGH))
    encoder = open_encoder(run, view=source.view)
    view_for(encoder, source.view)
    if len(source) < 3:
        raise InputError(f"{source.name} holds {len(source)} image(s): at least three are needed to find neighbours.")
    where = resolve_device(device)
    shown_as = Path(str(run)).name if isinstance(run, str | Path) and Path(str(run)).is_dir() else encoder.name
    config = {"run": str(run) if isinstance(run, str | Path) else encoder.name, "data": source.name}
    with RunDirectory(out, "show", config | {"examples": examples, "nearest": nearest}) as held:
        view = look_at_encoder(encoder, source, examples=examples, nearest=nearest, device=str(where))
        if isinstance(run, str | Path) and Path(run).is_dir():
            places = choose_examples(source, examples)
            predictions = look_at_predictions(Path(run), encoder, source, places, str(where))
        else:
            predictions = Predictions(missing="Only a run directory holds a decoder whose predictions can be shown.")
        pictures, missing = _pictures(view, encoder, source, predictions, view.captions)
        scatter = _scatter(view)
        files = []
        for picture in pictures:
            sheet = picture_sheet(
                [Group(title="", tiles=picture.tiles, side=HEIGHT)],
                title=f"{picture.title}: {shown_as}",
                note=picture.note.replace("**", "").replace("`", ""),
            )
            files.append(held.path / picture.file)
            atomic_write(files[-1], png(sheet))
        files.append(held.path / "scatter.png")
        atomic_write(files[-1], figure_png(scatter))
        page = held.path / "show.html"
        atomic_write(page, _page(view, shown_as, source, pictures, missing, scatter).html())
        held.finish({"data_fingerprint": source.fingerprint()})
    return ShownEncoder(page=page, files=files, missing=missing)


def _pictures(
    view: EncoderView, encoder: Encoder, source: ImageSource, predictions: Predictions, captions: Any
) -> tuple[list[Picture], list[str]]:
    """Everything that there is to show, and why the rest is missing."""
    found, missing = [], []
    if view.patches is not None:
        maps = component_maps(view.patches, view.grid)
        tiles = [
            _tile([image, colours], name, "the image, and the principal components of its patches as colours")
            for image, colours, name in zip(view.pictures, maps, view.captions, strict=True)
        ]
        note = (
            "Each image, then its patches: red, green and blue are the first three principal components of the patch "
            "features of all these images, so like colours mean like features."
        )
        found.append(Picture(file="features.png", title="Patch features", note=note, tiles=tiles))
    else:
        missing.append("This encoder has no grid of patches, so there are no maps of patch features.")
    if view.attention is not None:
        tiles = []
        for image, weights, name in zip(view.pictures, view.attention, view.captions, strict=True):
            grid = weights.reshape(view.grid)
            parts = [image, attention_picture(image, grid), heat_picture(grid)]
            tiles.append(_tile(parts, name, "the image, the same lit by attention, the attention alone"))
        note = (
            "Each image, the same lit by the attention that the class token pays to each patch in the last block (mean "
            "over heads), and that attention alone, bright where it is most; each scaled to its own range."
        )
        found.append(Picture(file="attention.png", title="Attention of the class token", note=note, tiles=tiles))
    else:
        missing.append("Attention of the class token is shown for plain timm ViTs only.")
    found.append(_neighbour_picture(view, encoder, source))
    if predictions.shown:
        found.append(_prediction_picture(predictions, source, captions))
    else:
        missing.append(predictions.missing)
    return found, missing


def _neighbour_picture(view: EncoderView, encoder: Encoder, source: ImageSource) -> Picture:
    tiles: list[Tile] = []
    same = total = 0
    for query, others in view.neighbours:
        parts = [picture_of(source, place, encoder) for place in [query, *others]]
        name = view.captions[len(tiles)]
        if view.labels is not None:
            alike = int((view.labels[list(others)] == view.labels[query]).sum())
            same, total = same + alike, total + len(others)
            name = f"{name}: {alike} of {len(others)} of its class"
        tiles.append(_tile(parts, name, "the image, and the images most like it, nearest first"))
    note = (
        f"Each image, then the {len(view.neighbours[0][1])} most like it among {len(view.vectors):,}, the nearest "
        f"first: by cosine similarity of the {'class token' if view.pool == 'cls' else view.pool + ' vector'}."
    )
    if total:
        note += f" {100 * same / total:.0f} % of these neighbours are of the class of their query."
    return Picture(file="neighbours.png", title="Nearest neighbours", note=note, tiles=tiles)


def _prediction_picture(predictions: Predictions, source: ImageSource, captions: Any) -> Picture:
    colours = None
    if predictions.tokenizer is not None:
        colours = look_at_tokens(predictions.tokenizer, source, examples=1).palette()
    sheet = prediction_sheet(
        predictions.shown,
        captions,
        mask_ratio=predictions.mask_ratio,
        norm_pix=predictions.norm_pix,
        colours=colours,
    )
    return Picture(file="predictions.png", title=sheet.title, note=sheet.note, tiles=sheet.tiles)


def _tile(parts: Any, name: str, told: str) -> Tile:
    return Tile(picture=side_by_side(parts, HEIGHT), caption=name, description=f"{name}: {told}")


def _scatter(view: EncoderView) -> Figure:
    return scatter_chart(principal_components(view.vectors, 2), view.labels, view.classes)


def _page(
    view: EncoderView,
    name: str,
    source: ImageSource,
    pictures: list[Picture],
    missing: list[str],
    scatter: Figure,
) -> Page:
    page = Page(f"What {name} sees", lead=[f"{len(view.vectors):,} images of {source.name}, split {source.split}."])
    for picture in pictures:
        section = page.section(picture.title)
        widest = max(tile.picture.shape[1] for tile in picture.tiles)
        section.gallery(picture.tiles, side=min(widest, 700), caption=picture.note)
    section = page.section("All images")
    vector = "class tokens" if view.pool == "cls" else f"{view.pool} vectors"
    section.chart(
        scatter,
        description="Images as dots by the first two principal components of their global features.",
        caption=f"The first two principal components of the {vector} of {len(view.vectors):,} images.",
    )
    if missing:
        page.section("Not shown").note(*missing)
    return page

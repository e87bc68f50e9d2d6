"""`clustermim tokenizer show`: the vocabulary as pictures with usage bars, and token maps over images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.render.page import Page, Section
from clustermim.render.sheets import Group, picture_sheet, png, tile_side
from clustermim.runs import RunDirectory, atomic_write
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.token_views import TokenView, legend_tiles, look_at_tokens, map_tiles, vocabulary_tiles

_ENOUGH = 5000
"""Images that are looked at unless `--limit` says otherwise: more would not change the pictures."""


@dataclass(frozen=True, kw_only=True)
class ShownTokens:
    """What was made, and how the vocabulary is used."""

    page: Path
    vocabulary: Path
    token_maps: Path
    view: TokenView = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One record a token: patches, share of all patches, images it occurs in."""
        return [dict(row) for row in self.view.rows()]

    def __rich__(self) -> Table:
        """The files, and the vocabulary in figures."""
        table = Table(show_header=False, box=None)
        for name, value in _facts(self.view).items():
            table.add_row(name, value)
        for name, path in (("vocabulary", self.vocabulary), ("token maps", self.token_maps), ("page", self.page)):
            table.add_row(name, str(path))
        return table


def show_tokenizer(
    tokenizer: Annotated[Any, Parameter()],
    *,
    data: Annotated[Any, Parameter()] = "digits",
    out: Path,
    examples: int = 12,
    most: int = 1000,
    json: Path | None = None,
    device: Device = "auto",
    options: Annotated[DataOptions | None, Parameter(name="*")] = None,
) -> ShownTokens:
    """Show a tokenizer: its vocabulary as pictures with usage bars, and token maps over images.

    Centroids of pixels are pictures themselves; for any other features a token is shown by the patches nearest to its
    centroid, for a control by patches that have it. Writes vocabulary.png, token_maps.png and tokens.html.

    Parameters
    ----------
    tokenizer
        Folder of a fitted tokenizer.
    data
        Images to look at: digits, a folder, .zip, .npz or parquet; up to 5,000 of them unless --limit says otherwise.
    out
        Folder for the pictures; must be new or empty.
    examples
        How many images get a token map.
    most
        How many tokens get a picture, the most used first.
    json
        Also write the usage of every token to this file.
    device
        cpu, cuda or mps; auto takes the best there is.
    options
        How the images are read.

    Raises
    ------
    InputError
        The tokenizer or the data cannot be used, do not fit each other, or the folder holds something else.
    """
    for name, value in (("examples", examples), ("most", most)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    loaded = load_tokenizer(tokenizer)
    options = loaded.fill_options(options or DataOptions())
    source = open_source(data, replace(options, limit=options.limit or _ENOUGH))
    loaded.check_matches(source.view)
    path = str(tokenizer) if isinstance(tokenizer, str | Path) else loaded.kind
    name = Path(path).name
    config = {"tokenizer": path, "data": source.name, "examples": examples, "most": most}
    with RunDirectory(out, "tokenizer show", config) as run:
        view = look_at_tokens(loaded, source, examples=examples, most=most, device=resolve_device(device))
        sheets = _sheets(view, name, source.name)
        for file, image in sheets.items():
            atomic_write(run.path / file, image)
        page = _page(view, name, source.name, loaded.facts.get("signatures"))
        atomic_write(run.path / "tokens.html", page.html())
        run.finish({"tokenizer": loaded.fingerprint(), "data_fingerprint": source.fingerprint()})
    shown = ShownTokens(
        page=run.path / "tokens.html",
        vocabulary=run.path / "vocabulary.png",
        token_maps=run.path / "token_maps.png",
        view=view,
    )
    if json is not None:
        atomic_write(json, dumps(shown.rows(), indent=1))
    return shown


def describe(view: TokenView) -> str:
    """A sentence on what the vocabulary's pictures and bars show."""
    some = "" if view.listed == view.vocab_size else f"the {view.listed:,} most used of {view.vocab_size:,}; "
    return (
        f"Each token is shown by {view.shows} ({some}most used first). Below it its number and its share of all "
        "patches; the bar is the square root of that share, relative to the commonest token."
    )


def _facts(view: TokenView) -> dict[str, str]:
    share = view.counts.max() / view.counts.sum()
    return {
        "tokens used": f"{view.used:,} of {view.vocab_size:,}",
        "perplexity": f"{view.perplexity:,.1f} (tokens in even use)",
        "commonest token": f"{int(view.counts.argmax())}, {100 * share:.1f} % of the patches",
        "looked at": f"{view.images:,} images, {int(view.counts.sum()):,} patches",
    }


_MAP_WIDTH = 560
"""CSS pixels: at most so wide is a map on a page; two stand side by side on a desk, and their numbers can be read."""

_MAP_NOTE = (
    "Each image, then its tokens: a patch in its token's colour with the token's number where it fits. Like tokens "
    "have like colours. Where a token's picture is one patch, the image rebuilt of these pictures follows."
)


def _sheets(view: TokenView, name: str, data: str) -> dict[str, bytes]:
    tiles = vocabulary_tiles(view, brief=view.listed > 256)
    vocabulary = picture_sheet(
        [Group(title="", tiles=tiles, side=tile_side(len(tiles)))],
        title=f"Vocabulary of {name}",
        note=f"{describe(view)} Seen on {view.images:,} images of {data}.",
    )
    seen, shown = legend_tiles(view), map_tiles(view, height=176)
    maps = picture_sheet(
        [
            Group(title="", tiles=shown, side=max(tile.picture.shape[0] for tile in shown)),
            Group(title="Tokens in these images", tiles=seen, side=min(56, tile_side(len(seen)))),
        ],
        title=f"Token maps of {name}",
        note=_MAP_NOTE,
    )
    return {"vocabulary.png": png(vocabulary), "token_maps.png": png(maps)}


def add_vocabulary(section: Section, view: TokenView, *, folded: str = "") -> None:
    """The vocabulary as a gallery on a page; behind a heading to open if `folded` gives one."""
    side = max(34, tile_side(view.listed))
    tiles = vocabulary_tiles(view, brief=view.listed > 256)
    section.gallery(tiles, side=side, caption=describe(view), folded=folded)


def add_maps(section: Section, view: TokenView) -> None:
    """Token maps as a gallery on a page, without the legend."""
    tiles = map_tiles(view)
    width = max(tile.picture.shape[1] for tile in tiles)
    section.gallery(tiles, side=min(width, _MAP_WIDTH), caption=_MAP_NOTE)


def _page(view: TokenView, name: str, data: str, signatures: Sequence[Mapping[str, Any]] | None) -> Page:
    page = Page(
        f"Tokens of {name}",
        lead=[f"{view.used:,} of {view.vocab_size:,} tokens are in use on {view.images:,} images of {data}."],
    )
    figures = page.section("In figures")
    figures.facts(_facts(view))
    if signatures:
        figures.note(*(f"**{found['name'].capitalize()}.** {found['says']}" for found in signatures))
    elif signatures is not None:
        figures.paragraph("The fit showed none of the known signs of failure.")
    add_vocabulary(page.section("Vocabulary"), view)
    section = page.section("Token maps")
    add_maps(section, view)
    seen = legend_tiles(view)
    section.gallery(seen, side=max(48, min(72, tile_side(len(seen)))), caption="The tokens in these images, by number.")
    return page

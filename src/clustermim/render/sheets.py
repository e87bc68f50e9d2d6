"""Picture sheets: a vocabulary as pictures with usage bars, token maps over images, and their legend.

A `Tile` is a picture with a caption and a bar. Tiles are made here and laid out twice: as a PNG by `picture_sheet`, as
HTML that wraps to the width of a phone by `page.Section.gallery`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from clustermim.render.palette import THEME

_GAP = 10
_BETWEEN = (92, 128, 172)
"""Colour of the lines between pictures: bluish, so that grey pictures are not taken to go on in them."""
_MARGIN = 28


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture with what is written under it."""

    picture: UInt8[np.ndarray, "h w 3"]
    """As it is; small pictures are enlarged in whole pixels when shown."""
    caption: str = ""
    """Short: a token's id, a digit's class."""
    bar: float | None = None
    """Length of the bar under the picture in [0, 1]; None draws none."""
    colour: tuple[int, int, int] | None = None
    """Frames the picture; the colour that a token has in the maps."""
    description: str = ""
    """What a reader who does not see the picture is told; the caption if empty."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tiles under one heading, all shown at one height."""

    title: str
    tiles: Sequence[Tile]
    side: int
    """Height of a picture on the sheet, in pixels."""


def to_rgb(image: Float[np.ndarray, "c h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image of 1..n channels in [0, 1] as a picture: grey, two channels as red and cyan, else the first three."""
    channels = image.shape[0]
    chosen = {1: [0, 0, 0], 2: [0, 1, 1]}.get(channels, [0, 1, 2])
    picture: UInt8[np.ndarray, "h w 3"] = np.round(np.clip(image[chosen], 0.0, 1.0) * 255).astype(np.uint8)
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def enlarge(picture: UInt8[np.ndarray, "h w 3"], height: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture at about `height` pixels: whole-pixel enlargement if it is smaller, area averaging if larger."""
    rows, columns = picture.shape[:2]
    if rows <= height:
        factor = max(1, height // rows)
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (max(1, round(columns * height / rows)), height)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def mosaic(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int, gap: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of one size side by side in rows of `columns`, row-major, with lines of `gap` pixels between them."""
    rows, columns = -(-len(pictures) // columns), min(columns, len(pictures))
    height, width = pictures[0].shape[:2]
    canvas = np.empty((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), dtype=np.uint8)
    canvas[:] = _BETWEEN
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def similarity_order(pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Int64[np.ndarray, " k"]:
    """Rank of each token picture along the direction in which the pictures differ most (first principal axis)."""
    flat = np.stack([np.asarray(picture, dtype=np.float64).ravel() for picture in pictures])
    flat -= flat.mean(axis=0)
    axis = np.linalg.svd(flat, full_matrices=False)[2][0]
    # The sign of a principal axis is arbitrary: dark comes first.
    score = flat @ (axis if axis.sum() >= 0 else -axis)
    rank = np.empty(len(pictures), dtype=np.int64)
    rank[np.argsort(score, kind="stable")] = np.arange(len(pictures))
    return rank


def token_map(
    image: UInt8[np.ndarray, "H W 3"],
    ids: Int64[np.ndarray, "rows columns"],
    colours: UInt8[np.ndarray, "k 3"],
    *,
    cell: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The tokens of one image: every patch in its token's colour over a shadow of the image, with its id if it fits.

    Parameters
    ----------
    image
        The image as a picture.
    ids
        Token of each patch.
    colours
        Colour of each token, (K, 3).
    cell
        Side of a patch in the map, in pixels; ids are written from `number_cell` pixels on.

    Returns
    -------
    array
        (rows · cell, columns · cell, 3). The frame of each cell is the token's pure colour.
    """
    rows, columns = ids.shape
    size = (columns * cell, rows * cell)
    flat = colours[ids].repeat(cell, axis=0).repeat(cell, axis=1).astype(np.float64)
    under = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.NEAREST), dtype=np.float64)
    # The shadow keeps hue and only scales brightness, so that the legend's colour stays recognisable.
    mixed = flat * (0.7 + 0.3 * under[..., None] / 255)
    edge = np.zeros((cell, cell), dtype=bool)
    edge[[0, -1], :] = edge[:, [0, -1]] = True
    mixed = np.where(np.tile(edge, (rows, columns))[..., None], flat, mixed)
    canvas = Image.fromarray(np.round(mixed).astype(np.uint8))
    digits = len(str(int(ids.max())))
    if cell >= number_cell(digits):
        draw, font = ImageDraw.Draw(canvas), _font(min(cell // 2, int(cell * 1.35 / max(digits, 2))))
        for row, column in np.ndindex(rows, columns):
            centre = (column * cell + cell / 2, row * cell + cell / 2)
            draw.text(centre, str(int(ids[row, column])), fill=(0, 0, 0), font=font, anchor="mm")
    return np.asarray(canvas)


def number_cell(digits: int) -> int:
    """Side in pixels from which on a cell of a token map bears a number of so many digits."""
    return 10 + 5 * digits


def rebuilt(
    ids: Int64[np.ndarray, "rows columns"], pictures: Mapping[int, UInt8[np.ndarray, "p q 3"]]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image as its tokens see it: every patch replaced by its token's picture."""
    bands = [np.concatenate([pictures[token] for token in row], axis=1) for row in ids.tolist()]
    return np.concatenate(bands, axis=0)


def side_by_side(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], height: int, gap: int = 4
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures scaled to one height, in a row, with lines of `gap` pixels between them."""
    scaled = [
        np.asarray(Image.fromarray(p).resize((round(p.shape[1] * height / p.shape[0]), height), _resampling(p, height)))
        for p in pictures
    ]
    bar = np.empty((height, gap, 3), dtype=np.uint8)
    bar[:] = _BETWEEN
    return np.concatenate([part for picture in scaled for part in (bar, picture)][1:], axis=1)


def _resampling(picture: UInt8[np.ndarray, "h w 3"], height: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if picture.shape[0] <= height else Image.Resampling.BOX


def tile_side(count: int) -> int:
    """A height in pixels at which `count` token pictures fill one sheet and can still be told apart."""
    return next(side for most, side in ((16, 96), (64, 75), (256, 51), (576, 36), (10**9, 26)) if count <= most)


def sheet_width(tiles: Sequence[Tile], most: int = 1400, least: int = 720) -> int:
    """Width in pixels of a sheet that whole rows of tiles of their own size fill, with no room left on the right."""
    step = max(int(tile.picture.shape[1]) for tile in tiles) + _GAP
    columns = max(1, min(len(tiles), (most - 2 * _MARGIN + _GAP) // step))
    return max(least, 2 * _MARGIN + columns * step - _GAP)


def picture_sheet(
    groups: Sequence[Group], *, title: str, note: str = "", width: int = 1400, dark: bool = False
) -> Image.Image:
    """Groups of tiles on one sheet, wrapped to its width.

    Parameters
    ----------
    groups
        What to show; each tile is drawn once, in order.
    title, note
        Written at the top; the note is wrapped.
    width
        Of the sheet, in pixels; its height follows.
    dark
        Light text on a dark ground.

    Returns
    -------
    Image
        RGB.
    """
    ink, soft, rule, paper, bar = (
        THEME[name][1 if dark else 0] for name in ("ink", "soft", "rule", "paper", "series-1")
    )
    inner = width - 2 * _MARGIN
    heading, text = _font(26), _font(15)
    lines = _wrap(note, text, inner)
    placed: list[tuple[int, int, Tile, UInt8[np.ndarray, "h w 3"], int]] = []
    titles: list[tuple[int, str]] = []
    y = _MARGIN + 40 + 22 * len(lines) + 8
    for group in groups:
        if group.title:
            titles.append((y, group.title))
            y += 32
        size = _caption_size(group.side)
        x, line = _MARGIN, 0
        pictures = [enlarge(tile.picture, group.side) for tile in group.tiles]
        captions = [round(_font(size).getlength(tile.caption)) + 2 for tile in group.tiles]
        box = max([picture.shape[1] for picture in pictures] + captions)
        for tile, picture in zip(group.tiles, pictures, strict=True):
            if x > _MARGIN and x + box > width - _MARGIN:
                x, y, line = _MARGIN, y + line + _GAP, 0
            placed.append((x, y, tile, picture, size))
            line = max(line, picture.shape[0] + 8 + (size + 4 if tile.caption else 0))
            x += box + _GAP + (4 if tile.colour else 0)
        y += line + 26
    sheet = Image.new("RGB", (width, y - 26 + _MARGIN), paper)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=ink, font=heading)
    for i, line_text in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 40 + 22 * i), line_text, fill=soft, font=text)
    for top, words in titles:
        draw.text((_MARGIN, top), words, fill=ink, font=_font(18))
    for left, top, tile, picture, size in placed:
        high, wide = picture.shape[:2]
        draw.rectangle((left - 1, top - 1, left + wide, top + high), outline=rule)
        if tile.colour is not None:
            draw.rectangle((left - 3, top - 3, left + wide + 2, top + high + 2), outline=tile.colour, width=3)
        sheet.paste(Image.fromarray(picture), (left, top))
        if tile.bar is not None:
            draw.rectangle((left, top + high + 3, left + wide - 1, top + high + 5), fill=rule)
            if tile.bar > 0:
                draw.rectangle(
                    (left, top + high + 3, left + max(1, round(wide * tile.bar)) - 1, top + high + 5), fill=bar
                )
        draw.text((left, top + high + 7), tile.caption, fill=soft, font=_font(size))
    return sheet


def png(picture: UInt8[np.ndarray, "h w 3"] | Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _caption_size(side: int) -> int:
    return 14 if side >= 64 else 12 if side >= 40 else 10


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font, so a sheet looks the same on every machine.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

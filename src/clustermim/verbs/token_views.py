"""What the tokens of a tokenizer look like on data: pictures of the vocabulary, usage, and maps over images.

Shared by the verbs that show tokens; the pictures themselves are made in `render`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from clustermim.data.counted import uniform
from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource
from clustermim.data.views import eval_view
from clustermim.features.pixel import PixelFeatures
from clustermim.render.palette import token_colours
from clustermim.render.sheets import (
    Tile,
    enlarge,
    mosaic,
    number_cell,
    rebuilt,
    side_by_side,
    similarity_order,
    tile_side,
    to_rgb,
    token_map,
)
from clustermim.tokenizers.tokenizer import Tokenizer

_GAP = 3
"""Pixels between the patches that share a picture."""

_GREY = 160
"""Of tokens without a colour of their own."""

_MOST_HIGH = 448
"""Pixels that a token map may be high so that its numbers can be read."""


@dataclass(frozen=True, kw_only=True)
class MappedImage:
    """One image and its tokens."""

    picture: UInt8[np.ndarray, "h w 3"]
    ids: Int64[np.ndarray, "rows columns"]
    name: str
    """Its class, or its number where there is none."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """A vocabulary as it is used on data. Tokens are ranked: the most used first, those never used last."""

    vocab_size: int
    shows: str
    """What a token's picture is: its centroid, the patches nearest to it, or patches that have it."""
    tokens: Int64[np.ndarray, " shown"]
    """Ids of the tokens that have a picture, by falling use: all of them, or of a very large vocabulary the most used
    and those that occur in the maps."""
    listed: int
    """How many of `tokens`, from the first, are the most used; the others are there for the maps."""
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]] = field(repr=False)
    """One for each of `tokens`; never-used ones of the kind that shows patches are grey."""
    typical: Sequence[UInt8[np.ndarray, "_ _ 3"]] = field(repr=False)
    """The same reduced to one patch each, by whose likeness tokens are coloured."""
    counts: Int64[np.ndarray, " k"] = field(repr=False)
    """Patches that have each token, in order of id."""
    images_with: Int64[np.ndarray, " k"] = field(repr=False)
    """Images in which each token occurs."""
    images: int
    """Images that were looked at."""
    maps: Sequence[MappedImage] = field(repr=False)

    @property
    def used(self) -> int:
        """Tokens that occur."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """Tokens in even use: exp of the entropy of the token marginal."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def colours(self) -> dict[int, tuple[int, int, int]]:
        """Token -> its colour; tokens of like pictures get like colours."""
        return dict(self._colours)

    def palette(self) -> UInt8[np.ndarray, "k 3"]:
        """The same as a table, in order of id; tokens without a picture are grey."""
        table = np.full((self.vocab_size, 3), _GREY, dtype=np.uint8)
        for token, colour in self._colours.items():
            table[token] = colour
        return table

    @cached_property
    def _colours(self) -> dict[int, tuple[int, int, int]]:
        palette = token_colours(similarity_order(self.typical))
        return {int(token): (int(r), int(g), int(b)) for token, (r, g, b) in zip(self.tokens, palette, strict=True)}

    def rows(self) -> list[dict[str, float | int]]:
        """One record a token, in order of id."""
        total = int(self.counts.sum())
        return [
            {"token": token, "patches": int(n), "share": int(n) / total, "images": int(with_it)}
            for token, (n, with_it) in enumerate(zip(self.counts, self.images_with, strict=True))
        ]


def look_at_tokens(
    tokenizer: Tokenizer, source: ImageSource, *, examples: int = 12, most: int = 1000, device: str = "cpu"
) -> TokenView:
    """Tokenize the images of a source (eval view) and gather what there is to see.

    Parameters
    ----------
    tokenizer
        Any kind.
    source
        Images; all of them are looked at.
    examples
        How many images get a token map.
    most
        How many tokens get a picture, the most used first.
    device
        Where to compute.

    Raises
    ------
    InputError
        The tokenizer does not fit the images, or needs labels that they lack.
    """
    tokenizer.check_matches(source.view)
    tokenizer = tokenizer.to(device).eval()
    k = tokenizer.vocab_size
    wanted = 4 if min(k, most) <= 256 else 1
    centroids, decoded = _centroid_pictures(tokenizer), tokenizer.code_pictures() is not None
    nearest = None if centroids is not None else _Nearest(wanted)
    window = _window(tokenizer)
    # Of a very large vocabulary only the tokens that are shown keep patches; which they are is known after one pass.
    counts, images_with = _look_through(tokenizer, source, device, nearest if k <= most else None, window)
    maps = _map_images(tokenizer, source, examples, device)
    ranked = np.argsort(-counts, kind="stable")
    mapped = np.zeros(k, dtype=bool)
    mapped[np.concatenate([image.ids.ravel() for image in maps])] = True
    tokens = np.concatenate([ranked[:most], ranked[most:][mapped[ranked[most:]]]])
    if nearest is None:
        assert centroids is not None
        shows = "what it decodes to" if decoded else "its centroid"
        pictures = typical = [centroids[token] for token in tokens]
    else:
        if k > most:
            shown = np.zeros(k, dtype=bool)
            shown[tokens] = True
            _look_through(tokenizer, source, device, nearest, window, shown)
        shows = f"{wanted} patches" if wanted > 1 else "the patch"
        shows += " nearest to its centroid" if tokenizer.codebook is not None else " drawn from those that have it"
        shows += ", with their surroundings" if window > tokenizer.patch_size else ""
        pictures, typical = nearest.pictures(tokens, window)
    return TokenView(
        vocab_size=k,
        shows=shows,
        tokens=tokens,
        listed=min(k, most),
        pictures=pictures,
        typical=typical,
        counts=counts,
        images_with=images_with,
        images=len(source),
        maps=maps,
    )


def _look_through(
    tokenizer: Tokenizer,
    source: ImageSource,
    device: str,
    nearest: "_Nearest | None",
    window: int,
    only: Bool[np.ndarray, " k"] | None = None,
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """One pass: patches and images that have each token; and the patches nearest to (`only` some) tokens, if asked."""
    k = tokenizer.vocab_size
    counts, images_with = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
    for batch in make_loader(source, batch_size=64, train=False, device=device).epoch():
        ids = tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
        flat = ids.reshape(-1).cpu().numpy()
        counts += np.bincount(flat, minlength=k)
        pairs = torch.unique(batch.index[:, None] * k + ids).cpu().numpy()
        images_with += np.bincount(pairs % k, minlength=k)
        if nearest is not None:
            distance = _distance_to_own_centroid(tokenizer, batch.images, ids)
            if distance is None:
                distance = uniform(0, batch.index[:, None], torch.arange(ids.shape[1], device=ids.device)).reshape(-1)
            where = np.arange(len(flat)) if only is None else np.flatnonzero(only[flat])
            cut = _Windows(batch.images, tokenizer.patch_size, window)
            nearest.update(flat[where], distance.cpu().numpy()[where], cut, where)
    return counts, images_with


class _Windows:
    """The patches of a batch with `window` pixels a side around their centres, cut only where asked for.

    Parameters
    ----------
    images
        (B, C, H, W); beyond their edge the nearest pixel is repeated.
    side, window
        Of a patch and of the window, in pixels.
    """

    def __init__(self, images: Float[Tensor, "b c h w"], side: int, window: int) -> None:
        margin = (window - side) // 2
        padded = torch.nn.functional.pad(images, (margin,) * 4, mode="replicate")
        self._cut = padded.unfold(2, window, side).unfold(3, window, side)

    def __getitem__(self, which: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n c window window"]:
        """Windows of patches, counted over the batch in row-major order."""
        rows, columns = self._cut.shape[2:4]
        image, place = np.divmod(which, rows * columns)
        row, column = np.divmod(place, columns)
        found: Float[np.ndarray, "n c window window"] = self._cut[image, :, row, column].cpu().numpy()
        return found


class _Nearest:
    """The few patches of least distance of each token, kept while patches stream by."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.ids = np.zeros(0, dtype=np.int64)
        self.distance = np.zeros(0, dtype=np.float32)
        self.patches: np.ndarray | None = None

    def update(
        self,
        ids: Int64[np.ndarray, " n"],
        distance: Float[np.ndarray, " n"],
        patches: _Windows,
        where: Int64[np.ndarray, " n"],
    ) -> None:
        """Take in some patches of a batch, those at `where`."""
        known = len(self.ids)
        ids, distance = np.concatenate([self.ids, ids]), np.concatenate([self.distance, distance])
        order = np.lexsort((distance, ids))
        starts = np.searchsorted(ids[order], ids[order], side="left")
        kept = np.sort(order[np.arange(len(order)) - starts < self.wanted])
        cut = patches[where[kept[kept >= known] - known]]
        self.patches = cut if self.patches is None else np.concatenate([self.patches[kept[kept < known]], cut])
        self.ids, self.distance = ids[kept], distance[kept]

    def pictures(
        self, tokens: Int64[np.ndarray, " k"], window: int
    ) -> tuple[list[UInt8[np.ndarray, "h w 3"]], list[UInt8[np.ndarray, "window window 3"]]]:
        """For each token, its patches in a square, the nearest first, grey where there is none; and their mean."""
        assert self.patches is not None
        order = np.lexsort((self.distance, self.ids))
        ids, columns = self.ids[order], round(self.wanted**0.5)
        # Together as large as the sheet shows them, so that no patch is scaled twice.
        most = (tile_side(len(tokens)) - _GAP * (columns - 1)) // columns
        size = window if self.wanted == 1 else max(window, most // window * window)
        blank = np.full((size, size, 3), 128, np.uint8)
        pictures, typical = [], []
        for token in tokens:
            start, stop = np.searchsorted(ids, [token, token + 1])
            patches = self.patches[order[start:stop]]
            found = [enlarge(to_rgb(patch), size) for patch in patches]
            pictures.append(mosaic([*found, *[blank] * (self.wanted - len(found))], columns, gap=_GAP))
            typical.append(to_rgb(patches.mean(0)) if len(patches) else blank[:window, :window])
        return pictures, typical


def _window(tokenizer: Tokenizer) -> int:
    """Side of what is shown: what the features see; twice the patch where a network sees the whole image."""
    if isinstance(tokenizer.features, PixelFeatures):
        return tokenizer.features.window
    return tokenizer.patch_size + (0 if tokenizer.features is None else 2 * (tokenizer.patch_size // 2))


def _centroid_pictures(tokenizer: Tokenizer) -> list[UInt8[np.ndarray, "h w 3"]] | None:
    """What each token stands for, where that is pixels; None for any other features and for the controls."""
    decoded = tokenizer.code_pictures()
    if decoded is not None:
        return [to_rgb(picture.cpu().numpy()) for picture in decoded]
    features, codebook = tokenizer.features, tokenizer.codebook
    if codebook is None or codebook.metric != "l2" or not isinstance(features, PixelFeatures):
        return None
    if features.standardise or features.window != features.patch_size:
        return None
    return [to_rgb(picture.cpu().numpy()) for picture in features.to_pixels(codebook.centroids)]


@torch.no_grad()
def _distance_to_own_centroid(
    tokenizer: Tokenizer, images: Float[Tensor, "b c h w"], ids: Int64[Tensor, "b n"]
) -> Float[Tensor, " patches"] | None:
    """How far each patch is from the centroid of its token, by the codebook's metric up to a constant."""
    if tokenizer.codebook is None or tokenizer.features is None:
        return None
    described: Tensor = tokenizer.features(images).flatten(0, 1).float()
    own: Tensor = tokenizer.codebook.centroids[ids.flatten()]
    if tokenizer.codebook.metric == "l2":
        distance = (described - own).square().sum(1)
    elif tokenizer.codebook.metric == "cosine":
        distance = 1 - torch.cosine_similarity(described, own, dim=1)
    else:
        distance = -(described * own).sum(1)
    return distance


def _map_images(tokenizer: Tokenizer, source: ImageSource, examples: int, device: str) -> list[MappedImage]:
    """Token maps of a few images: the classes in turn where there are any, else spread evenly."""
    labels = source.labels
    if labels is None:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(np.int64))
    else:
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], labels[order], side="left")
        turn = np.arange(len(order)) - starts
        chosen = order[np.argsort(turn, kind="stable")][:examples]
    maps = []
    for i in chosen.tolist():
        image, label = source[i]
        view = eval_view(image, source.view)
        where = torch.tensor([i], device=device)
        classes = None if label is None else torch.tensor([label], device=device)
        ids = tokenizer.encode(view[None].to(device), index=where, labels=classes)[0]
        grid = (view.shape[1] // tokenizer.patch_size, view.shape[2] // tokenizer.patch_size)
        name = f"image {i}" if label is None or source.classes is None else _class_name(source.classes[label])
        maps.append(MappedImage(picture=to_rgb(view.numpy()), ids=ids.reshape(grid).cpu().numpy(), name=name))
    return maps


def _class_name(name: str) -> str:
    return f"class {name}" if name.isdigit() else name


def vocabulary_tiles(view: TokenView, *, only: Sequence[int] | None = None, brief: bool = False) -> list[Tile]:
    """One tile a token: picture, id, share, and a bar whose length is the square root of the relative share.

    Parameters
    ----------
    view
        What to show.
    only
        Ids to leave in; None for the most used.
    brief
        Leave the share out of the caption, and the frame in the token's colour: so small, it would drown the picture.
    """
    colours, total, top = view.colours(), view.counts.sum(), view.counts.max()
    tiles = []
    wanted = set(view.tokens[: view.listed].tolist() if only is None else only)
    for token, picture in zip(view.tokens.tolist(), view.pictures, strict=True):
        if token not in wanted:
            continue
        share = view.counts[token] / total
        said = f"{token} · {_percent(share)}" if view.counts[token] else f"{token} · unused"
        tiles.append(
            Tile(
                picture=picture,
                caption=str(token) if brief else said,
                bar=float(np.sqrt(view.counts[token] / top)),
                colour=None if brief else colours[token],
                description=f"Token {said.replace(' · ', ', ')}",
            )
        )
    return tiles


def _percent(share: float) -> str:
    number = f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def map_tiles(view: TokenView, *, height: int = 160) -> list[Tile]:
    """One tile an image: itself, its tokens, and itself rebuilt of token pictures where those are single patches."""
    colours = view.palette()
    side = view.maps[0].picture.shape[0] // view.maps[0].ids.shape[0] if view.maps else 0
    single = {int(t): p for t, p in zip(view.tokens, view.pictures, strict=True) if p.shape[:2] == (side, side)}
    tiles = []
    digits = max((len(str(int(mapped.ids.max()))) for mapped in view.maps), default=1)
    for mapped in view.maps:
        rows = mapped.ids.shape[0]
        # Large enough for the numbers, by which a token is found in the legend, unless the grid is very fine.
        cell = max(2, height // rows, min(number_cell(digits), _MOST_HIGH // rows))
        parts = [mapped.picture, token_map(mapped.picture, mapped.ids, colours, cell=cell)]
        if all(token in single for token in np.unique(mapped.ids).tolist()):
            parts.append(rebuilt(mapped.ids, single))
        tiles.append(
            Tile(
                picture=side_by_side(parts, cell * mapped.ids.shape[0]),
                caption=mapped.name,
                description=f"{mapped.name}: the image, and a map of its tokens",
            )
        )
    return tiles


def legend_tiles(view: TokenView) -> list[Tile]:
    """One tile for each token in the maps, by number: so it is found from the number in a map."""
    tiles = vocabulary_tiles(view, only=legend(view))
    return sorted(tiles, key=lambda tile: int(tile.caption.split()[0]))


def legend(view: TokenView) -> list[int]:
    """Ids of the tokens that occur in the maps, ascending."""
    return sorted({token for mapped in view.maps for token in np.unique(mapped.ids).tolist()})

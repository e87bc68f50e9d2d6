"""The floor that tokens alone reach: an image as the histogram of its tokens, with no network at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.encoders.opening import OPENERS, Kind, open_encoder
from clustermim.errors import InputError
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer


class BagOfTokens(Encoder):
    """Token frequencies over a 2 × 2 grid of the image, square-rooted: 4·K numbers.

    What K-means alone gives, after Coates and Ng, "Learning feature representations with K-means", 2012 (they sum
    activations over the same quadrants); the square root turns Euclidean distances into those of Hellinger.

    Parameters
    ----------
    tokenizer
        One that needs nothing but the images.
    name
        What tables call it.
    image_size
        (height, width) of the images; the tokenizer's patches must tile them.

    Raises
    ------
    InputError
        A control that needs the image's number or label, which would be cheating.
    """

    global_name = "bag"

    def __init__(self, tokenizer: Tokenizer, name: str, *, image_size: tuple[int, int]) -> None:
        if tokenizer.requires:
            needs = " and ".join(sorted(tokenizer.requires))
            raise InputError(
                f"{name}: tokens of kind {tokenizer.kind!r} depend on each image's {needs}, "
                f"so a bag of them says nothing about images. Use a tokenizer that sees only pixels."
            )
        super().__init__(name, image_size=image_size, channels=tokenizer.channels)
        self.tokenizer = tokenizer.eval()
        patch = tokenizer.patch_size
        self.grid = (image_size[0] // patch, image_size[1] // patch)

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """(B, 4·K): square roots of the token frequencies in each quadrant."""
        bag = bag_of_tokens(self.tokenizer.encode(images), self.grid, self.tokenizer.vocab_size)
        return [EncoderOutput(cls=bag, patches=None) for _ in which]


def bag_of_tokens(ids: Int64[Tensor, "b n"], grid: tuple[int, int], vocab_size: int) -> Float[Tensor, "b four_k"]:
    """Square roots of token frequencies in the four quadrants of the patch grid.

    Parameters
    ----------
    ids
        Tokens in row-major order.
    grid
        Patches down, patches across.
    vocab_size
        K; ids lie in [0, K).

    Returns
    -------
    Tensor
        (B, 4·K), quadrants in row-major order; each quadrant has unit length, or is 0 where the grid leaves it empty.
    """
    rows = torch.arange(grid[0], device=ids.device) * 2 // grid[0]
    columns = torch.arange(grid[1], device=ids.device) * 2 // grid[1]
    quadrant = (2 * rows[:, None] + columns).flatten()
    counts = torch.zeros(len(ids), 4 * vocab_size, device=ids.device)
    counts.scatter_add_(1, quadrant * vocab_size + ids, torch.ones_like(ids, dtype=counts.dtype))
    patches = torch.bincount(quadrant, minlength=4).clamp(min=1).repeat_interleave(vocab_size)
    return (counts / patches).sqrt()


def open_bag_of_tokens(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> BagOfTokens:
    """`bag-of-tokens:<tokenizer>`: see `BagOfTokens`.

    Raises
    ------
    InputError
        No such tokenizer, one that does not match the images, or no view to take their size from.
    """
    if view is None:
        raise InputError(f"{spec} is made to the measure of the images: pass `view`, for example `source.view`.")
    tokenizer = load_tokenizer(rest)
    tokenizer.check_matches(view)
    return BagOfTokens(tokenizer, spec, image_size=view.image_size)


KINDS: dict[str, Kind] = {**OPENERS, "bag-of-tokens": Kind(open_bag_of_tokens)}


def open_any(spec: str | Path | nn.Module, view: ViewConfig | None = None) -> Encoder:
    """Whatever can be judged: everything that `open_encoder` knows, and `bag-of-tokens:<tokenizer>`.

    Parameters
    ----------
    spec
        As for `open_encoder`; a `Tokenizer` is taken as the bag of its tokens.
    view
        Size, channels and statistics of the images.

    Raises
    ------
    InputError
        As `open_encoder`.
    """
    if isinstance(spec, Tokenizer):
        if view is None:
            raise InputError("A bag of tokens is made to the measure of the images: pass `view`.")
        spec.check_matches(view)
        return BagOfTokens(spec, f"bag-of-tokens:{spec.kind}", image_size=view.image_size)
    return open_encoder(spec, view=view, kinds=KINDS)

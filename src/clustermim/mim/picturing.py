"""Pictures of what a model in training predicts: of the same few images under the same masks, every few epochs."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.data.masks import block_masks, random_masks
from clustermim.data.sources import ImageSource, open_source
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.data.views import eval_view
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.predicting import Prediction, predict_features, predict_pixels, predict_tokens
from clustermim.mim.prediction_sheet import HEIGHT, Colours, prediction_sheet
from clustermim.mim.pretraining import PretrainConfig
from clustermim.mim.targets import FeatureTarget, PixelTarget, Target, TokenTarget
from clustermim.mim.watching import Moment, Sight
from clustermim.render.sheets import Group, picture_sheet, png, sheet_width
from clustermim.runs import atomic_write

PICTURES = "pictures"
"""Name of the look, and of the folder in the run directory."""

SHOWN = 8
"""Images on a sheet."""


@dataclass(frozen=True, kw_only=True)
class FewImages:
    """Some images of a source, as a model sees them."""

    views: Float[Tensor, "n c h w"]
    """Eval views in [0, 1]."""
    index: Int64[Tensor, " n"]
    """Their numbers, which masks are drawn by."""
    held_out: bool
    """Whether they are no training images."""


def few_images(source: AnySource, count: int, *, held_out: bool = False) -> FewImages:
    """Images spread evenly over a source, or from the fronts of the shards of a stream.

    Parameters
    ----------
    source
        What is trained on.
    count
        How many at most.
    held_out
        Take images of the split that is held out from training, where there is one; their labels are not looked at.

    Raises
    ------
    InputError, ResourceError
        They cannot be read.
    """
    view = source.view
    if isinstance(source, StreamSource):
        part = source.spread(count)
        decoded = [part.decoded(number, sample) for number, sample in part.read(range(min(count, len(part))))]
        views = [eval_view(found.pixels, view) for found in decoded]
        index, other = [found.number for found in decoded], None
    else:
        other = _held_out(source) if held_out else None
        source = source if other is None else other
        index = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64)).tolist()
        views = [eval_view(source[place][0], view) for place in index]
    return FewImages(views=torch.stack(views), index=torch.tensor(index), held_out=other is not None)


def _held_out(source: ImageSource) -> ImageSource | None:
    """The test split of a source that gives its training split, where it has one."""
    if source.split != "train":
        return None
    try:
        return open_source(source, split="test")
    except InputError:  # without labels and without a test folder nothing is held out
        return None


def check_pictures(target: Target) -> None:
    """Refuse targets that cannot be shown.

    Raises
    ------
    InputError
        For --picture-every.
    """
    if isinstance(target, TokenTarget) and target.tokenizer.requires:
        raise InputError(
            f"--picture-every cannot show tokens of kind {target.tokenizer.kind!r}, which follow from no picture: "
            "leave it out."
        )
    if not isinstance(target, TokenTarget | PixelTarget | FeatureTarget):
        raise InputError(f"--picture-every cannot show what a {type(target).__name__} predicts: leave it out.")


class PictureLook:
    """A sheet of predictions, as a PNG file and for the loggers.

    Parameters
    ----------
    twin
        A model like the one in training; kept on the CPU between looks.
    target
        What it predicts; on `device` when looked at.
    images
        Which images are shown.
    config
        Of the training, for its masks.
    folder
        Where the files go: `epoch-0010.png` and so on.
    device
        Where to compute.
    colours
        (K, 3) colour of each token, for a target of tokens.
    """

    name = PICTURES

    def __init__(
        self,
        twin: MaskedModel,
        target: Target,
        images: FewImages,
        config: PretrainConfig,
        folder: Path,
        device: torch.device,
        colours: Colours | None = None,
    ) -> None:
        self.twin, self.target, self.images, self.config = twin, target, images, config
        self.folder, self.device, self.colours = folder, device, colours

    def __call__(self, moment: Moment) -> Sight:
        """See `Look`."""
        self.twin.load_state_dict(moment.model)
        twin = self.twin.to(self.device).eval()
        try:
            shown = self._predict(twin)
        finally:
            twin.to("cpu")
        sheet = prediction_sheet(
            shown,
            [f"image {place}" for place in self.images.index.tolist()],
            mask_ratio=self.config.mask_ratio,
            norm_pix=isinstance(self.target, PixelTarget) and self.target.norm_pix,
            colours=self.colours,
        )
        whose = "held out: none of them is trained on" if self.images.held_out else "training images"
        picture = picture_sheet(
            [Group(title="", tiles=sheet.tiles, side=HEIGHT)],
            title=f"{sheet.title} after epoch {moment.epoch:.4g}",
            note=f"{sheet.note} The images are {whose}.",
            width=sheet_width(sheet.tiles),
        )
        file = self.folder / f"epoch-{math.ceil(moment.epoch):04d}.png"
        atomic_write(file, png(picture))
        return Sight(told=f"{sheet.title.lower()} are in {file}.", picture=np.asarray(picture))

    def masks(self) -> Bool[Tensor, "n patches"]:
        """What is hidden of each image: the same every time."""
        config, index, grid = self.config, self.images.index, self.twin.grid
        if config.mask_kind == "block":
            return block_masks(config.seed, 0, index, grid, config.mask_ratio)
        return random_masks(config.seed, 0, index, grid[0] * grid[1], config.mask_ratio)

    def _predict(self, twin: MaskedModel) -> list[Prediction]:
        images, mask, target = self.images.views.to(self.device), self.masks().to(self.device), self.target
        if isinstance(target, TokenTarget):
            return predict_tokens(twin, target.tokenizer, images, mask)
        if isinstance(target, FeatureTarget):
            return predict_features(twin, target.features, images, mask, standardise=target.standardise)
        assert isinstance(target, PixelTarget)  # check_pictures
        mean, std = target.mean.tolist(), target.std.tolist()
        return predict_pixels(twin, images, mask, mean=mean, std=std, norm_pix=target.norm_pix)

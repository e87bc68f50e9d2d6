"""What a user may ask of those who watch a training, and what they need: opened and checked before work starts."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import UInt8

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.data.streaming.source import AnySource
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.picturing import PICTURES, SHOWN, FewImages, PictureLook, check_pictures, few_images
from clustermim.mim.pretraining import PretrainConfig
from clustermim.mim.probing import PROBE, PROBE_IMAGES, KNNProbe, ProbeLook, open_probe
from clustermim.mim.targets import Target, TokenTarget
from clustermim.mim.watching import Look
from clustermim.training.loggers import LogTo, check_loggers
from clustermim.verbs.token_views import look_at_tokens

_FEWEST = 10
_COLOURED_BY = 64
"""Images by which tokens are told to look alike."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How a training is watched. None of it changes the training, and all of it may change from one `--resume` to the
    next.
    """

    log: Annotated[tuple[LogTo, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = ()
    """Where rows of metrics go beside metrics.jsonl: `tensorboard` (event files in OUT/tensorboard), `wandb` (Weights &
    Biases; `WANDB_PROJECT` and `WANDB_MODE=offline` count), or both. Each is an extra of its own: pip install
    'clustermim[tensorboard]'."""

    picture_every: int | None = None
    """Epochs between two sheets of pictures, OUT/pictures/epoch-0010.png and so on; the last is at the end. Of a few
    images that are always the same (held out where a split is): hidden patches as predicted, and the truth."""

    probe_every: int | None = None
    """Epochs between two k-NN probes of the encoder (of its running mean where there is one), on labelled training
    images; the last is at the end. Figures go into metrics.jsonl as `knn_cls` and `knn_mean`."""

    probe_data: Annotated[Any, Parameter()] = None
    """Labelled images for the probe, where those of --data have no labels. Its test split is left alone too."""

    probe_images: int | None = None
    """Images of the probe at most: four fifths of them to compare with, one fifth to name. Default: 5,000."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_loggers(self.log)
        for name in ("picture_every", "probe_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is a number of epochs: at least 1.")
        if self.probe_images is not None and self.probe_images < _FEWEST:
            raise InputError(f"--probe-images {self.probe_images} are too few: at least {_FEWEST}.")
        for name in ("probe_data", "probe_images"):
            if getattr(self, name) is not None and self.probe_every is None:
                raise InputError(f"--{name.replace('_', '-')} needs --probe-every N: after how many epochs to probe.")


VOLATILE = tuple(WatchOptions.__dataclass_fields__)
"""Keys of a run's `config.yaml` that may differ between a run and its resumption."""


@dataclass(frozen=True, kw_only=True)
class WatchPlan:
    """The options, and what they ask for, open."""

    options: WatchOptions
    source: AnySource
    """What is trained on."""
    target: Target
    """What is predicted."""
    pictures: FewImages | None
    probe: AnySource | None

    @property
    def every(self) -> dict[str, int]:
        """Name of each look -> epochs between two."""
        asked = {PICTURES: self.options.picture_every, PROBE: self.options.probe_every}
        return {name: every for name, every in asked.items() if every is not None}

    def settings(self) -> dict[str, Any]:
        """The options that were set, for a run's `config.yaml`."""
        found = {name: getattr(self.options, name) for name in VOLATILE}
        if self.probe is not None and not isinstance(found["probe_data"], str | Path | None):
            found["probe_data"] = self.probe.name
        return found | {"log": list(self.options.log) or None}

    def looks(
        self,
        model: MaskedModel,
        config: PretrainConfig,
        folder: Path,
        device: torch.device,
        workers: int | None,
        resident: bool | None,
    ) -> list[Look]:
        """The looks to take, at a twin of a model that no training has changed yet.

        Parameters
        ----------
        model
            Before it is moved, compiled, wrapped or sharded.
        config
            Of the training.
        folder
            The run directory.
        device, workers, resident
            As for the training.
        """
        found: list[Look] = []
        if not self.every:
            return found
        twin = copy.deepcopy(model)
        twin.encoder.set_grad_checkpointing(False)
        if self.pictures is not None:
            place = folder / PICTURES
            colours = self._colours(device)
            found.append(PictureLook(twin, self.target, self.pictures, config, place, device, colours))
        if self.probe is not None:
            probe = KNNProbe(twin.encoder, self.probe, self.source.view, device, workers, resident)
            found.append(ProbeLook(probe))
        return found

    def _colours(self, device: torch.device) -> UInt8[np.ndarray, "k 3"] | None:
        """A colour for each token: like ones for those that look alike on some images."""
        if not isinstance(self.target, TokenTarget):
            return None
        view = self.source.view
        options = DataOptions(mean=view.mean, std=view.std, channels=view.channels)
        some = open_source(few_images(self.source, _COLOURED_BY).views, options)
        return look_at_tokens(self.target.tokenizer, some, examples=1, device=str(device)).palette()


def plan_watch(options: WatchOptions | None, source: AnySource, data_options: DataOptions, target: Target) -> WatchPlan:
    """Open what watching takes.

    Parameters
    ----------
    options
        What was asked for; None is nothing.
    source, data_options, target
        Of the training.

    Raises
    ------
    InputError
        Something is missing for it.
    """
    options = options or WatchOptions()
    pictures = probe = None
    if options.picture_every is not None:
        check_pictures(target)
        pictures = few_images(source, SHOWN, held_out=True)
    if options.probe_every is not None:
        probe = open_probe(source, options.probe_data, data_options, options.probe_images or PROBE_IMAGES)
    return WatchPlan(options=options, source=source, target=target, pictures=pictures, probe=probe)

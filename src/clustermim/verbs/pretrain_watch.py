"""What a user may ask of those who watch a training, and what they need: opened and checked before work starts."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from clustermim.data.options import DataOptions
from clustermim.data.streaming.source import AnySource
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.probing import PROBE, PROBE_IMAGES, KNNProbe, ProbeLook, open_probe
from clustermim.mim.watching import Look
from clustermim.training.loggers import LogTo, check_loggers

_FEWEST = 10


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How a training is watched. None of it changes the training, and all of it may change from one `--resume` to the
    next.
    """

    log: Annotated[tuple[LogTo, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = ()
    """Where rows of metrics go beside metrics.jsonl: `tensorboard` (event files in OUT/tensorboard), `wandb` (Weights &
    Biases; `WANDB_PROJECT` and `WANDB_MODE=offline` count), or both. Each is an extra of its own: pip install
    'clustermim[tensorboard]'."""

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
        if self.probe_every is not None and self.probe_every < 1:
            raise InputError(f"--probe-every {self.probe_every} is a number of epochs: at least 1.")
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
    probe: AnySource | None

    @property
    def every(self) -> dict[str, int]:
        """Name of each look -> epochs between two."""
        asked = {PROBE: self.options.probe_every}
        return {name: every for name, every in asked.items() if every is not None}

    def settings(self) -> dict[str, Any]:
        """The options that were set, for a run's `config.yaml`."""
        found = {name: getattr(self.options, name) for name in VOLATILE}
        if self.probe is not None and not isinstance(found["probe_data"], str | Path | None):
            found["probe_data"] = self.probe.name
        return found | {"log": list(self.options.log) or None}

    def looks(
        self, model: MaskedModel, source: AnySource, device: torch.device, workers: int | None, resident: bool | None
    ) -> list[Look]:
        """The looks to take, each with a twin of its own of a model that no training has changed yet."""
        found: list[Look] = []
        if self.probe is not None:
            encoder = copy.deepcopy(model.encoder)
            encoder.set_grad_checkpointing(False)
            found.append(ProbeLook(KNNProbe(encoder, self.probe, source.view, device, workers, resident)))
        return found


def plan_watch(options: WatchOptions | None, source: AnySource, data_options: DataOptions) -> WatchPlan:
    """Open what watching takes.

    Parameters
    ----------
    options
        What was asked for; None is nothing.
    source, data_options
        Of the training.

    Raises
    ------
    InputError
        Something is missing for it.
    """
    options = options or WatchOptions()
    probe = None
    if options.probe_every is not None:
        probe = open_probe(source, options.probe_data, data_options, options.probe_images or PROBE_IMAGES)
    return WatchPlan(options=options, probe=probe)

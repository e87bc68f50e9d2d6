"""The protocols: what each needs, how it is told, and what is chosen by it. A new one is a file and a line here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from clustermim.data.sources import ImageSource
from clustermim.data.splits import hold_out
from clustermim.errors import InputError, nearest
from clustermim.evaluation.attentive import fit_attentive
from clustermim.evaluation.cluster import fit_clusters
from clustermim.evaluation.fewshot import DRAWS, SHOTS, check_shots, fit_fewshot
from clustermim.evaluation.judging import Judge
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.linear import fit_linear
from clustermim.evaluation.linear_mae import fit_linear_mae
from clustermim.evaluation.online import Course
from clustermim.evaluation.retrieval import RetrievalJudge

VALIDATION_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """What the user may set about the protocols."""

    shots: tuple[int, ...] = SHOTS
    """Images a class, for few-shot."""
    draws: int = DRAWS
    """Draws of few images, each a training of its own."""
    probe_epochs: int | None = None
    """Epochs of the probes that are trained on views; None: what each prescribes."""
    seed: int = 0
    """Of the validation split, the draws, the views and the bootstrap."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.probe_epochs is not None and self.probe_epochs < 1:
            raise InputError(f"--probe-epochs must be at least 1, not {self.probe_epochs}.")


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Training features of one layer and pool, on the device, and what belongs to them."""

    features: Tensor
    labels: Tensor
    num_classes: int
    validation: Tensor
    options: ProtocolOptions


@dataclass(frozen=True)
class ProtocolEntry:
    """How a protocol is run and shown."""

    title: str
    """Of its column."""
    metric: str
    """The figure that its column shows."""
    on_features: Callable[[Bank], Judge] | None = None
    """Makes a judge from the features of one layer and pool."""
    on_views: Callable[[Course], Mapping[tuple[int, str], Any]] | None = None
    """Or: makes a judge for every layer and pool from views of the training images."""
    labels: Literal["train", "none"] = "train"
    """Whether training labels are seen at all."""
    on_masks: bool = False
    """Or: judges patches by mask images, see `clustermim.evaluation.dense`."""


PROTOCOLS: dict[str, ProtocolEntry] = {
    "knn": ProtocolEntry(
        "k-NN", "top1", lambda bank: fit_knn(bank.features, bank.labels, bank.num_classes, bank.validation)
    ),
    "linear": ProtocolEntry(
        "linear", "top1", lambda bank: fit_linear(bank.features, bank.labels, bank.num_classes, bank.validation)
    ),
    "linear-mae": ProtocolEntry("linear-mae", "top1", on_views=fit_linear_mae),
    "attentive": ProtocolEntry("attentive", "top1", on_views=fit_attentive),
    "fewshot": ProtocolEntry(
        "few-shot",
        "top1",
        lambda bank: fit_fewshot(
            bank.features,
            bank.labels,
            bank.num_classes,
            shots=bank.options.shots,
            draws=bank.options.draws,
            seed=bank.options.seed,
        ),
    ),
    "retrieval": ProtocolEntry("retrieval mAP", "map", lambda bank: RetrievalJudge(bank.features, bank.labels)),
    "cluster": ProtocolEntry(
        "clustering",
        "accuracy",
        lambda bank: fit_clusters(bank.features, bank.num_classes, bank.options.seed),
        labels="none",
    ),
    "patch-knn": ProtocolEntry("patch k-NN", "miou", on_masks=True),
    "patch-linear": ProtocolEntry("patch linear", "miou", on_masks=True),
}


def check_protocols(protocols: Sequence[str]) -> None:
    """Raise InputError, naming the nearest, unless all protocols are known."""
    if not protocols:
        raise InputError(f"There is nothing to judge by: give --protocol. Known: {', '.join(PROTOCOLS)}.")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise InputError(f"There is no protocol {protocol!r}.{nearest(protocol, PROTOCOLS)}")


def check_train(train: ImageSource, protocols: Sequence[str], options: ProtocolOptions) -> None:
    """Check, before anything is computed, that the protocols can be run on these training images.

    Raises
    ------
    InputError
        Fewer images than shots, or nothing to choose hyperparameters on.
    """
    assert train.labels is not None, "the caller has asked for labels"
    if "fewshot" in protocols:
        check_shots(train.labels, train.classes, options.shots, options.draws)
    validation_rows(torch.as_tensor(train.labels, dtype=torch.int64), train.groups, options.seed)


def validation_rows(labels: Int64[Tensor, " n"], groups: np.ndarray | None, seed: int) -> Bool[Tensor, " n"]:
    """True for the fifth of the training images that hyperparameters are chosen on: stratified, groups whole.

    Parameters
    ----------
    labels
        Of the training images.
    groups
        Their groups, or None.
    seed
        Of the choice.

    Raises
    ------
    InputError
        There is nothing to choose on: each class has one image, or all images are of one group.
    """
    rows = torch.from_numpy(hold_out(labels.numpy(), VALIDATION_FRACTION, seed, groups))
    if not rows.any():
        raise InputError(
            f"The {len(labels)} training images leave none to choose hyperparameters on: every class has a single one. "
            f"Bring at least two images of some class."
        )
    return rows

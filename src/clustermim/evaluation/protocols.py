"""How encoders are judged: features once, every protocol fitted on train alone, test read once, at the end.

A protocol is a function of the training features that returns a judge; a new one is a file and a line in `PROTOCOLS`.
No protocol is ever given a test image: the test source is first touched when all judges are made.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource, require_labels
from clustermim.data.splits import hold_out
from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, match_channels
from clustermim.errors import InputError, nearest
from clustermim.evaluation.cache import FeatureBank, Layers, Progress, extract, silent
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.linear import fit_linear

VALIDATION_FRACTION = 0.2


@runtime_checkable
class Judge(Protocol):
    """What a protocol makes of the training features."""

    chosen: dict[str, Any]
    """Hyperparameters and the validation accuracy they were chosen by; they become columns of the table."""

    def predict(self, features: Tensor) -> Tensor:
        """(m, d) features -> (m,) classes."""
        ...


Fit = Callable[[Tensor, Tensor, int, Tensor], Judge]
"""(features (n, d), labels (n,), number of classes, validation rows (n,) bool) -> judge."""

PROTOCOLS: dict[str, Fit] = {"knn": fit_knn, "linear": fit_linear}


def evaluate(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    protocols: Sequence[str] = ("knn", "linear"),
    *,
    view: ViewConfig | None = None,
    layers: Layers = "last",
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Judge one encoder on one data set.

    Parameters
    ----------
    encoder
        Frozen; images are resized to its own size if it has one.
    train, test
        Labelled sources.
    protocols
        Names from `PROTOCOLS`.
    view
        How images are viewed; None takes that of `train`.
    layers
        `last`, or `all`: a row for each.
    batch_size
        Images at a time; it changes the speed only.
    device
        Where features are computed and judged.
    workers
        Processes that read images; None decides.
    seed
        Of the validation split.
    progress
        Told how far it is.

    Returns
    -------
    list[dict]
        A flat row for each layer, pool and protocol: `encoder`, `data`, `protocol`, `pool` (`cls`: class token or the
        model's own global vector; `mean`: of the patches; floors name theirs), `layer` (0 to `depth` - 1), `top1` in
        [0, 1], `val_top1`, what was chosen, `dim`, `n_train`, `n_test`, `classes`, `seed`, and `note` where there is
        something to know.

    Raises
    ------
    InputError
        Unknown protocol, no labels, one class, a class that only test has, or channels the encoder cannot take.
    """
    check_protocols(protocols)
    check_sources(train, test)
    view = view_for(encoder, view or train.view)
    encoder = encoder.to(device).eval()
    bank = extract(
        encoder,
        make_loader(train, view, batch_size=batch_size, train=False, device=device, workers=workers),
        layers,
        progress=progress,
    )
    judges = fit_judges(bank, protocols, device=device, seed=seed, progress=progress)
    # From here on nothing is chosen any more.
    test_bank = extract(
        encoder,
        make_loader(test, view, batch_size=batch_size, train=False, device=device, workers=workers),
        layers,
        progress=progress,
    )
    facts = {"encoder": encoder.name, "data": train.name}
    sizes = {
        "n_train": len(bank.labels),
        "n_test": len(test_bank.labels),
        "classes": len(np.unique(bank.labels.numpy())),
        "seed": seed,
    }
    return [facts | row | sizes for row in score(judges, test_bank, device=device)]


def fit_judges(
    bank: FeatureBank,
    protocols: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> dict[tuple[int, str, str], Judge]:
    """Every protocol on every layer and pool of the training features: (layer, pool, protocol) -> judge.

    Parameters
    ----------
    bank
        Features of the training images.
    protocols
        Names from `PROTOCOLS`.
    device
        Where to compute.
    seed
        Of the validation split, which is one for all.
    progress
        Told after each.
    """
    labels, classes = bank.labels.to(device), int(bank.labels.max()) + 1
    validation = validation_rows(bank.labels, bank.groups, seed).to(device)
    judges: dict[tuple[int, str, str], Judge] = {}
    total = len(bank.vectors) * len(protocols)
    for (layer, pool), features in bank.vectors.items():
        here = features.to(device)
        for protocol in protocols:
            judges[layer, pool, protocol] = PROTOCOLS[protocol](here, labels, classes, validation)
            progress("protocols", len(judges), total)
    return judges


def score(
    judges: Mapping[tuple[int, str, str], Judge], test: FeatureBank, *, device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """What each judge makes of the test images; the only place where test labels are read.

    Parameters
    ----------
    judges
        Made from training images alone, see `fit_judges`.
    test
        Features of the test images.
    device
        Where to compute.
    """
    rows = []
    for (layer, pool, protocol), judge in judges.items():
        features = test.vectors[layer, pool]
        predicted = judge.predict(features.to(device)).cpu()
        top1 = (predicted == test.labels).double().mean().item()
        place = {"protocol": protocol, "pool": pool, "layer": layer}
        rows.append(place | {"top1": top1} | judge.chosen | {"dim": features.shape[1]})
    return rows


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


def view_for(encoder: Encoder, view: ViewConfig) -> ViewConfig:
    """The view of a source at the size that an encoder needs.

    Raises
    ------
    InputError
        The encoder cannot take images of so many channels.
    """
    match_channels(torch.zeros(1, view.channels, 1, 1), encoder.channels, encoder.name)
    size = encoder.image_size or view.image_size
    return ViewConfig.from_dict(view.to_dict() | {"image_size": size})


def check_protocols(protocols: Sequence[str]) -> None:
    """Raise InputError, naming the nearest, unless all protocols are known."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise InputError(f"There is no protocol {protocol!r}.{nearest(protocol, PROTOCOLS)}")


def check_sources(train: ImageSource, test: ImageSource) -> None:
    """Check that there are labels to judge by.

    Raises
    ------
    InputError
        No labels, a single class in train, or a class that only test has.
    """
    known = require_labels(train, "Judging an encoder")
    if test.labels is None:
        require_labels(test, "Judging an encoder")
    unseen = np.setdiff1d(np.unique(test.labels if test.labels is not None else []), np.unique(known))
    if len(unseen):
        names = [str(test.classes[int(c)]) if test.classes else str(int(c)) for c in unseen[:5]]
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise InputError(
            f"{len(unseen)} class(es) of the test split of {test.name} have no image in its train split: "
            f"{', '.join(names)}{more}. No protocol can learn them: add training images, or leave these classes out."
        )

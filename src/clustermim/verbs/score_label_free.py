"""`clustermim tcas --label-free`: how tokens agree between views and patches of an image, where nothing is labelled."""

from collections.abc import Mapping

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource, require_labels
from clustermim.scoring.agreement import Agreement, AgreementCounts
from clustermim.tokenizers.tokenizer import Tokenizer

WARNING = (
    "Experimental: agreement says that tokens last from view to view, not that they tell classes apart. Controls by "
    "position or index agree with themselves and mean nothing here; label a few hundred images for a score."
)


def agreement_table(agreements: Mapping[str, Agreement], data: str) -> Group:
    """A table of agreements, and what it does not say."""
    table = Table(title=f"Agreement of tokens on {data}, without labels (experimental)", title_justify="left")
    for title in ("tokenizer", "between two views ↑", "between patches ↑"):
        table.add_column(title, justify="left" if title == "tokenizer" else "right")
    for name, one in agreements.items():
        table.add_row(name, f"{one.view_agreement:.3f}", f"{one.patch_agreement:.3f}")
    return Group(table, Text(WARNING, style="yellow"))


def agreement_without_labels(
    tokenizers: Mapping[str, Tokenizer],
    source: ImageSource,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    workers: int | None,
) -> dict[str, Agreement]:
    """Tokenize two augmented views of each image (the training views of epochs 0 and 1) and compare.

    Parameters
    ----------
    tokenizers
        Name -> tokenizer.
    source
        Images; labels are used by the oracle alone.
    seed
        Seed of crops and flips.
    batch_size, device, workers
        As for `tcas`.
    """
    for one in tokenizers.values():
        if "labels" in one.requires:
            require_labels(source, f"A tokenizer of kind {one.kind!r}")
    size = min(batch_size, len(source))
    loader = make_loader(source, batch_size=size, train=True, seed=seed, device=device, workers=workers)
    counts = {name: AgreementCounts(len(source), one.vocab_size) for name, one in tokenizers.items()}
    for view in (0, 1):
        for batch in loader.epoch(view):
            for name, one in tokenizers.items():
                ids = one.encode(batch.images, index=batch.index, labels=batch.labels)
                counts[name].update(view, ids, batch.index)
    return {name: one.agreement() for name, one in counts.items()}

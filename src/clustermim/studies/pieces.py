"""A piece of work, done once, kept, and named by everything that its result depends on; and what pieces make up."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from clustermim.studies.expanding import slug

PieceKind = Literal["fit", "score", "predict", "pretrain", "select", "probe", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of work.

    Attributes
    ----------
    kind
        What is done.
    name
        For people; part of its folder's name.
    data
        Name of the data set in the recipe.
    settings
        Plain values: what it does, and the fingerprint of the images it does it to.
    needs
        Pieces whose results it uses; it is given up where one of them failed.
    any_of
        Pieces of which the best is used; it waits for all, and is given up where all of them failed.
    after
        Pieces that it waits for though it uses nothing of them.
    """

    kind: PieceKind
    name: str
    data: str
    settings: Mapping[str, Any] = field(hash=False)
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """Name of its folder: kind, name, and ten digits of a hash of all that its result depends on."""
        facts = [self.kind, self.settings, list(self.needs), list(self.any_of)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.kind}-{slug(self.name)[:60]}-{digest}"

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Everything that must be settled before it can begin."""
        return (*self.needs, *self.any_of, *self.after)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An encoder of a cell: one seed, at the learning rate that was chosen for the cell."""

    seed: int
    pretrain: str | None
    """None for the first seed: it is the best of the cell's trials."""
    select: Mapping[str, str] = field(hash=False)
    """By name of the data set that it is judged on; empty for the first seed, as above."""
    probe: Mapping[str, str] = field(hash=False)
    finetune: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One learning rate of a cell, trained with the first seed."""

    lr: float
    pretrain: str
    select: Mapping[str, str] = field(hash=False)
    """By name of the data set that is judged on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table: a target on a data set, with everything it depends on but learning rate and seed."""

    name: str
    family: str
    data: str
    tokens: str | None
    """Name of the tokenizer that it predicts; None for pixels and features."""
    scored_as: str | None
    """Name of the tokenizer whose scores speak of it: for pixels and features `identity`, where that is scored."""
    settings: Mapping[str, Any] = field(hash=False)
    """Options of `pretrain`, without learning rate and seed."""
    round: int
    trials: Sequence[Trial] = field(hash=False)
    runs: Sequence[Run] = field(hash=False)

    @property
    def setting(self) -> tuple[Any, ...]:
        """What cells must share to be compared as targets: model, architecture, epochs, mask, patch side."""
        keys = ("model", "epochs", "encoder", "mask_ratio", "mask_kind", "patch_size")
        return tuple(self.settings.get(key) for key in keys)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One tokenizer on one data set."""

    name: str
    family: str
    data: str
    kind: str
    control: bool
    settings: Mapping[str, Any] = field(hash=False)
    patch_size: int
    round: int
    fit: str
    score: str


@dataclass(frozen=True, kw_only=True)
class Floor:
    """An encoder that no pretraining has touched."""

    name: str
    data: str
    probe: Mapping[str, str] = field(hash=False)
    """Data that is judged -> the piece that does it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All pieces, each behind those that it waits for, and what they are pieces of."""

    pieces: Mapping[str, Piece]
    tokens: Sequence[Tokens]
    cells: Sequence[Cell]
    floors: Sequence[Floor]
    notes: Sequence[str]
    """What the reader must be told."""

    def count(self) -> dict[str, int]:
        """Pieces of each kind."""
        kinds = [piece.kind for piece in self.pieces.values()]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def to_dict(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "notes": list(self.notes),
            "pieces": [
                {
                    "id": one.id,
                    **{
                        key: getattr(one, key)
                        for key in ("kind", "name", "data", "settings", "needs", "any_of", "after")
                    },
                }
                for one in self.pieces.values()
            ],
        }

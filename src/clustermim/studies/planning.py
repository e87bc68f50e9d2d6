"""From a recipe to the pieces of work: what depends on what, and what can be known to be wrong beforehand."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clustermim.errors import InputError, nearest
from clustermim.studies.checking import check_cell, check_tokenizer
from clustermim.studies.expanding import Member
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Cell, Floor, Piece, Plan, Run, Tokens, Trial
from clustermim.studies.recipe import CONTROLS, Recipe, select_names
from clustermim.studies.weights import weights_in

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
"""In the features of a tokenizer: the encoder of the target of that name."""


def make_plan(recipe: Recipe, sources: Sources) -> Plan:
    """The distinct pieces of a recipe, each behind those that it waits for.

    Raises
    ------
    InputError
        Cells that contradict themselves or each other, options that do not fit the images, an empty grid.
    """
    planner = _Planner(recipe, sources)
    for name in recipe.data:
        sources.check(name)
    for name in recipe.data:
        planner.plan_data(name)
    if not planner.cells and not planner.tokens:
        raise InputError("The grid of the recipe is empty: there is nothing to fit and nothing to train.")
    return Plan(
        pieces=planner.pieces,
        tokens=planner.tokens,
        cells=planner.cells,
        floors=planner.floors,
        notes=planner.notes,
    )


class _Planner:
    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        self.recipe, self.sources = recipe, sources
        self.pieces: dict[str, Piece] = {}
        self.tokens: list[Tokens] = []
        self.cells: list[Cell] = []
        self.floors: list[Floor] = []
        self.notes: list[str] = []

    def plan_data(self, data: str) -> None:
        """Everything on one data set: round by round, since tokens of a second round need encoders of the first."""
        recipe = self.recipe
        train = self.sources.train(data)
        if train.labels is None and self.sources.entries[data].multi_label is None:
            self.notes.append(
                f"{data} has no labels: tokens get label-free scores only"
                + (
                    "."
                    if self.sources.judges(data)
                    else ", learning rates are chosen by the training loss, and no encoder is judged."
                )
            )
        waiting = [one for one in recipe.tokenizers if self._applies(one, data)]
        targets = list(recipe.targets)
        number = 1
        while waiting or targets:
            known = {one.name: one for one in self.tokens if one.data == data}
            cells = {cell.name: cell for cell in self.cells if cell.data == data}
            ready = [one for one in waiting if self._references(one) <= {self._target_of(c) for c in cells.values()}]
            for member in ready:
                self._plan_tokens(member, data, number, cells)
            scores = [one.score for one in self.tokens if one.data == data and one.round == number]
            known = {one.name: one for one in self.tokens if one.data == data}
            trainable = [t for t in targets if t.settings.get("tokenizer") in (None, *known)]
            if not ready and not trainable:
                self._refuse_circle(waiting, targets)
            self._plan_cells(trainable, data, number, known, scores)
            waiting = [one for one in waiting if one not in ready]
            targets = [one for one in targets if one not in trainable]
            number += 1
        self._plan_floors(data)

    def _applies(self, member: Member, data: str) -> bool:
        """The label itself as a token needs a label."""
        if member.settings.get("kind") == "oracle" and not self.sources.labelled(data):
            used = [t.name for t in self.recipe.targets if t.settings.get("tokenizer") == member.name]
            if used:
                raise InputError(f"targets: {used[0]!r} predicts labels, and {data} has none. Leave it out.")
            return False
        return True

    def _target_of(self, cell: Cell) -> str:
        return str(cell.settings["named"])

    def _references(self, member: Member) -> set[str]:
        features = member.settings.get("features")
        found = set(PLACEHOLDER.findall(features)) if isinstance(features, str) else set()
        names = [target.name for target in self.recipe.targets]
        for name in found - set(names):
            raise InputError(f"tokenizers: {member.name}: there is no target {name!r}.{nearest(name, names)}")
        return found

    def _refuse_circle(self, waiting: Sequence[Member], targets: Sequence[Member]) -> None:
        names = ", ".join(repr(one.name) for one in (*waiting, *targets))
        raise InputError(f"The recipe is circular: {names} wait for each other. Let one of them stand on its own.")

    def _add(self, piece: Piece) -> str:
        return self.pieces.setdefault(piece.id, piece).id

    def _facts(self, data: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a result depends on besides options: the images, how they are viewed, weights out of files."""
        train = self.sources.train(data)
        facts = {"train": train.fingerprint()[:16], "view": train.view.to_dict()}
        if train.labels is not None:
            facts["test"] = self.sources.test(data).fingerprint()[:16]
        weights = weights_in(settings or {})
        return facts | ({"weights": weights} if weights else {})

    def _patch_size(self, settings: Mapping[str, Any], where: str) -> int:
        side = settings.get("patch_size") or self.recipe.patch_size
        if side is None:
            raise InputError(
                f"{where}: `patch_size` is missing, here and at the top of the recipe. How large is a patch?"
            )
        return int(side)

    def _plan_tokens(self, member: Member, data: str, number: int, cells: Mapping[str, Cell]) -> None:
        settings = dict(member.settings)
        side = self._patch_size(settings, f"tokenizers: {member.name}")
        settings["patch_size"] = side
        settings.setdefault("seed", 0)
        check_tokenizer(member.name, settings, self.sources.train(data), self.sources.labelled(data))
        trials: list[str] = []
        for name in sorted(self._references(member)):
            cell = next(cell for cell in cells.values() if self._target_of(cell) == name)
            trials += [self._deciding(trial, data) for trial in cell.trials]
        fit = self._add(
            Piece(
                kind="fit",
                name=f"{data} {member.name}",
                data=data,
                settings={**settings, "images": self._facts(data, settings)},
                any_of=tuple(trials),
            )
        )
        score = {key: getattr(self.recipe.score, key) for key in self.recipe.score.__dataclass_fields__}
        scored = self._add(
            Piece(
                kind="score",
                name=f"{data} {member.name}",
                data=data,
                needs=(fit,),
                settings={**score, "multi_label": self.sources.entries[data].multi_label},
            )
        )
        kind = str(settings.get("kind", "kmeans"))
        self.tokens.append(
            Tokens(
                name=member.name,
                family=member.family,
                data=data,
                kind=kind,
                control=kind in CONTROLS,
                settings=settings,
                patch_size=side,
                round=number,
                fit=fit,
                score=scored,
            )
        )

    def _deciding(self, trial: Trial, data: str) -> str:
        """The piece by which a trial is compared with the others."""
        judges = self.sources.judges(data)
        return trial.select[judges[0]] if judges else trial.pretrain

    def _plan_cells(
        self, targets: Sequence[Member], data: str, number: int, known: Mapping[str, Tokens], scores: Sequence[str]
    ) -> None:
        shared = self.recipe.shared
        wanted = [(t, member, self._cell_settings(t, member, data, known)) for t in targets for member in shared]
        seen = {self._key(cell.settings): cell.name for cell in self.cells if cell.data == data}
        distinct = []
        for target, member, settings in wanted:
            key = self._key(settings)
            if key in seen:
                self.notes.append(f"{data}: {target.name}{member.name} is {seen[key]} again; it is trained once.")
                continue
            seen[key] = target.name + member.name
            distinct.append((target, member, settings))
        after: tuple[str, ...] = ()
        if scores:
            foreseen = {
                target.name + member.name: self._scored_as(settings, known) for target, member, settings in distinct
            }
            after = (
                self._add(
                    Piece(
                        kind="predict",
                        name=f"{data} round {number}",
                        data=data,
                        after=tuple(scores),
                        settings={"round": number, "cells": foreseen, "scores": list(scores)},
                    )
                ),
            )
        for target, member, settings in distinct:
            self._plan_cell(target, member, settings, data, number, known, after)

    def _key(self, settings: Mapping[str, Any]) -> str:
        return repr(sorted((key, repr(value)) for key, value in settings.items() if key != "named"))

    def _cell_settings(self, target: Member, member: Member, data: str, known: Mapping[str, Tokens]) -> dict[str, Any]:
        settings = {"mask_ratio": 0.75, "model": "vit_micro", "epochs": 100, "batch_size": 256}
        settings |= {"encoder": "visible", "mask_kind": "random", **member.settings, **target.settings}
        tokens = known.get(str(settings.get("tokenizer")))
        where = f"targets: {target.name}"
        if tokens is not None:
            asked = target.settings.get("patch_size")
            if asked not in (None, tokens.patch_size):
                raise InputError(
                    f"{where}: contradicts itself: patches of side {asked}, but the tokenizer {tokens.name!r} has "
                    f"{tokens.patch_size}. Leave `patch_size` out."
                )
            settings["patch_size"] = tokens.patch_size
        else:
            settings["patch_size"] = self._patch_size(settings, where)
        check_cell(where, settings, self.sources.train(data), self.recipe.lrs)
        return settings | {"named": target.name}

    def _scored_as(self, settings: Mapping[str, Any], known: Mapping[str, Tokens]) -> str | None:
        if settings.get("tokenizer") is not None:
            return str(settings["tokenizer"])
        side = settings["patch_size"]
        return next((one.name for one in known.values() if one.kind == "identity" and one.patch_size == side), None)

    def _plan_cell(
        self,
        target: Member,
        member: Member,
        settings: Mapping[str, Any],
        data: str,
        number: int,
        known: Mapping[str, Tokens],
        after: tuple[str, ...],
    ) -> None:
        recipe, judges = self.recipe, self.sources.judges(data)
        name = target.name + member.name
        tokens = known.get(str(settings.get("tokenizer")))
        options = {key: value for key, value in settings.items() if key not in ("named", "tokenizer")}
        options["images"] = self._facts(data, options)
        needs = () if tokens is None else (tokens.fit,)
        seeds = self._seeds(target.name)
        trials = []
        for lr in recipe.lrs:
            run = self._add(
                Piece(
                    kind="pretrain",
                    name=f"{data} {name} lr{lr:g} seed{seeds[0]}",
                    data=data,
                    needs=needs,
                    after=after,
                    settings={**options, "lr": lr, "seed": seeds[0]},
                )
            )
            trials.append(
                Trial(lr=lr, pretrain=run, select=self._select(f"{data} {name} lr{lr:g} seed{seeds[0]}", run, judges))
            )
        deciding = tuple(self._deciding(trial, data) for trial in trials)
        tuned = recipe.finetune is not None and bool(
            set(select_names(list(recipe.finetune["targets"]), [t.name for t in recipe.targets], "finetune: targets"))
            & {target.name}
        )
        runs = []
        for seed in seeds:
            run_id, select = None, {}
            title = f"{data} {name} seed{seed}"
            if seed != seeds[0]:
                run_id = self._add(
                    Piece(
                        kind="pretrain",
                        name=title,
                        data=data,
                        needs=needs,
                        any_of=deciding,
                        after=after,
                        settings={**options, "lr": "chosen", "seed": seed, "grid": list(recipe.lrs)},
                    )
                )
                select = self._select(title, run_id, judges)
            chosen = deciding if run_id is None else ()
            probe = {}
            for judge in judges:
                every = tuple(trial.select[judge] for trial in trials) if run_id is None else ()
                probe[judge] = self._add(
                    Piece(
                        kind="probe",
                        name=f"{title} on {judge}" if judge != data else title,
                        data=judge,
                        needs=() if run_id is None else (select[judge],),
                        any_of=tuple(dict.fromkeys((*chosen, *every))),
                        settings={
                            "protocols": list(recipe.protocols),
                            "images": self._facts(judge),
                            "seed": recipe.select.seed,
                        },
                    )
                )
            finetuned = None
            if tuned and judges:
                how = {key: value for key, value in (recipe.finetune or {}).items() if key != "targets"}
                finetuned = self._add(
                    Piece(
                        kind="finetune",
                        name=title,
                        data=judges[0],
                        needs=() if run_id is None else (run_id,),
                        any_of=chosen,
                        settings={**how, "seed": seed, "images": self._facts(judges[0])},
                    )
                )
            runs.append(Run(seed=seed, pretrain=run_id, select=select, probe=probe, finetune=finetuned))
        self.cells.append(
            Cell(
                name=name,
                family=target.family,
                data=data,
                tokens=None if tokens is None else tokens.name,
                scored_as=self._scored_as(settings, known),
                settings=settings,
                round=number,
                trials=trials,
                runs=runs,
            )
        )

    def _select(self, name: str, run: str, judges: Sequence[str]) -> dict[str, str]:
        how = self.recipe.select
        return {
            judge: self._add(
                Piece(
                    kind="select",
                    name=name if n == 0 else f"{name} on {judge}",
                    data=judge,
                    needs=(run,),
                    settings={
                        "protocols": list(self.recipe.protocols),
                        "limit": how.images,
                        "seed": how.seed,
                        "images": self._facts(judge),
                    },
                )
            )
            for n, judge in enumerate(judges)
        }

    def _seeds(self, target: str) -> tuple[int, ...]:
        compare = self.recipe.compare
        if compare is not None and target in (compare.ours, *compare.theirs, *compare.also):
            return tuple(dict.fromkeys((*self.recipe.seeds, *compare.seeds)))
        return self.recipe.seeds

    def _plan_floors(self, data: str) -> None:
        for spec in self.recipe.floors:
            for member in self.recipe.shared:
                if spec != "random" and member is not self.recipe.shared[0]:
                    continue
                probe = {judge: self._floor(spec, member, data, judge) for judge in self.sources.judges(data)}
                if probe:
                    label = f"random {member.settings.get('model', 'vit_micro')}" if spec == "random" else spec
                    if label not in {floor.name for floor in self.floors if floor.data == data}:
                        self.floors.append(Floor(name=label, data=data, probe=probe))

    def _floor(self, spec: str, member: Member, data: str, judge: str) -> str:
        settings: dict[str, Any] = {"encoder": spec}
        needs: tuple[str, ...] = ()
        name = f"{judge} {spec}"  # of what is judged alone: done once, whatever was pretrained on
        known = {one.name: one for one in self.tokens if one.data == data}
        if spec == "random":
            model = member.settings.get("model", "vit_micro")
            settings["encoder"] = f"random:{model}?patch_size={self._patch_size({}, 'floors: random')}"
        elif spec.startswith("bag-of-tokens:"):
            tokens = spec.partition(":")[2]
            if tokens not in known:
                raise InputError(f"floors: {spec}: there is no tokenizer {tokens!r}.{nearest(tokens, known)}")
            needs = (known[tokens].fit,)
            name = f"{data} {spec}" + (f" on {judge}" if judge != data else "")
        elif spec != "raw-pixels":
            raise InputError(
                f"floors: unknown floor {spec!r}.{nearest(spec, ('raw-pixels', 'random', 'bag-of-tokens:'))}"
            )
        facts = {
            "protocols": list(self.recipe.protocols),
            "images": self._facts(judge),
            "seed": self.recipe.select.seed,
        }
        return self._add(
            Piece(
                kind="probe",
                name=name,
                data=judge,
                needs=needs,
                settings={**settings, **facts},
            )
        )

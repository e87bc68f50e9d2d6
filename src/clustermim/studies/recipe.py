"""What a recipe says: data, tokenizers, targets and how all of them are trained and judged, each key checked."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, get_args

from clustermim.data.options import DataOptions
from clustermim.errors import InputError, nearest
from clustermim.evaluation.protocols import PROTOCOLS
from clustermim.studies.expanding import Member, expand
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.verbs.finetune_encoder import finetune
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.tokenizer_fit import Kind, fit_tokenizer

CONTROLS = ("identity", "random", "random-centroids", "position", "oracle")
SAME_FOR_ALL = frozenset(
    {"lr", "epochs", "batch_size", "warmup", "weight_decay", "clip_grad", "ema", "model", "init", "accumulate"}
)
"""Options of `pretrain` that no target may have for itself: the comparison would not be fair."""

_NOT_IN_RECIPES = frozenset(
    {"data", "out", "resume", "dry_run", "seed", "device", "devices", "json", "options", "max_minutes", "vqvae"}
    | {"steps", "stream", "watch"}  # a study counts in epochs of images that can be opened whole
)
_TOP = (
    "title",
    "note",
    "data",
    "patch_size",
    "tokenizers",
    "controls",
    "targets",
    "pretrain",
    "score",
    "select",
    "probe",
    "floors",
    "finetune",
    "compare",
    "shown",
)


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One data set."""

    name: str
    source: str
    options: DataOptions
    multi_label: str | None = None
    """File of class lists, for the scores."""
    judge: tuple[str, ...] = ()
    """Names of the data sets that its encoders are judged on; empty: on itself."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How tokens are scored."""

    bootstrap: int = 200
    images: int | None = None
    """Labelled training images to score on; None: all."""
    label_free: bool = True
    graph_images: int = 300
    """Images of the augmentation graph, 0 for none."""
    graph_masks: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How learning rate, layer and pool are chosen: on part of the training images, by the linear probe."""

    images: int | None = None
    """Training images to choose on, a fifth of them for validation; None: all."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The main pair: a target of tokens against the better of others, over paired seeds."""

    ours: str
    theirs: tuple[str, ...]
    also: tuple[str, ...] = ()
    """Others that are compared with ours alone, such as the BEiT-type baseline."""
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe whose keys are known; what they hold together is for the plan to check."""

    title: str
    note: str
    """What the author wants every reader of the page to know."""
    data: Mapping[str, DataEntry]
    patch_size: int | None
    tokenizers: Sequence[Member]
    """Controls included."""
    targets: Sequence[Member]
    """Each expanded but for what all targets share."""
    shared: Sequence[Member]
    """Members of the grid that all targets share: model, epochs."""
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    score: ScoreSettings
    select: SelectSettings
    protocols: tuple[str, ...]
    floors: tuple[str, ...]
    finetune: Mapping[str, Any] | None
    """Options of `finetune`, and `targets`: patterns of those that are fine-tuned."""
    compare: CompareSettings | None
    shown: tuple[str, ...]
    """Tokenizers whose pictures the report shows."""
    written: Mapping[str, Any] = field(repr=False)
    """As it was read."""


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """Check every key of a recipe and expand its grids.

    Raises
    ------
    InputError
        An unknown key (the nearest is named), a value of the wrong kind, an empty grid.
    """
    check_keys(values, _TOP, "recipe")
    for key in ("data", "targets"):
        if not values.get(key):
            raise InputError(f"recipe: `{key}` is missing or empty, so there is nothing to study.")
    trained = _mapping(values.get("pretrain"), "pretrain")
    known = option_names(pretrain) | {"seeds"}
    check_keys(trained, known - {"target", "tokenizer", "features", "norm_pix"}, "pretrain")
    lrs = _numbers(trained.pop("lr", [1e-3]), "pretrain: lr")
    seeds = _integers(trained.pop("seeds", [0]), "pretrain: seeds")
    tokenizers = [*_tokenizers(values), *_controls(values)]
    targets = _targets(values, tokenizers)
    chosen = _strings(values.get("shown"), "shown")
    return Recipe(
        title=str(values.get("title", "study")),
        note=" ".join(str(values.get("note") or "").split()),
        data=_data(values["data"]),
        patch_size=_integer(values.get("patch_size"), "patch_size"),
        tokenizers=tokenizers,
        targets=targets,
        shared=expand("", trained, where="pretrain"),
        lrs=lrs,
        seeds=seeds,
        score=_settings(ScoreSettings, values.get("score"), "score"),
        select=_settings(SelectSettings, values.get("select"), "select"),
        protocols=_protocols(values.get("probe")),
        floors=_strings(values.get("floors", ["raw-pixels", "random"]), "floors"),
        finetune=_finetune(values.get("finetune")),
        compare=_compare(values.get("compare"), [target.name for target in targets]),
        shown=tuple(dict.fromkeys(name for pattern in chosen for name in _match(pattern, tokenizers, "shown"))),
        written=values,
    )


def option_names(verb: Any) -> set[str]:
    """Options of a verb's function that a recipe may set."""
    return set(inspect.signature(verb).parameters) - _NOT_IN_RECIPES


def check_keys(values: Mapping[str, Any], known: Any, where: str) -> None:
    """Refuse a key that nobody reads.

    Raises
    ------
    InputError
        Names it, where it stands, and the nearest known one.
    """
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")


def select_names(patterns: Sequence[str], names: Sequence[str], where: str) -> list[str]:
    """The names that match any of the patterns, in their order.

    Raises
    ------
    InputError
        A pattern that nothing matches.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"{where}: nothing is called {pattern!r}.{nearest(pattern, names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _data(given: Any) -> dict[str, DataEntry]:
    if isinstance(given, str):
        given = {given.rstrip("/").rpartition("/")[2]: {"source": given}}
    entries = {}
    options = {one.name for one in fields(DataOptions)}
    for name, entry in _mapping(given, "data").items():
        where = f"data: {name}"
        entry = {"source": entry} if isinstance(entry, str) else _mapping(entry, where)
        check_keys(entry, {"source", "multi_label", "judge", *options}, where)
        if not isinstance(entry.get("source"), str):
            raise InputError(f"{where}: `source` says where the images are; it is missing.")
        chosen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key in options
        }
        entries[str(name)] = DataEntry(
            name=str(name),
            source=entry["source"],
            options=DataOptions(**chosen),
            multi_label=entry.get("multi_label"),
            judge=_strings(entry.get("judge"), f"{where}: judge"),
        )
    for entry in entries.values():
        select_names(entry.judge, list(entries), f"data: {entry.name}: judge")
    return entries


def _tokenizers(values: Mapping[str, Any]) -> list[Member]:
    known = option_names(fit_tokenizer) | {one.name for one in fields(VQVAEConfig)} | {"seed"}
    found: list[Member] = []
    for family, given in _mapping(values.get("tokenizers"), "tokenizers").items():
        where = f"tokenizers: {family}"
        settings = _mapping(given, where)
        check_keys(settings, known - {"precision", "max_minutes"}, where)
        kinds = settings.get("kind", "kmeans")
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind not in get_args(Kind):
                raise InputError(f"{where}: there is no kind {kind!r}.{nearest(str(kind), get_args(Kind))}")
        found += expand(str(family), settings, where="tokenizers", single={"temperature"})
    _refuse_twins(found, "tokenizers")
    return found


def _controls(values: Mapping[str, Any]) -> list[Member]:
    given = values.get("controls", ["identity", "random-centroids"])
    if isinstance(given, Mapping):
        named = {str(name): _mapping(settings, f"controls: {name}") for name, settings in given.items()}
    else:
        named = {name: {} for name in _strings(given, "controls")}
    found = []
    for name, settings in named.items():
        if name not in CONTROLS:
            raise InputError(f"controls: there is no control {name!r}.{nearest(name, CONTROLS)}")
        check_keys(settings, {"k", "features", "patch_size", "seed"}, f"controls: {name}")
        found += expand(name, {"kind": name, **settings}, where="controls")
    return found


def _targets(values: Mapping[str, Any], tokenizers: Sequence[Member]) -> list[Member]:
    known = option_names(pretrain)
    found: list[Member] = []
    for family, given in _mapping(values["targets"], "targets").items():
        where = f"targets: {family}"
        settings = {"target": "token", **_mapping(given, where)}
        check_keys(settings, known, where)
        for key in settings:
            if key in SAME_FOR_ALL:
                raise InputError(
                    f"{where}: `{key}` must be the same for all targets, or the comparison is not fair. Put it under "
                    "`pretrain`, where a list makes it an axis of the grid."
                )
        if "tokenizer" in settings:
            patterns = _strings(settings["tokenizer"], f"{where}: tokenizer")
            settings["tokenizer"] = list(
                dict.fromkeys(name for pattern in patterns for name in _match(pattern, tokenizers, where))
            )
        members = expand(str(family), settings, where="targets")
        found += [Member(m.family, _target_name(m, settings), m.settings) for m in members]
    _refuse_twins(found, "targets")
    return found


def _target_name(member: Member, settings: Mapping[str, Any]) -> str:
    """`clustermim pixel-k50` rather than `clustermim-tokenizerpixel-k50`."""
    tokens = member.settings.get("tokenizer")
    if tokens is None:
        return member.name
    tail = member.name.removeprefix(member.family).replace(f"-tokenizer{tokens}", "")
    return f"{member.family} {tokens}{tail}"


def _match(pattern: str, tokenizers: Sequence[Member], where: str) -> list[str]:
    """Names of tokenizers; a pattern with `*` leaves controls to be named."""
    names = [one.name for one in tokenizers if "*" not in pattern or one.settings.get("kind") not in CONTROLS]
    return select_names([pattern], names, where)


def _refuse_twins(members: Sequence[Member], where: str) -> None:
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: two of them would be called {name!r}. Rename a family.")


def _protocols(given: Any) -> tuple[str, ...]:
    settings = _mapping(given, "probe")
    check_keys(settings, {"protocols"}, "probe")
    protocols = _strings(settings.get("protocols", ["knn", "linear"]), "probe: protocols")
    usable = [name for name, entry in PROTOCOLS.items() if entry.on_features is not None and entry.metric == "top1"]
    for name in protocols:
        if name not in usable:
            raise InputError(f"probe: {name!r} cannot be used in a study.{nearest(name, usable)}")
    if "linear" not in protocols:
        raise InputError("probe: `linear` must be among the protocols: learning rate and layer are chosen by it.")
    return protocols


def _finetune(given: Any) -> Mapping[str, Any] | None:
    if not given:
        return None
    settings = {"targets": ["*"], **_mapping(given, "finetune")}
    check_keys(settings, (option_names(finetune) - {"encoder"}) | {"targets"}, "finetune")
    return settings


def _compare(given: Any, targets: Sequence[str]) -> CompareSettings | None:
    if not given:
        return None
    settings = _mapping(given, "compare")
    check_keys(settings, {one.name for one in fields(CompareSettings)}, "compare")
    for key in ("ours", "theirs"):
        if not settings.get(key):
            raise InputError(f"compare: `{key}` is missing: which targets are the main pair?")
    theirs, also = (_strings(settings.get(key), f"compare: {key}") for key in ("theirs", "also"))
    ours = select_names([str(settings["ours"])], targets, "compare: ours")
    if len(ours) > 1:
        raise InputError(f"compare: `ours` must be one target; {settings['ours']!r} means {', '.join(ours)}.")
    found = CompareSettings(
        ours=ours[0],
        theirs=tuple(select_names(theirs, targets, "compare: theirs")),
        also=tuple(select_names(also, targets, "compare: also")) if also else (),
        seeds=_integers(settings.get("seeds", [0, 1, 2]), "compare: seeds"),
    )
    if found.ours in (*found.theirs, *found.also):
        raise InputError(f"compare: {found.ours!r} stands on both sides.")
    return found


def _settings(kind: Any, given: Any, where: str) -> Any:
    values = _mapping(given, where)
    known = {one.name: one.default for one in fields(kind)}
    check_keys(values, known, where)
    for key, value in values.items():
        wanted = bool if isinstance(known[key], bool) else int
        if value is not None and (not isinstance(value, wanted) or (wanted is int and value < 0)):
            raise InputError(
                f"{where}: {key} must be {'true or false' if wanted is bool else 'a whole number'}, not {value!r}."
            )
    return kind(**values)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: holds keys and values, not {value!r}.")
    return dict(value)


def _strings(value: Any, where: str) -> tuple[str, ...]:
    found = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, str) for one in found):
        raise InputError(f"{where}: holds names, not {value!r}.")
    return tuple(found)


def _integer(value: Any, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(f"{where}: a whole number of at least 1, not {value!r}.")
    return value


def _integers(value: Any, where: str) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise InputError(f"{where}: one or several whole numbers of at least 0, not {value!r}.")
    if len(set(found)) < len(found):
        raise InputError(f"{where}: holds a value twice: {value!r}.")
    return tuple(found)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in found):
        raise InputError(f"{where}: one or several numbers above 0, not {value!r}.")
    if len(set(found)) < len(found):
        raise InputError(f"{where}: holds a value twice: {value!r}.")
    return tuple(float(one) for one in found)

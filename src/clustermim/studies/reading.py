"""A recipe's text as plain values: YAML with numbers as people write them, no key twice, and overrides from outside."""

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from clustermim.errors import InputError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two things: `3e-4` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"line {line}: the key {key!r} stands twice. Keep one of the two.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def packaged() -> dict[str, Any]:
    """The recipes that come with the package: name -> file."""
    folder = resources.files("clustermim.studies") / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files}


def read_recipe(recipe: str | Path, *, size: str | None = None, changes: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe as nested plain values.

    Parameters
    ----------
    recipe
        A packaged name or a YAML file.
    size
        Name under the recipe's `sizes:`, whose values are laid over the others.
    changes
        `key=value` with dots between the keys of nested mappings; the value is read as YAML.

    Raises
    ------
    InputError
        No such recipe, no YAML, a size that it does not have, a change that cannot be read.
    """
    name, text = _find(str(recipe))
    values: dict[str, Any] = _parse(name, text)
    sizes = values.pop("sizes", None) or {}
    if not isinstance(sizes, Mapping) or not all(isinstance(one, Mapping) for one in sizes.values()):
        raise InputError(f"{name}: `sizes` holds a mapping for each size.")
    if size is not None:
        if size not in sizes:
            raise InputError(f"{name}: there is no size {size!r}.{nearest(size, map(str, sizes))}")
        values = _lay_over(values, sizes[size])
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise InputError(f"--set {change!r}: write KEY=VALUE, with dots between nested keys: pretrain.epochs=1.")
        values = _lay_over(values, _nested(key.split("."), _parse(f"--set {change!r}", value, mapping=False)))
    values.setdefault("title", name)
    return values


def _find(recipe: str) -> tuple[str, str]:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(
                f"The recipe {recipe} is not there. Check the path, or name one of: {', '.join(packaged())}."
            )
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"The recipe {recipe} cannot be read: {problem}.") from None
    known = packaged()
    if recipe not in known:
        raise InputError(
            f"There is no recipe {recipe!r}.{nearest(recipe, known)} A recipe of your own is named by its file."
        )
    return recipe, known[recipe].read_text(encoding="utf-8")


def _parse(name: str, text: str, *, mapping: bool = True) -> Any:
    try:
        values: Any = yaml.load(text, _Loader)
    except InputError as problem:
        raise InputError(f"{name}, {problem}") from None
    except yaml.YAMLError as problem:
        raise InputError(f"{name} is no valid YAML: {' '.join(str(problem).split())}.") from None
    if mapping and not isinstance(values, dict):
        raise InputError(f"{name} holds no recipe: it must be a mapping with at least `data` and `targets`.")
    return values


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else takes the place of what was there."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _lay_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged

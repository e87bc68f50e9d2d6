"""What made the finished pieces of a study: machines, versions, git revisions; several where it went on elsewhere."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clustermim.studies.folder import StudyFolder
from clustermim.studies.pieces import Plan


def makers(plan: Plan, folder: StudyFolder) -> list[dict[str, Any]]:
    """Each distinct setting that pieces were finished in, as `environment_facts` gives it, with ``"pieces"`` by kind.

    The one that finished most stands first.
    """
    found: dict[str, dict[str, Any]] = {}
    for identity in plan.pieces:
        if folder.piece(identity).exists():
            record = folder.record(identity)
            facts = record.get("made_by", {})
            maker = found.setdefault(json.dumps(facts, sort_keys=True), {**facts, "pieces": {}})
            maker["pieces"][record["kind"]] = maker["pieces"].get(record["kind"], 0) + 1
    return sorted(found.values(), key=lambda maker: -_count(maker))


def machines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Processors and GPUs in words, each once."""
    return list(dict.fromkeys(words for maker in found if (words := _machine(maker.get("hardware", {})))))


def versions(found: Sequence[Mapping[str, Any]]) -> str:
    """Package and version; where makers differ, every version."""
    seen: dict[str, dict[str, None]] = {}
    for maker in found:
        for name, version in maker.get("versions", {}).items():
            seen.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' and '.join(all_of_it)}" for name, all_of_it in seen.items())


def revisions(found: Sequence[Mapping[str, Any]]) -> str:
    """The git revisions with how many pieces each finished; of one alone only its name; empty where there is none."""
    counts: dict[str, int] = {}
    for maker in found:
        name = maker.get("git") or "none"
        counts[name] = counts.get(name, 0) + _count(maker)
    if list(counts) in ([], ["none"]):
        return ""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({n} {'piece' if n == 1 else 'pieces'})" for name, n in counts.items())


def _count(maker: Mapping[str, Any]) -> int:
    return sum(maker["pieces"].values())


def _machine(hardware: Mapping[str, Any]) -> str:
    """Processor, cores and GPUs in words."""
    gpus: list[str] = hardware.get("gpus", [])
    words = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)]
    words += [str(hardware["processor"])] if "processor" in hardware else []
    words += [f"{hardware['cores']} cores"] if "cores" in hardware else []
    return ", ".join([*words, *([str(hardware["machine"])] if "machine" in hardware else [])])

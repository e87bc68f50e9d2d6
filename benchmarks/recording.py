"""A figure and where it came from: every benchmark writes its rows beside command, hardware, versions and commit."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clustermim.runs import atomic_write, environment_facts

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit of the code that runs, with `-dirty` when files differ from it."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def provenance() -> dict[str, Any]:
    """What a figure stands beside: the command as typed, hardware, versions, commit and day."""
    facts = environment_facts()
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    shown = script.relative_to(root) if script.is_relative_to(root) else script.name
    # Arguments below the working folder's parent are shown as relative, so that no machine's paths are published.
    arguments = [argument.replace(str(root.parent), "..") for argument in sys.argv[1:]]
    return {
        "command": shlex.join(["python", str(shown), *arguments]),
        "commit": commit(),
        "day": datetime.now(UTC).date().isoformat(),
        "hardware": facts["hardware"] | {"system": platform.system()},
        "versions": facts["versions"],
    }


def record(name: str, rows: Iterable[Mapping[str, Any]], **notes: Any) -> Path:
    """Write `rows` to results/NAME.json with their provenance and `notes`; gives back the path."""
    path = RESULTS / f"{name}.json"
    content = {"benchmark": name, **provenance(), **notes, "rows": [dict(row) for row in rows]}
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    return path

"""What loggers left behind, read back: event files of TensorBoard, offline files of Weights & Biases."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def tensorboard(folder: Path) -> Any:
    """All event files of a folder, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one figure, in the order of writing."""
    return [(event.step, event.value) for event in tensorboard(folder).Scalars(name)]


def wandb_records(folder: Path) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """(run id, [(step, figures)]) of each offline run below OUT/wandb, the oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        rows = []
        for data in _leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                figures = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
                rows.append((record.history.step.num, figures))
        found.append((file.stem.removeprefix("run-"), rows))
    return found


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which is what an offline run is: blocks of 32 KiB; crc, length, type, data."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if left < 7 or kind == 0:  # the end of a block is filled with zeros
            at += left
            continue
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""

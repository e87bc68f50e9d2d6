"""What a fit has reached, kept so that a kill loses at most one pass: the checkpoint of K-means."""

from typing import Any

import torch
from torch import Tensor

from clustermim.errors import InputError, Stopped
from clustermim.tokenizers.lloyd import Progress, Step
from clustermim.tokenizers.processes import Processes
from clustermim.tokenizers.streams import RowStream
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest


class FitState:
    """Centroids and all that the next step depends on besides the rows.

    The sample is not kept: it is a function of the seed and of the rows' positions, and is drawn again.

    Parameters
    ----------
    checkpoints
        Where the first process keeps the state and finds that of a fit that was broken off; None keeps nothing.
    stop
        Looked at whenever `look` or `keep` is called.
    processes
        All of them go on from what the first one finds.
    device
        Where the centroids are wanted.

    Attributes
    ----------
    stage
        ``"sample"`` until the last part of the sample is done, then ``"full"``.
    rows
        Rows of the last part of the sample that is done; 0 before the starts have been compared.
    centroids, progress
        Where the next step begins.
    facts
        What the pass that samples found, for the full passes.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        stop: StopRequest | None,
        processes: Processes,
        device: str | torch.device,
    ) -> None:
        self._checkpoints, self._stop, self._processes = checkpoints, stop, processes
        self._number = 0
        self.stage, self.rows = "sample", 0
        self.centroids = torch.empty(0)
        self.progress = Progress()
        self.facts: dict[str, Any] = {}
        self.history: list[Step] = []
        self.starts: list[float] = []
        found = checkpoints.load_latest() if checkpoints is not None and processes.rank == 0 else None
        found = processes.same_object(found)
        if found is not None:
            self._number, state = found
            self.stage, self.rows, self.facts = state["stage"], state["rows"], state["facts"]
            self.history, self.starts = state["history"], state["starts"]
            self.centroids, self.progress = state["centroids"].to(device), Progress(**state["progress"])

    @property
    def needs_sample(self) -> bool:
        """Whether rows must be held in memory to go on."""
        return self.stage == "sample" or bool(self.facts["in_memory"])

    def measured(self, data: RowStream, *, in_memory: bool) -> None:
        """Note what the sampling pass found, or check that it found the same as before the fit was broken off."""
        before = self.facts.get("num_rows", data.num_rows)
        if before != data.num_rows:
            raise InputError(
                f"--resume: there were {before} patches when this fit was begun, there are {data.num_rows} now. "
                "Restore the data, or choose another --out."
            )
        self.facts = {
            "num_rows": data.num_rows,
            "largest": data.largest,
            "square_sum": data.square_sum,
            "in_memory": in_memory,
        }

    def tell(self, stream: RowStream) -> None:
        """Spare a stream the pass that measures it."""
        stream.num_rows, stream.largest = self.facts["num_rows"], self.facts["largest"]
        stream.square_sum = self.facts["square_sum"]

    def keep(self, stage: str, centroids: Tensor, *, rows: int = 0, progress: Progress | None = None) -> None:
        """Move on, write a checkpoint, and end here if that was asked for."""
        self.stage, self.rows, self.centroids = stage, rows, centroids
        self.progress = progress or Progress()
        self._number += 1
        if self._checkpoints is not None and self._processes.rank == 0:
            state = {
                "stage": stage,
                "rows": rows,
                "centroids": centroids.cpu(),
                "progress": self.progress.to_dict(),
                "facts": self.facts,
                "history": self.history,
                "starts": self.starts,
            }
            self._checkpoints.save(self._number, state)
        if self._processes.any(self._wanted()):
            self._end()

    def look(self) -> None:
        """End in the middle of a pass if that was asked for; several processes end together, after the pass."""
        if self._processes.size == 1 and self._wanted():
            self._end()

    def _wanted(self) -> bool:
        return self._stop is not None and self._stop.reason is not None

    def _end(self) -> None:
        if self._stop is not None and self._stop.interrupted:
            raise KeyboardInterrupt
        by = self._stop.reason if self._stop is not None and self._stop.reason else "by another process"
        place = f"in full pass {self.progress.steps + 1}" if self.stage == "full" else "before the full passes"
        kept = (
            "What was done before that pass is kept: repeat the command with --resume to continue exactly."
            if self._checkpoints is not None
            else "Nothing was kept, because no --out was given."
        )
        raise Stopped(f"K-means was stopped {by} {place}. {kept}")

"""What encoders are worth on data that they were not pretrained on: whether their order carries over, and the cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clustermim.studies.collecting import Findings, RunRow, by_cell
from clustermim.studies.correlating import Correlation, correlate, paired_difference


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Encoders of one data set, judged on another.

    Attributes
    ----------
    data, judged_on, protocol
        What they were pretrained on, what they are judged on, and how.
    order
        Of their accuracies on their own data with those on the other, over targets; None for fewer than three.
    costs
        Target -> percentage points that its encoders lie below those of the same target that were pretrained on
        `judged_on` itself, of equal seeds; empty where there are none.
    """

    data: str
    judged_on: str
    protocol: str
    order: Correlation | None
    costs: Mapping[str, float]

    @property
    def cost(self) -> tuple[float, float, float] | None:
        """Mean, lowest and highest of the costs."""
        values = list(self.costs.values())
        return (float(np.mean(values)), min(values), max(values)) if values else None

    def row(self) -> dict[str, Any]:
        """A flat record."""
        order = {} if self.order is None else asdict(self.order)
        cost = {} if self.cost is None else dict(zip(("cost", "cost_low", "cost_high"), self.cost, strict=True))
        where = {"data": self.data, "judged_on": self.judged_on, "protocol": self.protocol}
        return where | order | cost | {"costs": dict(self.costs)}


def carried(findings: Findings) -> list[Carried]:
    """One for each pair of data sets and protocol where something can be said."""
    found = []
    for data, judged_on in findings.judgements:
        if data == judged_on:
            continue
        away = findings.runs_on(data, judged_on)
        for protocol in findings.protocols:
            costs = _costs(away, findings.runs_on(judged_on, judged_on), protocol)
            order = _order(findings.runs_on(data, data), away, protocol)
            if order is not None or costs:
                found.append(Carried(data=data, judged_on=judged_on, protocol=protocol, order=order, costs=costs))
    return found


def _order(home: Sequence[RunRow], away: Sequence[RunRow], protocol: str) -> Correlation | None:
    means = {name: float(np.mean(values)) for name, values in by_cell(home, protocol).items()}
    return correlate(means, by_cell(away, protocol), higher=True)


def _costs(away: Sequence[RunRow], natives: Sequence[RunRow], protocol: str) -> dict[str, float]:
    here, native = _by_seed(away, protocol), _by_seed(natives, protocol)
    gaps = {name: paired_difference(native.get(name, {}), seeds) for name, seeds in here.items()}
    return {name: gap.points for name, gap in gaps.items() if gap is not None}


def _by_seed(rows: Sequence[RunRow], protocol: str) -> dict[str, dict[int, float]]:
    """Target -> seed -> accuracy."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if protocol in row.accuracy:
            found.setdefault(row.name, {})[row.seed] = row.accuracy[protocol]
    return found

"""How every piece of a study stands: from what lies in its folder, and from what unfinished pieces have yet to read.

A finished piece holds its result, and some kinds a product that other pieces read: a tokenizer, an encoder. Results
travel without products (`packing.py`), and products may be deleted to save room. A piece whose product is gone stays
finished for as long as nobody who is unfinished reads it; else it is made again.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from clustermim.studies.choosing import first_round_run, judged_run
from clustermim.studies.folder import SETTLED, State, StudyFolder
from clustermim.studies.pieces import Piece, Plan
from clustermim.studies.planning import PLACEHOLDER


def states_of(plan: Plan, folder: StudyFolder) -> dict[str, State]:
    """The state of every piece, from one look at the folder."""
    return _Look(plan, folder).states()


def remade(plan: Plan, folder: StudyFolder, states: Mapping[str, State]) -> list[str]:
    """Pieces that have a result and are made again, because their product is gone and is read."""
    return [i for i in plan.pieces if folder.piece(i).exists() and states[i] not in SETTLED]


def perhaps_remade(plan: Plan, folder: StudyFolder, states: Mapping[str, State]) -> list[str]:
    """Trainings without their encoder, which are made again if theirs is the learning rate that will be chosen."""
    choosing = [p for i, p in plan.pieces.items() if states[i] not in SETTLED and _chooses(p)]
    unsure = [piece for piece in choosing if any(states[other] not in SETTLED for other in piece.any_of)]
    among = [plan.pieces[other] for piece in unsure for other in piece.any_of]
    runs = {piece.id if piece.kind == "pretrain" else piece.needs[0] for piece in among}
    return [i for i, p in plan.pieces.items() if i in runs and states[i] == "done" and not folder.whole(p)]


def why(plan: Plan, folder: StudyFolder, states: Mapping[str, State], identity: str) -> str:
    """Why a piece has no result, in words: its own failure, or that of the piece it was given up for."""
    failure = folder.failure(identity)
    if failure is not None:
        return str(failure["reason"])
    piece = plan.pieces[identity]
    culprits = [other for other in (*piece.needs, *piece.any_of) if states[other] in ("failed", "given up")]
    if not culprits and states[identity] == "given up":
        culprits = [other for other in _products(piece, plan, folder) if states[other] in ("failed", "given up")]
    if not culprits:
        return ""
    other = plan.pieces[culprits[0]]
    reason = why(plan, folder, states, other.id).rpartition("failed: ")[2]
    return f"given up, because {other.kind} of {other.name} failed: {reason}"


class _Look:
    """One look at the folder."""

    def __init__(self, plan: Plan, folder: StudyFolder) -> None:
        self.plan, self.folder = plan, folder
        self.done, self.failed, self.held = folder.finished(), folder.failed(), folder.held()
        self.lost = {i for i, p in plan.pieces.items() if i in self.done and not folder.whole(p)}
        """Finished, without the product."""
        self.dead: set[str] = set()
        """What will never be there: of unfinished pieces the result, of lost ones the product."""
        for identity, piece in plan.pieces.items():
            if (identity not in self.done or identity in self.lost) and self._never(identity, piece):
                self.dead.add(identity)
        self.again: set[str] = set()
        """Lost, and read by a piece that is not finished. Readers stand behind what they read."""
        for identity, piece in reversed(list(plan.pieces.items())):
            if identity not in self.dead and (identity not in self.done or identity in self.again):
                self.again |= self._missing(piece)

    def _never(self, identity: str, piece: Piece) -> bool:
        gone = self.dead - self.done
        return (
            identity in self.failed
            or any(other in gone for other in piece.needs)
            or (bool(piece.any_of) and all(other in gone for other in piece.any_of))
            or any(other in self.dead for other in self._missing(piece))
        )

    def _missing(self, piece: Piece) -> AbstractSet[str]:
        """What a piece reads and is lost; where it chooses, this is known once all that it chooses among is settled."""
        if not self.lost or (_chooses(piece) and any(other not in self.done | self.dead for other in piece.any_of)):
            return frozenset()
        return self.lost & set(_products(piece, self.plan, self.folder))

    def states(self) -> dict[str, State]:
        states: dict[str, State] = {}
        for identity, piece in self.plan.pieces.items():
            if identity in self.done and identity not in self.again and identity not in self.lost & self.failed:
                states[identity] = "done"
            elif identity in self.failed:
                states[identity] = "failed"
            elif identity in self.dead:
                states[identity] = "given up"
            elif any(states[o] not in SETTLED for o in piece.waits_for) or self._missing(piece):
                states[identity] = "waiting"
            else:
                states[identity] = "running" if identity in self.held else "ready"
        return states


def _chooses(piece: Piece) -> bool:
    """Whether it reads the encoder that did best among several; a training takes only the learning rate of that."""
    return bool(piece.any_of) and piece.kind != "pretrain"


def _products(piece: Piece, plan: Plan, folder: StudyFolder) -> Sequence[str]:
    """Pieces of which a piece reads more than the result: tokenizer or encoder."""
    if piece.kind == "fit":
        names = PLACEHOLDER.findall(str(piece.settings.get("features", "")))
        return [first_round_run(name, piece, plan, folder) for name in names]
    if piece.kind in ("probe", "finetune") and "encoder" not in piece.settings:
        return [judged_run(piece, plan, folder)]
    return piece.needs
